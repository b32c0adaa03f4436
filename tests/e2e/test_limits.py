"""Limits: each is contained and named, and a VM that ran into one works on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import pytest
from attacks import ATTACKS, BY_NAME, LIMITS, Attack
from e2e_support import Transcript, as_root, commands, one_id, open_descriptors, still_works

from agentos import VM, Limits
from agentos.errors import LimitExceeded, NoSpace
from agentos.machine import alarms
from agentos.model import LimitReached

MIB = 1024 * 1024


@as_root
def test_memory(in_vm: Any) -> None:
    """All processes of a VM together get no more than memory_bytes; who asks for more is killed, others are not."""

    async def body(vm: VM) -> None:
        quiet = await vm.spawn("sleep", ["1000"])
        eat = "x = bytearray(40 << 20); x[::4096] = b'x' * len(x[::4096]); print('have', flush=True); input()"
        processes = [await vm.spawn("python3", ["-c", eat]) for _ in range(6)]
        done, _ = await asyncio.wait(
            [asyncio.create_task(one.wait_status()) for one in processes], return_when=asyncio.FIRST_COMPLETED
        )
        assert {one.result().reason for one in done} == {"oom"}
        for one in processes:
            await one.kill()
        assert quiet.running
        await still_works(vm)

    in_vm(body, limits=Limits(memory_bytes=96 * MIB, disk_bytes=16 * MIB, shm_bytes=8 * MIB))


def test_processes(in_vm: Any) -> None:
    """Forking ends with EAGAIN near the limit, for one user as for both, and the VM can still be used."""

    async def body(vm: VM) -> None:
        script = (
            "import os, errno, time\n"
            "count = 0\n"
            "try:\n"
            "    while count < 1000:\n"
            "        if os.fork() == 0: time.sleep(1000)\n"
            "        count += 1\n"
            "except OSError as error: print(count, errno.errorcode[error.errno], flush=True)\n"
            "time.sleep(1000)\n"
        )
        process = await vm.spawn("python3", ["-c", script])
        found = await Transcript(process).until(rb"(\d+) (\w+)\n")
        assert found[2] == b"EAGAIN"
        assert 20 <= int(found[1]) <= 40
        await process.kill()
        assert await commands(vm) == []
        await still_works(vm)

    in_vm(body, limits=Limits(processes=40))


def test_open_files(in_vm: Any) -> None:
    """A process that opens without end gets EMFILE at the limit."""

    async def body(vm: VM) -> None:
        script = (
            "import os, errno\n"
            "try:\n"
            "    while True: last = os.open('/dev/null', 0)\n"
            "except OSError as error: print(last, errno.errorcode[error.errno])\n"
        )
        assert (await vm.exec_file("python3", ["-c", script])).stdout == "99 EMFILE\n"
        assert (await vm.exec("ulimit -n 200")).exit_code != 0
        await still_works(vm)

    in_vm(body, limits=Limits(open_files=100))


def test_disk_bytes(in_vm: Any) -> None:
    """A full disk is ENOSPC to the program, the next command works, and deleting makes room again."""

    async def body(vm: VM) -> None:
        for path in ("big", "/var/tmp/big", "/tmp/big"):
            result = await vm.exec(f"dd if=/dev/zero of={path} bs=1M count=200")
            assert result.exit_code == 1
            assert "No space left on device" in result.stderr
            await still_works(vm)
            size = int((await vm.exec(f"stat -c %s {path}; rm {path}")).stdout)
            assert 28 * MIB <= size <= 33 * MIB
        assert (await vm.exec("dd if=/dev/zero of=big bs=1M count=20 2>&1")).exit_code == 0

    in_vm(body, limits=Limits(disk_bytes=32 * MIB))


def test_disk_files(in_vm: Any) -> None:
    """Files without number end with ENOSPC, and the next command works."""

    async def body(vm: VM) -> None:
        script = (
            "import errno\n"
            "try:\n"
            "    for n in range(100000): open(f'file{n}', 'w').close()\n"
            "except OSError as error: print(n, errno.errorcode[error.errno])\n"
        )
        number, error = (await vm.exec_file("python3", ["-c", script])).stdout.split()
        assert error == "ENOSPC"
        assert 1000 <= int(number) <= 2000
        await still_works(vm)
        assert (await vm.exec("rm file*; touch again")).exit_code == 0

    in_vm(body, limits=Limits(disk_files=2000))


def test_shared_memory(in_vm: Any) -> None:
    """/dev/shm holds no more than shm_bytes."""

    async def body(vm: VM) -> None:
        result = await vm.exec("dd if=/dev/zero of=/dev/shm/x bs=1M count=50")
        assert "No space left on device" in result.stderr
        assert (await vm.exec("stat -c %s /dev/shm/x")).stdout == f"{8 * MIB}\n"
        await still_works(vm)

    in_vm(body, limits=Limits(shm_bytes=8 * MIB))


@as_root
def test_cpu(in_vm: Any) -> None:
    """With a quarter of a core, two seconds of two busy loops use about half a second of CPU."""

    async def body(vm: VM) -> None:
        result = await vm.exec("(while :; do :; done) & while :; do :; done", timeout=2)
        assert result.reason == "timeout"
        script = "import time; a = time.monotonic(); b = time.process_time()\nwhile time.monotonic() - a < 2: pass\n"
        result = await vm.exec_file("python3", ["-c", script + "print(time.process_time() - b)"])
        assert 0.2 < float(result.stdout) < 1.0

    in_vm(body, limits=Limits(cpu_cores=0.25))


def test_no_priority_over_others_is_passed_on(in_vm: Any) -> None:
    """A program has the host's nice value, as what it starts has; what lets it start sooner ends with it."""
    show = (
        "print(os.getpriority(os.PRIO_PROCESS, 0), bool(os.sched_getscheduler(0) & os.SCHED_RESET_ON_FORK))"
    )
    source = f"import os\nif os.fork(): os.wait()\n{show}"

    async def body(vm: VM) -> None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        for user in ("agentos", "root"):
            result = await vm.exec_file("python3", ["-c", source], user=user)
            assert result.stdout == f"{nice} False\n{nice} True\n"

    in_vm(body)


def test_live_processes(in_vm: Any) -> None:
    """Beyond live_processes a spawn or exec is refused, naming the limit; an end makes room."""

    async def body(vm: VM) -> None:
        processes = [await vm.spawn("cat") for _ in range(3)]
        for call in (vm.spawn("true"), vm.exec("true"), vm.exec_file("true")):
            with pytest.raises(LimitExceeded) as caught:
                await call
            assert caught.value.details == {"limit": "live_processes", "value": 4, "maximum": 3}
            assert "Limits(live_processes=...)" in caught.value.message
        await processes[0].close_stdin()
        await processes[0].wait()
        await still_works(vm)
        results = await asyncio.gather(*(vm.spawn("cat") for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(one, LimitExceeded) for one in results) == 4

    in_vm(body, limits=Limits(live_processes=3))


def test_pipes_of_background_children_are_bounded(in_vm: Any) -> None:
    """A hundred background children that hold their pipes cost no more than the bound of descriptors here."""

    async def body(vm: VM) -> None:
        await vm.exec("true")
        before = open_descriptors()
        for _ in range(100):
            assert (await vm.exec("sleep 1000 & true")).orphans
        assert open_descriptors() - before <= 13  # what waits for the kernel to tell of limits, too
        await still_works(vm)

    in_vm(body, alone=True, limits=Limits(background_pipes=8))


def test_commands_start_where_the_guest_has_used_up_its_processes(in_vm: Any) -> None:
    """A command, a spawn and a shell start beside a fork bomb, and may fork a little; beyond that it is said."""

    async def body(vm: VM) -> None:
        bomb = await vm.spawn("python3", ["-c", _FORK_BOMB])
        await Transcript(bomb).until(b"full")
        for user in ("agentos", "root"):
            result = await vm.exec("true; /bin/echo ok; ulimit -u", user=user)
            assert result.stdout.split() in (["ok", "46"], ["ok", "30"])
        process = await vm.spawn("cat")
        await process.write_stdin("hello")
        await process.close_stdin()
        assert await process.wait() == 0
        shell = await vm.open_shell("cat")
        await shell.close()
        # A second bomb takes the reserve of the programs, and then it is used up.
        more = [asyncio.create_task(vm.exec_file("sleep", ["1000"])) for _ in range(60)]
        done, pending = await asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED)
        error = next(iter(done)).exception()
        assert isinstance(error, LimitExceeded)
        assert error.details == {"limit": "processes", "value": 31, "maximum": 30}
        for task in pending:
            task.cancel()
        await asyncio.gather(*more, return_exceptions=True)
        await bomb.kill()
        await still_works(vm)

    in_vm(body, limits=Limits(processes=30))


def test_terminals(in_vm: Any) -> None:
    """A VM has no more terminals than its limit, whoever opens them; the host's others stay free."""

    async def body(vm: VM) -> None:
        shells = [await vm.open_shell("cat") for _ in range(3)]
        with pytest.raises(LimitExceeded) as caught:
            await vm.open_shell("cat")
        assert caught.value.details == {"limit": "terminals", "value": 4, "maximum": 3}
        await shells[0].close()
        last = await vm.open_shell("cat")
        script = "import os\ntry: os.open('/dev/ptmx', os.O_RDWR)\nexcept OSError as e: print(e.errno)"
        assert (await vm.exec_file("python3", ["-c", script])).stdout == "28\n"
        for shell in (*shells, last):
            await shell.close()
        await still_works(vm)

    in_vm(body, limits=Limits(terminals=3))


@as_root
def test_what_a_user_may_have_is_counted_for_each_vm(run: Any) -> None:
    """inotify instances and message queues that one VM has taken are not missing in another."""

    async def main() -> None:
        async with VM() as greedy, VM() as other:
            script = (
                "import ctypes, time\nlibc = ctypes.CDLL(None)\n"
                "while libc.inotify_init1(0) >= 0: pass\n"
                "queues = 0\n"
                "while libc.mq_open(b'/q%d' % queues, 0o102, 0o600, None) >= 0: queues += 1\n"
                "print('full', queues, flush=True)\n"
                "time.sleep(1000)\n"
            )
            for vm in (greedy, other):
                process = await vm.spawn("python3", ["-c", script])
                found = await Transcript(process).until(rb"full (\d+)")
                assert int(found[1]) >= 1

    run(main)


def test_a_limit_that_is_reached_is_told(in_vm: Any) -> None:
    """Once for a burst, with the limit, its value and how to raise it; and counted."""

    async def body(vm: VM) -> None:
        told: asyncio.Queue[LimitReached] = asyncio.Queue()
        vm.on_limit = told.put_nowait
        assert vm.limits_hit == {}
        bomb = await vm.spawn("python3", ["-c", _FORK_BOMB])
        await Transcript(bomb).until(b"full")
        for _ in range(3):
            await still_works(vm)
        first = await told.get()
        assert (first.limit, first.value) == ("processes", 30)
        assert "Limits(processes=...)" in first.message
        await bomb.kill()
        result = await vm.exec("yes")
        assert (result.reason, result.limit) == ("outputLimit", "runaway_bytes")
        while (one := await told.get()).limit == "processes":
            pass  # a bomb that goes on for more than a second is told again
        assert (one.limit, one.value, one.command) == ("runaway_bytes", 4 * MIB, "yes")
        held = [await vm.spawn("cat") for _ in range(4)]
        with pytest.raises(LimitExceeded):
            await vm.spawn("cat")
        assert (await told.get()).limit == "live_processes"
        for process in held:
            await process.kill()
        assert set(vm.limits_hit) == {"processes", "runaway_bytes", "live_processes"}
        assert vm.limits_hit["runaway_bytes"] == 1

    in_vm(body, limits=Limits(processes=30, runaway_bytes=4 * MIB, live_processes=4))


@as_root
def test_the_kernel_tells_of_a_limit_that_no_command_meets(in_vm: Any) -> None:
    """A child that the kernel ends for its memory is heard of without any call; the VM is itself again afterwards."""

    async def body(vm: VM) -> None:
        told: asyncio.Queue[LimitReached] = asyncio.Queue()
        vm.on_limit = told.put_nowait
        memory = await vm.spawn("python3", ["-c", BY_NAME["memory"].source])
        one = await told.get()
        assert (one.limit, one.value, one.pid) == ("memory_bytes", LIMITS.memory_bytes, None)
        await memory.kill()
        bomb = await vm.spawn("python3", ["-c", _FORK_BOMB])
        while (one := await told.get()).limit == "memory_bytes":
            pass
        assert (one.limit, one.value) == ("processes", LIMITS.processes)
        await bomb.kill()
        assert vm._cgroup is not None
        await still_works(vm)
        while vm._cgroup.limits["pids"] != LIMITS.processes:
            await still_works(
                vm
            )  # what was killed is counted until the kernel has freed it: taken back at a later end

    in_vm(body, limits=LIMITS)


def test_a_full_disk_is_told(in_vm: Any) -> None:
    """By the program that has filled it, when that ends, and by the file action that finds no room."""

    async def body(vm: VM) -> None:
        told: asyncio.Queue[LimitReached] = asyncio.Queue()
        vm.on_limit = told.put_nowait
        assert (await vm.exec("dd if=/dev/zero of=big bs=1M count=5")).ok
        assert vm.limits_hit == {}
        assert not (await vm.exec("dd if=/dev/zero of=big bs=1M count=20")).ok
        one = await told.get()
        assert (one.limit, one.value) == ("disk_bytes", 8 * MIB)
        assert "Limits(disk_bytes=...)" in one.message
        await asyncio.sleep(1)  # a burst is told once: the next would be another
        for _ in range(3):
            await vm.exec("echo more >more")
        assert vm.limits_hit == {"disk_bytes": 1}
        await vm.exec("rm big")
        process = await vm.spawn("sh", ["-c", "i=0; while : >f$i; do i=$((i+1)); done"])
        await process.wait()
        one = await told.get()
        assert (one.limit, one.value) == ("disk_files", 400)
        with pytest.raises(NoSpace) as caught:
            await vm.files.mkdir("one/more", parents=True)
        assert caught.value.details["limit"] == "disk_files"
        await vm.exec("rm f*")
        await asyncio.sleep(1)
        with pytest.raises(NoSpace):
            await vm.files.write_file("big", bytes(9 * MIB))
        assert (await told.get()).limit == "disk_bytes"
        assert vm.limits_hit == {"disk_bytes": 2, "disk_files": 1}
        await asyncio.sleep(1)
        with pytest.raises(NoSpace) as caught:
            await vm.files.write_file("/dev/shm/big", bytes(9 * MIB))
        assert "limit" not in caught.value.details
        assert vm.limits_hit == {"disk_bytes": 2, "disk_files": 1}

    in_vm(body, limits=Limits(disk_bytes=8 * MIB, disk_files=400, shm_bytes=MIB))


@as_root
def test_a_process_limit_that_only_a_program_meets_is_told(in_vm: Any) -> None:
    """At the latest when that program ends, spawned, in an exec or in a shell: no command has to meet it too."""

    async def body(vm: VM) -> None:
        told: asyncio.Queue[LimitReached] = asyncio.Queue()
        vm.on_limit = told.put_nowait
        script = (
            "import os, time\ntry:\n while os.fork(): pass\n time.sleep(1000)\nexcept OSError: os.kill(0, 9)"
        )
        process = await vm.spawn("python3", ["-c", script])
        await process.wait()
        assert ((await told.get()).limit, vm.limits_hit) == ("processes", {"processes": 1})
        await asyncio.sleep(1)  # a burst is told once: the next is another
        assert (await vm.exec_file("python3", ["-c", script])).signal == "SIGKILL"
        assert (await told.get()).limit == "processes"
        await asyncio.sleep(1)
        shell = await vm.open_shell("python3", ["-c", script])
        await shell.wait()
        assert (await told.get()).limit == "processes"
        assert vm.limits_hit == {"processes": 3}

    in_vm(body, limits=LIMITS)


@as_root
def test_what_a_program_leaves_behind_meets_the_limit_and_is_told(
    in_vm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long after the command has ended, while nothing else starts or ends; and commands find room from then on."""
    monkeypatch.setattr(alarms, "_ROUND_SECONDS", 0.05)

    async def body(vm: VM) -> None:
        told: asyncio.Queue[LimitReached] = asyncio.Queue()
        vm.on_limit = told.put_nowait
        late = (
            "import os, time\ntime.sleep(2)\nwhile True:\n try: os.fork()\n except OSError: time.sleep(0.01)"
        )
        await vm.exec_file("sh", ["-c", 'python3 -c "$1" </dev/null >/dev/null 2>&1 &', "sh", late])
        assert (await told.get()).limit == "processes"
        assert vm._cgroup is not None
        assert (vm._cgroup.limits["pids"] or 0) > LIMITS.processes
        await still_works(vm)

    in_vm(body, limits=LIMITS)


@as_root
def test_where_nothing_runs_nobody_looks(in_vm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no event is looked at as long as something runs in a VM, and again from its next start on."""
    monkeypatch.setattr(alarms, "_ROUND_SECONDS", 0.05)

    async def settled() -> None:
        async with asyncio.timeout(30):
            while alarms._ROUNDS:  # noqa: ASYNC110 -- there is no event, which is the point
                await asyncio.sleep(0.05)

    async def body(vm: VM) -> None:
        await still_works(vm)
        await settled()
        process = await vm.spawn("sleep", ["1000"])
        await asyncio.sleep(2)
        assert vm._cgroup is not None
        assert bool(alarms._ROUNDS) == (
            vm._cgroup.homes.get("pids", (0, ""))[0] == 1 and not alarms._Rounds.heard
        )
        await process.kill()
        await settled()

    in_vm(body, limits=LIMITS)


@as_root
def test_whoever_ran_out_of_memory_is_named(in_vm: Any) -> None:
    """The command's reason is oom, its limit memory_bytes, and the event names it."""

    async def body(vm: VM) -> None:
        told: asyncio.Queue[LimitReached] = asyncio.Queue()
        vm.on_limit = told.put_nowait
        eat = "b = []\nwhile True: b.append(bytearray(b'x' * (1 << 20)))"
        result = await vm.exec_file("python3", ["-c", eat])
        assert (result.reason, result.limit, result.signal) == ("oom", "memory_bytes", "SIGKILL")
        assert (await told.get()).command == "python3"
        await asyncio.sleep(1)  # a burst is told once: the next is another
        process = await vm.spawn("python3", ["-c", eat])
        assert (await process.wait_status()).reason == "oom"
        one = await told.get()
        assert (one.pid, one.command) == (process.pid, "python3")
        assert vm.limits_hit == {"memory_bytes": 2}

    in_vm(body, limits=LIMITS)


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_attacks_are_contained(in_vm: Any, attack: Attack) -> None:
    """While it goes on and after it was killed the VM answers (bench measures how soon), and nothing of it stays."""

    async def body(vm: VM) -> None:
        if attack.needs_cgroup and "memory" not in _enforced(vm):
            pytest.skip("without a cgroup nothing limits the memory of a whole VM")
        if attack.name == "stopping_signals" and await one_id(vm):
            pytest.skip("what has the guest's id it can signal for ever: only root can give the rest others")
        process = await vm.spawn("python3", ["-c", attack.source], timeout=20)
        if attack.says_full:
            await Transcript(process).until(b"full")
        else:
            # It meets no error: its limit makes room by itself, or it ends.
            with contextlib.suppress(TimeoutError):
                await process.wait_status(1.0)
        for _ in range(0 if attack.starves else 3):
            result = await vm.exec("echo ok")
            # Whoever kills all of its user's processes kills also this one; and where memory is used up by what
            # the kernel cannot tell whose it is, this one may be what it ends. Both are said.
            hit = (
                "signaled" if "signals" in attack.name else "oom" if attack.limit == "memory_bytes" else None
            )
            assert result.stdout == "ok\n" or result.reason == hit, result
        # Of one whose leader the kernel has ended for its memory, the children live on.
        stopped = process.running
        await process.kill()
        await still_works(vm)
        assert not stopped or await commands(vm) == []

    in_vm(body, limits=LIMITS, limit=60.0)


def test_commands_start_where_everything_is_killed(in_vm: Any) -> None:
    """Whoever kills all that it may, without a pause, keeps no command from being started, only from living on."""

    async def body(vm: VM) -> None:
        for user in ("agentos", "root"):
            script = (
                "import os\nos.write(1, b'full')\nwhile True:\n try: os.kill(-1, 9)\n except OSError: pass"
            )
            killer = await vm.spawn("python3", ["-c", script], user=user)
            await Transcript(killer).until(b"full")
            for _ in range(5):
                result = await vm.exec("echo ok", user=user)
                assert result.stdout == "ok\n" or (result.reason, result.signal) == ("signaled", "SIGKILL")
            await killer.kill()
            await still_works(vm)

    in_vm(body, limits=LIMITS)


_FORK_BOMB = """\
import os
while True:
    try: os.fork()
    except OSError: os.write(1, b"full")
"""


def _enforced(vm: VM) -> frozenset[str]:
    """The limits that cgroups hold for the VM."""
    assert vm._cgroup is not None
    return vm._cgroup.enforced
