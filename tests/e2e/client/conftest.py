"""A way to the server on which connections break."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest


class Breaking:
    """A way to the server. `url` leads there; `cut` breaks all connections, `lose_answers` those that come next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()
        self.url = ""
        self.lose_answers = 0
        self.connections = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Breaking]:
        """Open while the context lasts."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.sleep(0.05)

    def cut(self) -> None:
        """Break every connection, wherever it is."""
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, upstream}
        await asyncio.gather(
            self._pump(reader, upstream, answers=False), self._pump(upstream_reader, writer, answers=True)
        )
        self._open -= {writer, upstream}

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if answers and self.lose_answers:
                    self.lose_answers -= 1
                    self.cut()
                    break
                writer.write(data)
                await writer.drain()
        writer.close()


class Proxy:
    """An HTTP proxy as they are: it forwards requests for http:// addresses, and makes tunnels when asked to.

    `asked` has the first lines of all requests, `credentials` what they showed of those.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.credentials: set[str | None] = set()
        self.refuses = False
        self.url = ""
        self._serving: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Proxy]:
        """Open while the context lasts."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://user:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self
        if self._serving:
            await asyncio.wait(self._serving, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._answer(reader, writer)
        finally:
            self._serving.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *headers = head.split("\r\n")
            self.asked.append(line)
            given = dict(one.lower().split(": ", 1) for one in headers if one)
            self.credentials.add(given.get("proxy-authorization"))
            method, target, _ = line.split(" ")
            if self.refuses or target.startswith("ws:"):
                writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
            elif method == "CONNECT":
                await self._tunnel(target, reader, writer)
            else:
                await self._forward(method, target, headers, reader, writer)
        writer.close()

    async def _tunnel(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream = await asyncio.open_connection(*target.rsplit(":", 1))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_copy(reader, upstream), _copy(upstream_reader, writer))

    async def _forward(
        self,
        method: str,
        target: str,
        headers: list[str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        parts = urlsplit(target)
        upstream_reader, upstream = await asyncio.open_connection(parts.hostname, parts.port)
        kept = [one for one in headers if one and not one.lower().startswith(("proxy-", "connection:"))]
        lines = (f"{method} {parts.path}?{parts.query} HTTP/1.1", *kept, "connection: close", "", "")
        upstream.write("\r\n".join(lines).encode())
        sending = asyncio.ensure_future(_copy(reader, upstream))
        await _copy(upstream_reader, writer)
        sending.cancel()
        upstream.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
def proxy() -> Proxy:
    """A proxy, which is not served yet."""
    return Proxy()


@pytest.fixture
def breaking(url: str) -> Breaking:
    """A way to the server that breaks when told to."""
    return Breaking(int(url.rpartition(":")[2]))
