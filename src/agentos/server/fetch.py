"""HTTP to a server that listens inside a VM, over a socket that the VM hands out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import h11

from agentos.conversions import FetchResponse
from agentos.errors import FetchFailed, InvalidRequest, LimitExceeded
from agentos.machine.vm import VM
from agentos.network.waiting import receive_some

FETCH_SECONDS: Final = 60.0
"""For a whole answer."""
_CHUNK: Final = 65_536
EVENTS_AT_ONCE: Final = 16
"""Pieces of an answer that are taken before others have their turn: one may be a single byte."""


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

    Redirects are not followed. Raises SpawnFailed when nobody listens, FetchFailed when what answers is not HTTP
    or takes longer than a minute, LimitExceeded (file_bytes) when the answer is too long.
    """
    data = body.encode() if isinstance(body, str) else body
    request = _request(port, url, method, headers or {}, data)
    sock = await vm.connect(port)
    try:
        async with asyncio.timeout(FETCH_SECONDS):
            return await _exchange(_Wire(sock, vm.spec.limits.file_bytes), request, data)
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


class _Wire:
    """A socket, as the two calls that are needed."""

    def __init__(self, sock: Any, most: int) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.most = most

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def receive(self) -> bytes:
        return await receive_some(self._sock, _CHUNK)


async def _exchange(wire: _Wire, request: h11.Request, data: bytes) -> FetchResponse:
    connection = h11.Connection(h11.CLIENT)
    await wire.send((connection.send(request) or b"") + data)
    if data:
        connection.send(h11.Data(data))
    connection.send(h11.EndOfMessage())
    response: h11.Response | None = None
    content = bytearray()
    events = 0
    while True:
        event = connection.next_event()
        events += 1
        if events % EVENTS_AT_ONCE == 0:
            await asyncio.sleep(0)
        if event is h11.NEED_DATA:
            connection.receive_data(await wire.receive())
        elif event is h11.PAUSED:
            # After an upgrade that the caller asked for, or a CONNECT: h11 says so again and again.
            raise h11.RemoteProtocolError("it switched to another protocol")
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > wire.most:
                raise LimitExceeded.of("file_bytes", len(content), wire.most, "the answer is too long")
        elif isinstance(event, h11.EndOfMessage) and response is not None:
            return _response(response, bytes(content))


def _response(response: h11.Response, body: bytes) -> FetchResponse:
    headers: dict[str, str] = {}
    for raw_name, raw_value in response.headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return FetchResponse(response.status_code, response.reason.decode("latin-1"), headers, body)
