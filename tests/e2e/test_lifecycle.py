"""Processes and VMs come and go: waits, retention, reaping, no leaks, nothing left of a host that was killed."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_support import (
    Transcript,
    as_root,
    commands,
    descendants,
    ended,
    host_processes,
    one_id,
    open_descriptors,
    parent_of,
    status_of,
    still_works,
)

from agentos import VM, Host, Limits
from agentos.errors import InvalidRequest, ProcessNotFound, SpawnFailed, VmStopped, WaitTimeout

MIB = 1024 * 1024


def test_any_number_of_waiters(in_vm: Any) -> None:
    """Fifty waits, begun before and after the end, all get the exit code."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "read go; exit 42"])
        waits = [asyncio.create_task(vm.wait_process(process.pid)) for _ in range(50)]
        await process.write_stdin("go\n")
        assert await asyncio.gather(*waits) == [42] * 50
        assert await process.wait() == 42
        assert await process.wait(0) == 42

    in_vm(body)


def test_a_wait_that_ends_early_ends_only_the_waiting(in_vm: Any) -> None:
    """WaitTimeout, which is a TimeoutError, names pid and time; the process and other waits go on."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "read go; exit 3"])
        other = asyncio.create_task(process.wait())
        for limit in (0, 0.05):
            with pytest.raises(WaitTimeout) as caught:
                await process.wait(limit)
            assert caught.value.details == {"pid": process.pid, "timeout": limit}
        cancelled = asyncio.create_task(process.wait())
        await asyncio.sleep(0)
        cancelled.cancel()
        assert process.running
        await process.write_stdin("go\n")
        assert await other == 3

    in_vm(body)


def test_listing_and_getting(in_vm: Any) -> None:
    """Spawned processes are listed oldest first, running and exited, with what they were started with."""

    async def body(vm: VM) -> None:
        first = await vm.spawn("sh", ["-c", "exit 5"])
        second = await vm.spawn("sleep", ["1000"])
        await vm.exec("true")  # an exec is no spawned process
        await first.wait()
        one, two = await vm.list_processes()
        assert (one.pid, one.command, one.args) == (first.pid, "sh", ("-c", "exit 5"))
        assert (one.running, one.exit_code, one.reason, one.signal) == (False, 5, "exited", None)
        assert one.exit_time is not None
        assert one.exit_time >= one.start_time
        assert (two.pid, two.running, two.exit_code, two.reason) == (second.pid, True, None, None)
        await second.kill()
        await second.wait()
        gone = await vm.get_process(second.pid)
        assert (gone.running, gone.exit_code, gone.signal, gone.reason) == (
            False,
            137,
            "SIGKILL",
            "signaled",
        )

    in_vm(body)


def test_the_process_table_is_that_of_the_vm(in_vm: Any) -> None:
    """Pids are those that ps shows inside; parents, users, directories and drivers are told; init is hidden."""

    async def body(vm: VM) -> None:
        script = "cd /tmp; python3 -c 'print(1, flush=True); import time; time.sleep(1000)' & wait"
        process = await vm.spawn("sh", ["-c", script])
        root = await vm.spawn("sleep", ["1000"], user="root")
        await Transcript(process).until(b"1\n")
        table = {one.pid: one for one in await vm.all_processes()}
        assert table[process.pid].managed
        assert table[process.pid].driver == "native"
        assert table[root.pid].user == ("agentos" if await one_id(vm) else "root")
        (child,) = [one for one in table.values() if one.ppid == process.pid]
        assert (child.driver, child.user, child.cwd, child.managed) == ("python", "agentos", "/tmp", False)
        assert child.rss_bytes > 0
        assert child.threads == 1
        assert child.pgid == child.sid == process.pid
        assert set(table) == {process.pid, child.pid, root.pid}
        tree = {node.process.pid: node for node in await vm.process_tree()}
        assert set(tree) == {process.pid, root.pid}
        assert [node.process.pid for node in tree[process.pid].children] == [child.pid]
        shown = (await vm.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")).stdout
        assert "print(1" in shown

    in_vm(body)


def test_exited_processes_are_remembered_up_to_a_bound(in_vm: Any) -> None:
    """The oldest exited one is forgotten first, by then ProcessNotFound; a running one never is."""

    async def body(vm: VM) -> None:
        runs = await vm.spawn("sleep", ["1000"])
        spawned = []
        for number in range(8):
            process = await vm.spawn("sh", ["-c", f"echo {number}; exit {number}"])
            await process.wait()
            spawned.append(process)
        known = [one.pid for one in await vm.list_processes()]
        assert known == [runs.pid, *(one.pid for one in spawned[-3:])]
        for number, process in enumerate(spawned):
            if number < 5:
                with pytest.raises(ProcessNotFound):
                    await vm.wait_process(process.pid)
            else:
                assert await vm.wait_process(process.pid) == number
                page = await vm.read_process_output(process.pid)
                assert page.events[0].data == b"%d\n" % number
        assert await spawned[0].wait() == 0  # whoever has the handle may still ask it

    in_vm(body, limits=Limits(exited_processes=3))


def test_a_first_caller_who_is_cancelled_takes_nobody_along(in_vm: Any) -> None:
    """The second with the same key gets the process that was being started."""

    async def body(vm: VM) -> None:
        first = asyncio.create_task(vm.spawn("sleep", ["1000"], idempotency_key="k"))
        second = asyncio.create_task(vm.spawn("sleep", ["1000"], idempotency_key="k"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).running
        assert first.cancelled()
        assert len(await vm.list_processes()) == 1

    in_vm(body)


def test_an_idempotency_key_starts_one_process(in_vm: Any) -> None:
    """The same key gives the same process, at once or later, even exited; another key another one."""

    async def body(vm: VM) -> None:
        spawned = await asyncio.gather(
            *(
                vm.spawn("sh", ["-c", "echo x >> /tmp/runs; sleep 1000"], idempotency_key="k")
                for _ in range(10)
            )
        )
        assert len({one.pid for one in spawned}) == 1
        await Transcript(await vm.spawn("sh", ["-c", "tail -f /tmp/runs"])).until(b"x\n")
        await spawned[0].kill()
        await spawned[0].wait()
        again = await vm.spawn("sh", ["-c", "echo x >> /tmp/runs; sleep 1000"], idempotency_key="k")
        assert again.pid == spawned[0].pid
        assert (await vm.spawn("true", idempotency_key="other")).pid != spawned[0].pid
        with pytest.raises(SpawnFailed):
            await vm.spawn("/no/such", idempotency_key="failed")
        await (await vm.spawn("true", idempotency_key="failed")).wait()
        assert (await vm.exec("wc -l < /tmp/runs")).stdout.strip() == "1"

    in_vm(body)


def test_a_key_of_another_request_is_refused_while_that_one_starts(in_vm: Any) -> None:
    """At once, and the one that starts is not disturbed; one that failed leaves its key free for anything."""

    async def body(vm: VM) -> None:
        first = asyncio.create_task(vm.spawn("sleep", ["1000"], idempotency_key="k"))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="idempotency_key"):
            await vm.spawn("sleep", ["1001"], idempotency_key="k")
        assert not first.done()
        assert (await first).running
        with pytest.raises(SpawnFailed):
            await vm.spawn("/no/such", idempotency_key="failed")
        await (await vm.spawn("true", idempotency_key="failed")).wait()
        assert [one.args for one in await vm.list_processes()] == [("1000",), ()]

    in_vm(body)


def _growth_of(count: int) -> None:
    """In an interpreter of its own: memory of this one is used and given back by all the tests before."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("growth.py")), str(count)],
        capture_output=True, text=True, timeout=170,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_thousand_spawns_leave_nothing() -> None:
    """1,000 spawns leave no zombie, no descriptor and no growth in host, zygote or VM."""
    _growth_of(1000)


@pytest.mark.timeout(180)
def test_ten_thousand_spawns_leave_nothing() -> None:
    """10,000 spawns leave no more than 1,000 do."""
    _growth_of(10_000)


def test_orphans_are_reaped(in_vm: Any) -> None:
    """Five hundred processes whose parents ended before them leave no zombie."""

    async def body(vm: VM) -> None:
        script = "for i in $(seq 500); do (sleep 0.0$((i % 10)) & ) ; done"
        result = await vm.exec(script, on_leader_exit="wait")
        assert result.exit_code == 0
        while table := await vm.all_processes():
            assert len(table) < 500
        await still_works(vm)

    in_vm(body)


def test_many_vms_come_and_go(run: Any) -> None:
    """Thirty VMs, one after another and ten at once, leave no descriptor and no process."""

    async def one(host: Host, number: int) -> None:
        async with VM(host=host) as vm:
            assert (await vm.exec(f"echo {number}")).stdout == f"{number}\n"
            await vm.spawn("sleep", ["1000"])
            await vm.open_shell()

    async def main() -> None:
        async with Host() as host:
            await one(host, 0)
            descriptors, processes = open_descriptors(), len(descendants(os.getpid()))
            for number in range(20):
                await one(host, number)
            await asyncio.gather(*(one(host, number) for number in range(10)))
            assert open_descriptors() == descriptors
            assert len(descendants(os.getpid())) == processes

    run(main)


def test_a_host_that_is_dropped_ends(run: Any) -> None:
    """Its zygote too, and what that has ready, and what it was to hold; dropping a closed one says nothing."""

    async def main() -> None:
        before = descendants(os.getpid())
        async with Host() as closed:
            pass
        del closed
        host = Host(pool=1)
        await host.ready()
        await host.hold("this", 0)
        async with VM(host=host) as vm:
            await still_works(vm)
        del vm
        await asyncio.sleep(0.1)  # its last timer has it until then
        gc.collect()
        left = sorted(set(descendants(os.getpid())) - set(before))
        assert left
        with pytest.warns(ResourceWarning, match="unclosed host <agentos.host.Host"):
            del host
        await ended(left)

    run(main)


FORKED = """
import asyncio, gc, os
from agentos import VM, Host
async def main():
    global host
    host = Host()
    async with VM(host=host) as vm:
        child = os.fork()
        if not child:
            host.vms.clear()
            host.__del__()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print((await vm.exec("echo alive")).stdout, end="")
    await host.close()
asyncio.run(main())
"""


def test_a_forked_process_drops_nothing_of_its_parents() -> None:
    """It has the same host, and its VMs, only in name."""
    command = [
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        "-W",
        "error::ResourceWarning",
        "-c",
        FORKED,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("alive\n", "", 0)


def test_when_a_vm_is_closed_nothing_of_it_runs(run: Any) -> None:
    """close returns when every process of the VM is gone from the host, and works twice."""
    marker = f"987{os.getpid()}"

    async def main() -> None:
        vm = await VM().start()
        await vm.exec(f"setsid sleep {marker} & disown; sleep {marker} & true")
        process = await vm.spawn("sleep", [marker])
        waiting = asyncio.create_task(process.wait_status())
        while len(host_processes(marker)) < 3:  # noqa: ASYNC110  # the table of processes has no event
            await asyncio.sleep(0.01)  # what bash left behind may not be a sleep yet
        await vm.close()
        assert host_processes(marker) == []
        status = await waiting
        assert (status.exit_code, status.reason) == (137, "vmStopped")
        await vm.close()
        assert not vm.running
        with pytest.raises(VmStopped):
            await vm.exec("true")

    run(main)


def test_closing_while_much_goes_on(run: Any) -> None:
    """Closing a VM amid execs, spawns, reads, writes, shells and files ends each of them, typed."""

    async def main() -> None:
        async with VM() as vm:
            process = await vm.spawn("cat")
            shell = await vm.open_shell()
            tasks = [asyncio.create_task(one) for one in (
                vm.exec("sleep 1000"), vm.exec("cat", stdin="x"), process.wait(), process.read_output(wait=1000),
                Transcript(process).to_end(), shell.wait(), Transcript(shell).to_end(), vm.spawn("sleep", ["1000"]),
                vm.open_shell(), vm.all_processes(), process.kill(), vm.files.read_file("/etc/passwd"),
                vm.stop_process(process.pid, kill_after=1000),
            )]  # fmt: skip
            await asyncio.sleep(0)
            await vm.close()
            done, pending = await asyncio.wait(tasks, timeout=10)
            assert not pending
            for task in done:
                error = task.exception()
                assert error is None or isinstance(error, VmStopped), repr(error)

    run(main)


def test_init_killed_from_the_host_is_a_stopped_vm(run: Any) -> None:
    """When a VM's init dies, what runs ends as vmStopped, on_stopped is called, and other VMs go on."""

    async def main() -> None:
        async with Host() as host, VM(host=host) as vm, VM(host=host) as other:
            stopped = asyncio.get_running_loop().create_future()
            vm.on_stopped = lambda: stopped.set_result(None)
            marker = f"986{os.getpid()}"
            running = asyncio.create_task(vm.exec(f"sleep {marker}"))
            while not (found := host_processes(marker)):
                await vm.all_processes()
            pid = found[0]
            while len(status_of(pid)["NSpid"].split()) > 1 and status_of(pid)["NSpid"].split()[-1] != "1":
                pid = int(status_of(pid)["PPid"])
            os.kill(pid, signal.SIGKILL)
            assert (await running).reason == "vmStopped"
            await stopped
            with pytest.raises(VmStopped):
                await vm.exec("true")
            await vm.close()
            assert host_processes(marker) == []
            await still_works(other)

    run(main)


CHILD = '''
import asyncio, json, sys
from agentos import VM
marker = sys.argv[1]
DAEMON = """
import os, sys
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 99)
    if os.fork() == 0:
        os.execlp("sleep", "sleep", sys.argv[1])
"""
async def main():
    vms = [await VM().start() for _ in range(2)]
    for vm in vms:
        await vm.exec(f"setsid sleep {marker} & disown; sleep {marker} &")
        await vm.spawn("sh", ["-c", f"while :; do sleep {marker}; done"])
        shell = await vm.open_shell()
        await shell.write(f"sleep {marker}; echo never\\n")
        async for chunk in shell.output():
            if b"sleep" in chunk.data:
                break
        asyncio.create_task(vm.exec(f"sleep {marker}"))
        await vm.exec_file("python3", ["-c", DAEMON, marker])
    print("up", flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
'''


async def _of_a_killed_child(
    marker: str,
    kill: Callable[[asyncio.subprocess.Process, list[int]], Awaitable[None]],
    *,
    cgroups_stay: bool = False,
) -> None:
    source = str(Path(sys.modules["agentos"].__file__ or "").parents[1])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CHILD,
        marker,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    )
    try:
        await _see_it_killed(process, marker, kill, cgroups_stay=cgroups_stay)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def _see_it_killed(
    process: asyncio.subprocess.Process,
    marker: str,
    kill: Callable[[asyncio.subprocess.Process, list[int]], Awaitable[None]],
    *,
    cgroups_stay: bool,
) -> None:
    assert process.stdout
    assert process.stderr
    line = await process.stdout.readline()
    assert line == b"up\n", (await process.stderr.read()).decode()
    below = descendants(process.pid)
    guests = host_processes(marker)
    assert len([pid for pid in guests if pid in below]) >= 8
    groups = cgroups_of(below)
    await kill(process, below)
    await process.wait()
    await ended(below)
    assert [pid for pid in host_processes(marker) if pid != process.pid] == []
    if not cgroups_stay:  # what a zygote that was killed has left, the next one removes
        assert [one for one in groups if one.exists()] == []


def cgroups_of(pids: list[int]) -> set[Path]:
    """The directories of the cgroups that were made for the VMs of these processes."""
    found = set()
    mounted = re.findall(r"^\S+ (\S+) cgroup", Path("/proc/mounts").read_text(), re.MULTILINE)
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        except OSError:
            continue  # it has ended meanwhile
        for line in lines:
            path = line.split(":", 2)[2]
            if "agentos" in path:
                found |= {Path(top + path) for top in mounted if Path(top + path).is_dir()}
                found |= {Path(top + path).parent for top in mounted if Path(top + path).is_dir()}
    return {one for one in found if "agentos" in one.name or "agentos" in one.parent.name}


def test_a_killed_host_process_leaves_nothing(run: Any) -> None:
    """kill -9 of the Python process that has VMs ends every guest process, and no mount or cgroup stays."""
    mounts = Path("/proc/self/mountinfo").read_text()

    async def kill(process: asyncio.subprocess.Process, below: list[int]) -> None:
        if os.geteuid() == 0:
            assert cgroups_of(below), "the VMs have no cgroups"
        process.kill()

    async def main() -> None:
        await _of_a_killed_child(f"985{os.getpid()}", kill)

    run(main)
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_a_killed_zygote_leaves_nothing(run: Any) -> None:
    """kill -9 of the zygote ends every guest process too; the host process then ends in its own time."""

    async def kill(process: asyncio.subprocess.Process, below: list[int]) -> None:
        (zygote,) = [pid for pid in below if parent_of(pid) == process.pid]
        os.kill(zygote, signal.SIGKILL)
        await ended(below)
        process.kill()

    async def main() -> None:
        await _of_a_killed_child(f"984{os.getpid()}", kill, cgroups_stay=True)

    run(main)


ISOLATION = """
import ctypes, json, os, socket, sys
found = {}
name = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
found["host"] = socket.gethostname()
found["file"] = os.path.exists("/tmp/mine"); open("/tmp/mine", "w").write(name)
for kind, address in (("abstract", "\\0mine"), ("port", ("127.0.0.1", 4711))):
    family = socket.AF_UNIX if kind == "abstract" else socket.AF_INET
    try:
        socket.socket(family).connect(address); found[kind] = True
    except OSError:
        found[kind] = False
    listener = socket.socket(family); listener.bind(address); listener.listen(); globals()[kind] = listener
found["shm"] = libc.shmget(4711, 4096, 0o600) >= 0
assert libc.shmget(4711, 4096, 0o1600) >= 0, os.strerror(ctypes.get_errno())
found["mq"] = os.path.exists("/dev/mqueue/mine")
libc.mq_open(b"/mine", 0o102, 0o600, None)
found["queue_made"] = os.path.exists("/dev/mqueue/mine")
found["dev_shm"] = os.path.exists("/dev/shm/mine"); open("/dev/shm/mine", "w").close()
found["processes"] = sorted(int(one) for one in os.listdir("/proc") if one.isdecimal())
print(json.dumps(found), flush=True)
sys.stdin.read()
"""


def test_two_vms_do_not_see_one_another(run: Any) -> None:
    """Files, processes, host names, abstract sockets, ports, System V memory, message queues: each VM has its own."""

    async def main() -> None:
        async with VM(hostname="one") as one, VM(hostname="two") as two:
            answers = []
            for vm in (one, two):
                process = await vm.spawn("python3", ["-c", ISOLATION, vm.spec.hostname])
                match = await Transcript(process).until(rb"\{.*\}\n")
                answers.append(json.loads(match[0]))
            for answer, name in zip(answers, ("one", "two"), strict=True):
                assert answer.pop("host") == name
                assert answer.pop("queue_made")
                pids = answer.pop("processes")
                assert len(pids) <= 4
                assert not any(answer.values()), answer
            await one.exec("kill -9 -1")
            assert len(await commands(two)) == 1
            assert (await two.exec("cat /tmp/mine")).stdout == "two"

    run(main)


def test_a_vm_is_started_once(run: Any) -> None:
    """start twice is InvalidRequest; verbs before the start are VmStopped; close before the start does nothing."""

    async def main() -> None:
        vm = VM()
        await vm.close()
        with pytest.raises(VmStopped):
            await vm.exec("true")
        async with vm:
            with pytest.raises(ValueError):
                await vm.start()
            await still_works(vm)

    run(main)


@as_root
def test_a_vm_whose_host_is_closed_is_stopped(run: Any) -> None:
    """Closing the host ends its VMs, and what runs in them with vmStopped."""

    async def main() -> None:
        host = Host()
        vm = await VM(host=host).start()
        running = asyncio.create_task(vm.exec("sleep 1000"))
        await vm.exec("true")
        await host.close()
        assert (await running).reason == "vmStopped"
        await vm.close()

    run(main)


def test_the_status_is_there_when_a_kill_returns(in_vm: Any) -> None:
    """The kill and the end are told by two processes of the VM: whoever is first must not matter."""

    async def body(vm: VM) -> None:
        for _ in range(30):
            process = await vm.spawn("bash", ["-c", "sleep 1000 & sleep 1000"])
            await vm.kill_process(process.pid)
            info = await vm.get_process(process.pid)
            assert (info.running, info.exit_code, info.signal) == (False, 137, "SIGKILL")

    in_vm(body)
