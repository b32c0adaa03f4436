"""What programs find behind http_proxy and its kin: CONNECT, http:// in absolute form (RFC 9112), SOCKS5 (RFC 1928).

One port serves all: the first byte tells. The bytes after a request are the two ends' own business.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import TYPE_CHECKING, Final

import h11

from agentos.network.gate import Refused
from agentos.network.names import NoName
from agentos.network.resolver import NoAnswer
from agentos.network.waiting import receive, receive_some, send_all

if TYPE_CHECKING:
    from agentos.network.egress import Egress

HEAD_BYTES: Final = 64 * 1024
"""A request's first line and headers."""
HEAD_SECONDS: Final = 15.0
"""For them to arrive."""
_SOCKS: Final = 5
_HOP_BY_HOP: Final = {
    b"connection", b"proxy-connection", b"proxy-authorization", b"proxy-authenticate", b"keep-alive", b"te",
    b"trailer", b"upgrade", b"host",
}  # fmt: skip


class _Answer(Exception):
    """The request is answered here: a status and a line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def serve_proxy(egress: Egress, sock: socket.socket) -> None:
    """Serve one connection of the VM to its end. Raises OSError where it breaks."""
    async with asyncio.timeout(HEAD_SECONDS):
        first = await receive(sock, 1)
    if first[0] == _SOCKS:
        await _socks(egress, sock)
        return
    try:
        request, rest = await _read_head(sock, first)
        outer, head = await _reach(egress, request)
    except _Answer as said:
        await _say(sock, said.status, str(said))
        return
    try:
        if head is None:
            await send_all(sock, b"HTTP/1.1 200 Connection established\r\n\r\n")
            head = b""
        await send_all(outer, head + rest)
    except BaseException:
        outer.close()
        raise
    await egress.carry(sock, outer)


async def _read_head(sock: socket.socket, data: bytes) -> tuple[h11.Request, bytes]:
    """The request, and what came after its head."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            while True:
                # Line by line would be slow, and all at once could take what is the body's: h11 keeps that.
                parser.receive_data(data)
                event = parser.next_event()
                if isinstance(event, h11.Request):
                    return event, parser.trailing_data[0]
                data = await receive_some(sock, HEAD_BYTES)
                if not data:
                    raise ConnectionResetError("it ended within its headers")
    except h11.RemoteProtocolError as error:
        raise _Answer(error.error_status_hint, f"not a request that is understood here: {error}") from None
    except TimeoutError:
        raise _Answer(408, "the request did not arrive in time") from None


async def _reach(egress: Egress, request: h11.Request) -> tuple[socket.socket, bytes | None]:
    """The socket to where the request wants to go, and what to send there first (None: the request was CONNECT)."""
    target = request.target.decode("latin-1")
    if request.method == b"CONNECT":
        host, port = _authority(target, None)
        return await _connect(egress, host, port), None
    scheme, _, rest = target.partition("://")
    if scheme.lower() != "http":
        refused = Refused(target[:300], "method")
        egress.gate.note(refused)
        raise _Answer(400, str(refused))
    cut = next((at for at, one in enumerate(rest) if one in "/?#"), len(rest))
    authority, path = rest[:cut], rest[cut:].partition("#")[0]
    if "@" in authority:
        raise _Answer(400, "user information in a URL is not passed on")
    host, port = _authority(authority, 80)
    outer = await _connect(egress, host, port)
    return outer, _head(request, authority, path if path.startswith("/") else f"/{path}")


def _authority(text: str, default: int | None) -> tuple[str, int]:
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        if ":" not in host or (port and not port.startswith(":")):
            raise _Answer(400, f"not a host and port: {text[:300]}")
        port = port[1:]
    elif ":" in text:
        host, _, port = text.rpartition(":")
    if not port and default is not None:
        return host, default
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
        raise _Answer(400, f"not a host and port: {text[:300]}")
    return host, int(port)


def _head(request: h11.Request, authority: str, path: str) -> bytes:
    """The request in origin form. Its Host is that of the target, whatever it said (RFC 9112, 3.2.2)."""
    named = {
        one.strip().lower()
        for name, value in request.headers
        if name == b"connection"
        for one in value.split(b",")
    }
    lines = [
        request.method + b" " + path.encode("latin-1") + b" HTTP/1.1",
        b"host: " + authority.encode("latin-1"),
    ]
    lines += [
        name + b": " + value
        for name, value in request.headers
        if name not in _HOP_BY_HOP and name not in named
    ]
    # One request for each connection: the next may be to somewhere else, and comes on one that is checked anew.
    return b"\r\n".join([*lines, b"connection: close", b"", b""])


async def _connect(egress: Egress, host: str, port: int) -> socket.socket:
    try:
        return await egress.connect_name(host, port)
    except Refused as refused:
        egress.gate.note(refused)
        raise _Answer(403, str(refused)) from None
    except NoName:
        raise _Answer(502, f"{host}: there is no such name") from None
    except NoAnswer:
        raise _Answer(502, f"{host}: no name server answered") from None
    except TimeoutError:
        raise _Answer(504, f"{host}:{port}: it did not answer in time") from None
    except OSError as error:
        raise _Answer(502, f"{host}:{port}: {error.strerror or error}") from None


_REASONS: Final = {
    400: b"Bad Request", 403: b"Forbidden", 408: b"Request Timeout", 431: b"Request Header Fields Too Large",
    502: b"Bad Gateway", 504: b"Gateway Timeout",
}  # fmt: skip


async def _say(sock: socket.socket, status: int, text: str) -> None:
    body = f"agentos: {text}\n".encode()
    head = b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, b"Error"))
    head += (
        b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        % len(body)
    )
    async with asyncio.timeout(HEAD_SECONDS):
        await send_all(sock, head + body)
        sock.shutdown(socket.SHUT_WR)
        while await receive_some(sock, HEAD_BYTES):  # a reset would take the answer away from who still sends
            pass


async def _socks(egress: Egress, sock: socket.socket) -> None:
    """SOCKS5 without authentication, its command CONNECT."""
    async with asyncio.timeout(HEAD_SECONDS):
        methods = await receive(sock, (await receive(sock, 1))[0])
        if 0 not in methods:
            await send_all(sock, b"\x05\xff")
            return
        await send_all(sock, b"\x05\x00")
        _, command, _, kind = await receive(sock, 4)
        if kind == 1:
            host = str(ipaddress.IPv4Address(await receive(sock, 4)))
        elif kind == 4:
            host = str(ipaddress.IPv6Address(await receive(sock, 16)))
        elif kind == 3:
            host = (await receive(sock, (await receive(sock, 1))[0])).decode("latin-1")
        else:
            await send_all(sock, _socks_reply(8))
            return
        port = int.from_bytes(await receive(sock, 2), "big")
    if command != 1:
        egress.gate.note(Refused(f"{host}:{port}", "method"))
        await send_all(sock, _socks_reply(7))
        return
    try:
        outer = await egress.connect_name(host, port)
    except Refused as refused:
        egress.gate.note(refused)
        await send_all(sock, _socks_reply(2))
        return
    except (NoName, NoAnswer):
        await send_all(sock, _socks_reply(4))
        return
    except OSError as error:
        await send_all(sock, _socks_reply(5 if isinstance(error, ConnectionRefusedError) else 4))
        return
    try:
        await send_all(sock, _socks_reply(0))
    except BaseException:
        outer.close()
        raise
    await egress.carry(sock, outer)


def _socks_reply(code: int) -> bytes:
    return bytes([_SOCKS, code, 0, 1, 0, 0, 0, 0, 0, 0])
