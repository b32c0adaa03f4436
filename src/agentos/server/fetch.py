"""HTTP to a server that listens inside a VM, over a socket that the VM hands out."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

import h11

from agentos.conversions import FetchResponse
from agentos.errors import FetchFailed, InvalidRequest, LimitExceeded
from agentos.machine.vm import VM
from agentos.network.waiting import send_all
from agentos.server.answers import Answer

FETCH_SECONDS: Final = 60.0
"""For a whole answer."""
_CHUNK: Final = 65_536


async def fetch(
    vm: VM,
    port: int,
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: str | bytes = b"",
) -> FetchResponse:
    """Ask the server on `port` of the VM's loopback for `url`, a path or a whole URL of which the path counts.

    Redirects are not followed. Raises PortUnreachable when nobody listens, FetchFailed when what answers is not
    HTTP or takes longer than a minute, LimitExceeded (file_bytes) when the answer is too long.
    """
    data = body.encode() if isinstance(body, str) else body
    request = _request(port, url, method, headers or {}, data)
    sock = await vm.connect(port)
    try:
        async with asyncio.timeout(FETCH_SECONDS):
            return await _exchange(sock, request, data, vm.spec.limits.file_bytes)
    except TimeoutError:
        raise FetchFailed(f"port {port}: no answer in {FETCH_SECONDS:.0f} s", port=port) from None
    except (h11.RemoteProtocolError, OSError) as error:
        raise FetchFailed(f"port {port}: {error}", port=port) from None
    finally:
        sock.close()


def _request(port: int, url: str, method: str, headers: Mapping[str, str], data: bytes) -> h11.Request:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidRequest.argument("url", url, f"a path or a URL ({error})") from None
    target = f"/{parts.path.removeprefix('/')}" + (f"?{parts.query}" if parts.query else "")
    named = {name.lower(): value for name, value in headers.items()}
    named.setdefault("host", parts.netloc or f"localhost:{port}")
    named.pop("transfer-encoding", None)
    named |= {"connection": "close", "content-length": str(len(data))}
    try:
        return h11.Request(method=method.upper(), target=target, headers=list(named.items()))
    except (h11.LocalProtocolError, UnicodeError) as error:
        raise InvalidRequest(f"not a request that HTTP can carry: {error}", argument="url") from None


async def _exchange(sock: socket.socket, request: h11.Request, data: bytes, most: int) -> FetchResponse:
    connection = h11.Connection(h11.CLIENT)
    await send_all(sock, (connection.send(request) or b"") + data)
    if data:
        connection.send(h11.Data(data))
    connection.send(h11.EndOfMessage())
    response: h11.Response | None = None
    content = bytearray()
    answer = Answer(connection, sock, _CHUNK)
    while True:
        event = await answer.event()
        if isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > most:
                raise LimitExceeded.of("file_bytes", len(content), most, "the answer is too long")
        elif isinstance(event, h11.EndOfMessage) and response is not None:
            return _response(response, bytes(content))


def _response(response: h11.Response, body: bytes) -> FetchResponse:
    headers: dict[str, str] = {}
    for raw_name, raw_value in response.headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return FetchResponse(response.status_code, response.reason.decode("latin-1"), headers, body)
