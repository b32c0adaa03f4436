"""The zygote of a server is killed: whoever waits is told, and the next action on any key boots a VM again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agentos.wire.messages import ActionResponse, Event

sys.path.insert(0, str(Path(__file__).parent))
from test_events import connected

MARK = "86397"


def zygote_of(server: Any) -> int | None:
    """The zygote that runs."""
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            if b"start.py\0zygote" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


def kill_zygote(server: Any) -> int:
    """SIGKILL to it. Returns its pid. The server may have to be told yet."""
    pid = zygote_of(server)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def wait_until(seen: Callable[[], bool]) -> None:
    """Look until it is so, for 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(server: Any, key: str) -> bool:
    """Whether the VM of this key does, as far as the server knows."""
    found = server.http.get("/actors", params={"name": "vm", "key": key}).json()["actors"]
    return bool(found[0]["running"])


def guests() -> list[str]:
    """Processes of VMs on this host."""
    return subprocess.run(["pgrep", "-f", f"^sleep {MARK}"], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize("pool", ["0", "2"])
def test_an_actor_goes_on_with_its_files(start_server: Any, pool: str) -> None:
    """Twice in a row, with and without ready VMs; the VMs that were there before have ended in full."""
    server = start_server("--pool", pool)
    killed = []
    for turn in range(2):
        server.call("kept", "exec", f"echo {turn} >> f")
        server.call("kept", "spawn", "sleep", [MARK])
        server.call(f"other{turn}", "spawn", "sleep", [MARK])
        with ThreadPoolExecutor() as threads:
            running = threads.submit(server.call, "kept", "exec", f"sleep {MARK}")
            wait_until(lambda: len(guests()) >= 3)
            killed.append(kill_zygote(server))
            assert running.result(20)["reason"] == "vmStopped"
        assert server.call("kept", "exec", "cat f")["stdout"] == "".join(
            f"{one}\n" for one in range(turn + 1)
        )
        assert guests() == []
        assert server.call(f"new{turn}", "exec", "echo new")["stdout"] == "new\n"
        assert server.call(f"other{turn}", "listProcesses") == []
    told = [one for one in server.logs if one["message"].startswith("the zygote ended")]
    assert [(one["pid"], one["status"]) for one in told] == [(pid, -9) for pid in killed]
    assert server.close() == 0
    directories = list((server.data_dir / "vms").iterdir())
    assert len(directories) == 5, directories  # those of the keys, and no ready VM's
    for pid in killed:
        assert not list(Path("/sys/fs/cgroup").glob(f"**/agentos-*-{pid}-*"))


def test_many_actions_under_way(start_server: Any) -> None:
    """On many keys at once: what was answered is there, what was not says that the VM stopped; then all go on."""
    server = start_server()
    for turn in range(3):
        keys = [f"k{turn}-{number}" for number in range(16)]

        def write(key: str) -> Any:
            with server.client() as http:
                return http.post(
                    server.path(key, "action/exec"), json={"args": ["echo written >> f; echo done"]}
                )

        with ThreadPoolExecutor(16) as threads:
            answers = [threads.submit(write, key) for key in keys]
            time.sleep(0.02 * turn)
            kill_zygote(server)
            found = {key: answer.result(30) for key, answer in zip(keys, answers, strict=True)}
        for key, answer in found.items():
            if answer.status_code == 200:
                result = answer.json()["output"]
                assert result["reason"] in ("exited", "vmStopped")
                written = result["stdout"] == "done\n"
            else:
                assert (answer.json()["group"], answer.json()["code"]) == ("vm", "stopped"), answer.text
                written = False
            server.post(
                key, "exec", "true"
            )  # it may have booted before the kill, and nobody have noticed yet
            server.call(key, "exec", "echo again >> f")
            lines = server.call(key, "exec", "cat f")["stdout"].split()
            assert lines[-1] == "again"
            assert not written or "written" in lines, lines
    assert server.close() == 0


def test_connections_are_told(start_server: Any) -> None:
    """vmShutdown with the reason error, and vmBooted when the next action comes, on the same connection."""
    server = start_server()

    async def main() -> list[tuple[str, Any]]:
        told: list[tuple[str, Any]] = []
        async with connected(server, "k") as caller:
            await caller.subscribe("vmShutdown")
            await caller.subscribe("vmBooted")
            await caller.call("exec", "echo 1 > f")
            kill_zygote(server)
            while ("vmShutdown", {"reason": "error"}) not in told:
                message = await caller.receive()
                if isinstance(message, Event):
                    told.append((message.name, message.args[0]))
            await caller.send("exec", "cat f")
            while told[-1][0] != "vmBooted" or not isinstance(message, ActionResponse):
                message = await caller.receive()
                if isinstance(message, Event):
                    told.append((message.name, message.args[0]))
            assert message.output["stdout"] == "1\n"
        return told

    told = asyncio.run(main())
    assert told[-2:] == [("vmShutdown", {"reason": "error"}), ("vmBooted", {})]


def test_a_server_can_end_without_its_zygote(start_server: Any) -> None:
    """At once, with nothing left; and the next one has the directory."""
    server = start_server("--pool", "2")
    server.call("k", "exec", "echo kept > f; sync")
    server.call("k", "spawn", "sleep", [MARK])
    pid = kill_zygote(server)
    assert server.close() == 0
    assert guests() == []
    assert len(list((server.data_dir / "vms").iterdir())) == 1
    assert not list(Path("/sys/fs/cgroup").glob(f"**/agentos-*-{pid}-*"))
    assert start_server().call("k", "exec", "cat f")["stdout"] == "kept\n"


def test_the_next_server_waits_for_the_vms_of_the_second_zygote(start_server: Any) -> None:
    """That one holds the directory's lock as the first did."""
    server = start_server()
    server.call("k", "exec", "true")
    kill_zygote(server)
    wait_until(lambda: not runs(server, "k"))
    server.call("k", "spawn", "sleep", [MARK])
    server.kill()
    again = start_server()
    assert guests() == []
    assert again.call("k", "exec", "echo works")["stdout"] == "works\n"
