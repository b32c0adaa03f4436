"""A server in a process of its own, and a way to it on which connections break."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3] / "src"


@contextlib.contextmanager
def running(data_dir: Path, *command: str, cwd: Path | None = None) -> Iterator[str]:
    """The URL of a server that `python -m COMMAND` starts; it has to end with exit code 0."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AGENTOS_")}
    port = [] if "--port" in command else ["--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, *port, "--data-dir", str(data_dir)],
        stderr=subprocess.PIPE, env={**env, "PYTHONPATH": str(SOURCE)}, cwd=cwd,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            entry = json.loads(line)
            if entry["message"] == "listening":
                yield f"http://127.0.0.1:{entry['port']}"
                break
        else:
            raise AssertionError("the server did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
    assert process.returncode == 0, rest


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for all tests; each uses VMs of its own."""
    with running(tmp_path_factory.mktemp("data"), "agentos.server") as found:
        yield found


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[str]]:
    """Starts a server of the test's own."""
    return lambda *command, **options: running(tmp_path / "data", *command, **options)


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
