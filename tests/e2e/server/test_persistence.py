"""What outlives sleep, a restart, and kill -9: records and files; and what does not: processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import select
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from agentos import Host
from agentos.actors import Actors
from agentos.errors import BootFailed


def test_records_outlive_a_restart(start_server: Any) -> None:
    """The same key is the same actor afterwards, with its creation time."""
    server = start_server()
    server.call("kept", "exec", "true")
    before = server.http.get("/actors", params={"name": "vm", "key": "kept"}).json()["actors"][0]
    assert server.close() == 0
    after = start_server().http.get("/actors", params={"name": "vm", "key": "kept"}).json()["actors"][0]
    assert (after["actor_id"], after["create_ts"]) == (before["actor_id"], before["create_ts"])
    assert after["running"] is False


@pytest.mark.parametrize("end", ["close", "kill"])
def test_files_outlive_the_server(start_server: Any, end: str) -> None:
    """Whether it was told to end or was killed."""
    server = start_server()
    server.call("kept", "exec", "mkdir d; echo content > d/f; ln -s d/f link; chmod 600 d/f")
    getattr(server, end)()
    again = start_server()
    assert again.call("kept", "exec", "cat link; stat -c %a:%U d/f")["stdout"] == "content\n600:agentos\n"


def test_files_outlive_sleep(start_server: Any) -> None:
    """A VM that nothing happens in sleeps, and wakes with the next call."""
    server = start_server("--sleep-after", "0.3")
    server.call("sleepy", "exec", "echo content > f; touch /tmp/gone")
    wait_until(lambda: listed(server, "sleepy")["sleep_ts"] is not None)
    assert listed(server, "sleepy")["running"] is False
    assert server.call("sleepy", "exec", "cat f")["stdout"] == "content\n"


def test_a_vm_in_use_does_not_sleep(start_server: Any) -> None:
    """A process, a shell, a connection and what an exec left behind keep it awake."""
    server = start_server("--sleep-after", "0.2")
    server.call("process", "spawn", "sleep", ["1000"])
    server.call("shell", "openShell")
    server.call("left", "exec", "sleep 1000 & echo")
    with connect(server.socket_url("connection"), subprotocols=["rivet"], proxy=None) as websocket:
        server.call("connection", "exec", "true")
        server.call("nothing", "exec", "true")
        wait_until(lambda: not listed(server, "nothing")["running"])
        time.sleep(0.5)
        for key in ("process", "shell", "left", "connection"):
            assert listed(server, key)["running"], key
        websocket.close()
    wait_until(lambda: not listed(server, "connection")["running"])


def test_kill_leaves_nothing_running(start_server: Any) -> None:
    """No stray process, whatever ran; and the next server has the directory at once."""
    server = start_server()
    for key in "abc":
        server.call(key, "spawn", "sleep", ["86399"])
    server.kill()
    wait_until(lambda: subprocess.run(["pgrep", "-f", "^sleep 86399"], capture_output=True).returncode == 1)
    assert start_server().call("a", "listProcesses") == []


def test_a_destroyed_vm_leaves_no_file(start_server: Any) -> None:
    """Neither its directory nor its record; a destruction that was cut short is finished at the next start."""
    server = start_server()
    server.call("gone", "exec", "echo x > f")
    server.call("half", "exec", "echo x > f")
    half = listed(server, "half")["actor_id"]
    server.call("gone", "destroy")
    server.close()
    (server.data_dir / "vms" / "stray").mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(server.data_dir / "actors.sqlite") as db:
        db.execute("update actors set destroy_ts = 1 where actor_id = ?", (half,))
    db.close()
    again = start_server()
    assert again.http.get("/actors", params={"actor_ids": half}).json() == {"actors": []}
    left = {path.name for path in (server.data_dir / "vms").iterdir()}
    assert all(name.startswith("spare-") for name in left), left
    again.close()
    assert list((server.data_dir / "vms").iterdir()) == []


def test_one_server_for_one_directory(start_server: Any, tmp_path: Path) -> None:
    """The second says why it cannot start, which process is in its way, and what to do."""
    first = start_server()
    with pytest.raises(AssertionError) as failed:
        start_server()
    pid = first.process.pid
    assert f"{first.data_dir} is in use by another server, process {pid}: " in str(failed.value)
    assert f"stop that server (kill {pid}), or choose another directory (--data-dir" in str(failed.value)
    assert first.close() == 0
    start_server()


def test_what_a_lock_says_of_another_machine_is_told_as_such(tmp_path: Path) -> None:
    """Its pid means nothing here; and a lock of which nothing is known yet is one all the same."""
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for note, said in (
            ("17 elsewhere\n", "another server, process 17 on elsewhere$"),
            ("", "another server$"),
            ("\x1b[31m x", "another server$"),
        ):
            lock.write_text(note)
            with pytest.raises(BootFailed, match=said) as failed:
                Actors({}, tmp_path, Host())
            assert "kill" not in failed.value.details["remedy"]


def test_connections_are_told_to_come_back(start_server: Any) -> None:
    """A graceful end has the reason on which clients keep trying."""
    server = start_server()
    with connect(server.socket_url("k"), subprotocols=["rivet"], proxy=None) as websocket:
        websocket.recv(timeout=10)
        assert server.close() == 0
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.reason == "ws.going_away"


def test_what_is_asked_at_the_very_end_is_answered(start_server: Any) -> None:
    """However late: where a connection ends without a word the given client's call fails, or it gives up for good."""
    server = start_server()
    with contextlib.ExitStack() as stack:
        fresh, kept, calling, silent = (
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10)) for _ in range(4)
        )
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        healthy = b""
        while not healthy.endswith(b"}"):
            healthy += kept.recv(65_536)
        server.process.terminate()
        wait_until(lambda: refused(server.port))
        call = f"POST {server.path('k', 'action/exec')} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 11\r\n\r\n"
        calling.sendall(call.encode())
        for one in (fresh, kept):
            one.sendall(
                b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                b"Sec-WebSocket-Protocol: rivet\r\n\r\n" % server.path("k", "connect").encode()
            )
        for one in (fresh, kept):
            said = b""
            while not said.endswith(b"ws.going_away"):
                piece = one.recv(65_536)
                assert piece, said
                said += piece
            assert said.startswith(b"HTTP/1.1 101")
            one.sendall(b"\x88\x80\0\0\0\0")  # the close, answered
        # Who is answered while it still sends may lose the answer.
        assert select.select([calling], [], [], 0) == ([], [], [])
        calling.sendall(b'{"args":[]}')
        answer = b"".join(iter(lambda: calling.recv(65_536), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"stopping"' in answer
        assert silent.recv(65_536) == b""  # who never asks holds nothing up
        assert server.process.wait(20) == 0


def refused(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def listed(server: Any, key: str) -> Any:
    """What the management API says of a VM."""
    return server.http.get("/actors", params={"name": "vm", "key": key}).json()["actors"][0]


def wait_until(condition: Any) -> None:
    """Until it holds."""

    async def poll() -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  # another process is waited for
                await asyncio.sleep(0.02)

    asyncio.run(poll())


def test_a_call_in_flight_is_answered_before_the_end(start_server: Any) -> None:
    """And who comes meanwhile is told to come back."""
    server = start_server()
    server.call("k", "exec", "true")
    with (
        ThreadPoolExecutor(1) as pool,
        connect(server.socket_url("k"), subprotocols=["rivet"], proxy=None) as first,
    ):
        first.recv(timeout=10)
        slow = pool.submit(server.call, "k", "exec", "echo begun; sleep 1; echo done")
        wait_until(lambda: any(one["command"] == "sleep" for one in server.call("k", "allProcesses")))
        server.process.terminate()
        with pytest.raises(ConnectionClosed):
            first.recv(timeout=10)
        with connect(server.socket_url("k"), subprotocols=["rivet"], proxy=None) as again:
            with pytest.raises(ConnectionClosed) as closed:
                again.recv(timeout=10)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.reason == "ws.going_away"
        assert slow.result(10)["stdout"] == "begun\ndone\n"
    assert server.process.wait(20) == 0


def test_an_inherited_socket_outlives_the_server(start_server: Any, tmp_path: Path) -> None:
    """A client that connects between two servers is served by the second."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # What a service manager does: the socket as descriptor 3, its number and the process in the environment.
        program = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True)\n"
            "os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())}\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'agentos.server', '--data-dir', sys.argv[2]])\n"
        )
        port = listener.getsockname()[1]
        command = [sys.executable, "-c", program, str(listener.fileno()), str(tmp_path / "data")]
        url = f"http://127.0.0.1:{port}/health"
        for _ in range(2):
            with ThreadPoolExecutor(1) as pool:
                early = pool.submit(httpx.get, url, timeout=30)
                with subprocess.Popen(
                    command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL
                ) as child:
                    assert early.result(30).json()["status"] == "ok"
                    child.terminate()
                    assert child.wait(20) == 0
