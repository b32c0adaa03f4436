"""A way to the server on which connections break."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

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


@pytest.fixture
def breaking(url: str) -> Breaking:
    """A way to the server that breaks when told to."""
    return Breaking(int(url.rpartition(":")[2]))
