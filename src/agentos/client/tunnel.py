"""WebSockets through a proxy: in a tunnel, also where nothing is encrypted, as RFC 6455 (4.1) wants it.

aiohttp makes tunnels for wss:// only, and asks for ws:// as for a page, which few proxies understand.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
from typing import Any, Final

import aiohttp
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from agentos.client.reasons import reason_of

_MOST_BYTES: Final = 64 * 1024
"""Of what a proxy answers before the tunnel is open."""


class Tunnels(aiohttp.BaseConnector):
    """Makes every connection through the HTTP proxy at `proxy`, which may have a user and a password in it."""

    def __init__(self, proxy: str) -> None:
        super().__init__(force_close=True, limit=0)
        self._proxy = URL(proxy)

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: Any, timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        async with asyncio.timeout(timeout.sock_connect):
            end = await self._connected()
            try:
                await self._ask(end, f"{req.url.host_subcomponent}:{req.url.port}")
                _, protocol = await self._loop.create_connection(self._factory, sock=end)
            except BaseException:
                end.close()
                raise
        return protocol

    async def _connected(self) -> socket.socket:
        failure: OSError = OSError("it has no address")
        host, port = self._proxy.host, self._proxy.port
        for family, kind, number, _, address in await self._loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            end = socket.socket(family, kind, number)
            end.setblocking(False)
            try:
                await self._loop.sock_connect(end, address)
            except BaseException as error:
                end.close()
                if not isinstance(error, OSError):
                    raise
                failure = error
            else:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return end
        raise aiohttp.ClientConnectionError(f"the proxy {host}:{port}: {reason_of(failure)}")

    async def _ask(self, end: socket.socket, target: str) -> None:
        lines = [f"CONNECT {target} HTTP/1.1", f"host: {target}"]
        if self._proxy.user is not None:
            secret = f"{self._proxy.user}:{self._proxy.password or ''}"
            lines.append(f"proxy-authorization: Basic {base64.b64encode(secret.encode()).decode()}")
        await self._loop.sock_sendall(end, "\r\n".join((*lines, "", "")).encode())
        head = bytearray()
        # Nothing can follow it: a server of HTTP speaks when it is asked.
        while b"\r\n\r\n" not in head:
            more = await self._loop.sock_recv(end, 4096)
            if not more or len(head) > _MOST_BYTES:
                raise aiohttp.ClientConnectionError("the proxy gave no answer")
            head += more
        line = head.partition(b"\r\n")[0].decode("latin-1")
        if line.split(" ")[1:2] != ["200"]:
            raise aiohttp.ClientConnectionError(f"the proxy made no tunnel to {target}: {line[:200]}")
