"""A real server in a process of its own, and plain HTTP and WebSocket to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest


class RunningServer:
    """One server process. `url` is where it listens, `logs` what it has said so far."""

    def __init__(
        self,
        data_dir: Path,
        *arguments: str,
        port: int = 0,
        program: Sequence[str] = ("-m", "agentos.server"),
    ) -> None:
        self.data_dir = data_dir
        command = [sys.executable, *program, "--port", str(port), "--data-dir", str(data_dir)]
        env = {name: value for name, value in os.environ.items() if name != "AGENTOS_TOKEN"}
        self.process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, env=env)
        self.logs: list[dict[str, Any]] = []
        self.strays: list[bytes] = []
        """What it wrote to stderr that is not a line of its log."""
        self.port = self._read_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = self.client()
        self._reader = threading.Thread(target=self._read_rest, daemon=True)
        self._reader.start()

    def _read_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry = json.loads(line)
            self.logs.append(entry)
            if entry["message"] == "listening":
                return int(entry["port"])
        self.process.stderr.close()
        self.process.wait(20)
        raise AssertionError(f"the server did not start: {self.logs}")

    def _read_rest(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.logs.append(json.loads(line))
            except ValueError:
                self.strays.append(line)

    def client(self) -> httpx.Client:
        """A client of its own."""
        return httpx.Client(base_url=self.url, timeout=30)

    @contextlib.contextmanager
    def with_own_client(self) -> Iterator[RunningServer]:
        """Itself, with an `http` that nobody used before."""
        self.http.close()
        self.http = self.client()
        yield self
        self.http.close()

    def path(self, key: str, rest: str, method: str = "getOrCreate", name: str = "vm") -> str:
        """The path and query of what `rest` asks of the VM of this key."""
        return f"/gateway/{name}/{rest}?rvt-namespace=default&rvt-method={method}&rvt-key={key}"

    def post(self, key: str, action: str, *args: Any, method: str = "getOrCreate") -> httpx.Response:
        """Call an action, whatever comes of it."""
        return self.http.post(self.path(key, f"action/{action}", method), json={"args": list(args)})

    def call(self, key: str, action: str, *args: Any) -> Any:
        """The result of an action that succeeds."""
        response = self.post(key, action, *args)
        assert response.status_code == 200, response.text
        return response.json()["output"]

    def socket_url(self, key: str) -> str:
        """Where to connect."""
        return f"ws://127.0.0.1:{self.port}{self.path(key, 'connect')}"

    def upgraded(self, key: str, seconds: float) -> socket.socket:
        """A raw socket on which the handshake is done and Init has come. It waits so long for what it reads."""
        raw = socket.create_connection(("127.0.0.1", self.port))
        raw.settimeout(seconds)
        lines = [
            f"GET {self.path(key, 'connect')} HTTP/1.1", "host: localhost", "upgrade: websocket",
            "connection: upgrade", "sec-websocket-version: 13", "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
            "sec-websocket-protocol: rivet, rivet_encoding.bare", "", "",
        ]  # fmt: skip
        raw.sendall("\r\n".join(lines).encode())
        got = b""
        while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < 2:
            got += raw.recv(4096)
        assert b" 101 " in got.split(b"\r\n")[0]
        return raw

    def kill(self) -> None:
        """As a power cut, for this process."""
        self.process.kill()
        self.process.wait(20)
        self._reader.join(20)
        if self.strays and not self.strays[-1].endswith(b"\n"):
            self.strays.pop()  # it was killed while it wrote

    def close(self) -> int:
        """SIGTERM, and the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self._reader.join(20)
        assert self.process.stderr is not None
        self.process.stderr.close()
        assert not self.strays, self.strays
        return code


@pytest.fixture(scope="session")
def server_process() -> type[RunningServer]:
    """Starts servers that live as long as who asks for them wants."""
    return RunningServer


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server for all tests that leave it as they found it."""
    running = RunningServer(tmp_path_factory.mktemp("data"))
    yield running
    assert running.close() == 0
    failed = [one for one in running.logs if one["level"] == "error"]
    assert not failed, failed


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The same, with a client of the test's own."""
    with shared_server.with_own_client() as running:
        yield running


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers of a test's own, on the test's data directory unless told otherwise."""
    running: list[RunningServer] = []

    def start(*arguments: str, port: int = 0, data_dir: Path | None = None) -> RunningServer:
        running.append(RunningServer(data_dir or tmp_path / "data", *arguments, port=port))
        return running[-1]

    yield start
    for one in running:
        one.close()
