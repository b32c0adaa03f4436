"""The zygote is killed under a host that lives on: its VMs end and say so, and the next one is made by another."""

from __future__ import annotations

import asyncio
import glob
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from e2e_support import Transcript, as_root, descendants, host_processes, parent_of, status_of, still_works

from agentos import VM, Host
from agentos.errors import BootFailed, FileError, ShellClosed, VmStopped
from agentos.model import VmSpec


def zygotes() -> set[int]:
    """Those of this process that run."""
    ours = [pid for pid in descendants(os.getpid()) if parent_of(pid) == os.getpid()]
    return set(ours) & set(host_processes("start.py\0zygote"))


def inits(zygote: int) -> list[int]:
    """PID 1 of each of its VMs."""
    return [
        pid for pid in descendants(zygote) if parent_of(pid) == zygote and status_of(pid)["Name"] == "init"
    ]


def cgroups(zygotes: Iterable[int]) -> list[str]:
    """The cgroups that are left of them."""
    return [
        one for pid in zygotes for one in glob.glob(f"/sys/fs/cgroup/**/agentos-*-{pid}-*", recursive=True)
    ]


async def until(seen: Callable[[], bool]) -> None:
    """Look until something of other processes is so."""
    while not seen():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


class Watched:
    """A host of a test's own, whose zygote is known."""

    def __init__(self, *, pool: int = 0) -> None:
        self.host = Host(pool=pool)
        self.killed: list[int] = []
        self.others = zygotes()

    async def __aenter__(self) -> Watched:
        await self.host.ready()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.host.close()
        assert cgroups(self.killed) == []

    @property
    def zygote(self) -> int:
        """The one that runs."""
        (pid,) = zygotes() - self.others
        return pid

    def kill(self) -> None:
        """SIGKILL to it."""
        pid = self.zygote
        os.kill(pid, signal.SIGKILL)
        self.killed.append(pid)


@pytest.mark.parametrize("pool", [0, 2])
def test_the_next_vm_has_another_zygote(run: Any, pool: int) -> None:
    """Twice in a row: whoever waits for something is told, nothing is left when a VM is closed, and a new one works."""

    async def main() -> None:
        async with Watched(pool=pool) as one:
            for turn in range(2):
                marker = f"98{turn}{os.getpid()}"
                vms = [await VM(host=one.host).start() for _ in range(3)]
                runs = [asyncio.create_task(vm.exec(f"sleep {marker}")) for vm in vms]
                spawned = [await vm.spawn("sh", ["-c", f"echo up; sleep {marker}"]) for vm in vms]
                shell = await vms[0].open_shell("bash", ["--norc"])
                for process in spawned:
                    await Transcript(process).until(b"up\n")
                assert len(host_processes(marker)) >= len(vms)
                one.kill()
                assert [result.reason for result in await asyncio.gather(*runs)] == ["vmStopped"] * len(vms)
                for process in spawned:
                    assert (await process.wait_status()).reason == "vmStopped"
                for vm in vms:
                    await vm.close()
                assert host_processes(marker) == []
                assert one.host.vms == set()
                for vm in vms:
                    with pytest.raises(VmStopped) as stopped:
                        await vm.exec("true")
                    assert stopped.value.details["reason"] == "error"
                    assert "zygote" in stopped.value.message
                with pytest.raises((VmStopped, ShellClosed)):
                    await shell.write("x")
                async with VM(host=one.host) as vm:
                    await still_works(vm)
                    with pytest.raises(FileError):
                        await vm.files.read_file("/none")

    run(main)


def test_without_a_moment_between(run: Any) -> None:
    """A VM that is asked for before anybody can have noticed boots all the same."""

    async def main() -> None:
        async with Watched() as one:
            for _ in range(3):
                async with VM(host=one.host):
                    one.kill()
                    async with VM(host=one.host) as vm:
                        await still_works(vm)

    run(main)


def test_many_boots_under_way(run: Any, tmp_path: Path) -> None:
    """Each is tried again with the next zygote, those with storage too."""

    async def main() -> None:
        async with Watched() as one:
            for turn in range(2):
                # So that none is over before the kill.
                os.kill(one.zygote, signal.SIGSTOP)
                vms = [VM(host=one.host) for _ in range(8)]
                vms += [
                    VM(host=one.host, spec=VmSpec(storage=str(tmp_path / f"{turn}-{number}")))
                    for number in range(4)
                ]
                starts = [asyncio.create_task(vm.start()) for vm in vms]
                await asyncio.sleep(0.1)
                assert not any(start.done() for start in starts)
                one.kill()
                await asyncio.gather(*starts)
                assert one.host.vms == set(vms)
                await asyncio.gather(*(still_works(vm) for vm in vms))
                await asyncio.gather(*(vm.close() for vm in vms))

    run(main)


def test_a_stream_of_boots(run: Any) -> None:
    """Whenever it is killed, in whatever state a boot is: all who ask get a VM."""

    async def use(host: Host) -> None:
        for _ in range(4):
            vm = await VM(host=host).start()
            try:
                assert (await vm.exec("true")).reason in ("exited", "vmStopped")
            except VmStopped:
                pass  # it had booted before
            await vm.close()

    async def main() -> None:
        async with Watched(pool=1) as one:
            for pause in (0.0, 0.01, 0.02, 0.04, 0.08):
                users = [asyncio.create_task(use(one.host)) for _ in range(6)]
                await asyncio.sleep(pause)
                one.kill()
                await asyncio.gather(*users)

    run(main)


def test_the_pool_is_emptied_and_filled_again(run: Any, tmp_path: Path) -> None:
    """What it has had ready is neither handed out nor left: its directories go with the next VM."""

    async def main() -> None:
        async with Watched() as one:
            await one.host.keep_ready(VmSpec(), 3, str(tmp_path))
            pool = (await one.host.ready()).pool
            before = set(os.listdir(tmp_path))
            assert len(before) == 3
            one.kill()
            await until(lambda: zygotes() == one.others)
            async with VM(spec=VmSpec(storage=str(tmp_path / "mine")), host=one.host) as vm:
                await vm.exec("echo kept > f")
                await until(lambda: not pool.lacking and not before & set(os.listdir(tmp_path)))
                ready = pool.ready()
                assert len(ready) == 3
                assert not any(raw.gone for raw in ready)
                async with VM(spec=VmSpec(storage=str(tmp_path / "other")), host=one.host) as other:
                    await still_works(other)
                    assert len(pool.ready()) == 2
            one.kill()
            await until(lambda: zygotes() == one.others)
            async with VM(spec=VmSpec(storage=str(tmp_path / "mine")), host=one.host) as vm:
                assert (await vm.exec("cat f")).stdout == "kept\n"
        assert sorted(os.listdir(tmp_path)) == ["mine", "other"]

    run(main)


def test_storage_goes_over_to_the_next_vm_at_once(run: Any, tmp_path: Path) -> None:
    """Though the VM before was not closed: the next one begins when it has ended."""

    async def main() -> None:
        async with Watched() as one:
            for turn in range(3):
                vm = await VM(spec=VmSpec(storage=str(tmp_path / "mine")), host=one.host).start()
                assert (await vm.exec("cat f")).stdout == "".join(f"{number}\n" for number in range(turn))
                await vm.exec(f"echo {turn} >> f; sync f")
                marker = f"97{os.getpid()}"
                await vm.spawn("sleep", [marker])
                one.kill()
                async with VM(spec=VmSpec(storage=str(tmp_path / "mine")), host=one.host) as again:
                    assert host_processes(marker) == []
                    assert len((await again.exec("cat f")).stdout.split()) == turn + 1
                await vm.close()

    run(main)


def test_a_host_that_is_closed_after_its_zygote_leaves_nothing(run: Any) -> None:
    """Though nobody has closed the VMs, and no other zygote was there to clean up."""
    marker = f"96{os.getpid()}"

    async def main() -> None:
        async with Watched(pool=1) as one:
            vm = await VM(host=one.host).start()
            await vm.spawn("sleep", [marker])
            one.kill()
            await one.host.close()
            assert host_processes(marker) == []
            assert cgroups(one.killed) == []
            await vm.close()
            with pytest.raises(VmStopped):
                await vm.exec("true")

    run(main)


def test_a_host_that_is_closed_makes_no_zygote_for_boots_under_way(run: Any) -> None:
    """They fail, as the host was closed."""

    async def main() -> None:
        async with Watched() as one:
            os.kill(one.zygote, signal.SIGSTOP)
            starts = [asyncio.create_task(VM(host=one.host).start()) for _ in range(3)]
            await asyncio.sleep(0.1)
            closing = asyncio.create_task(one.host.close())
            await asyncio.sleep(0.1)
            one.kill()
            await closing
            for start in starts:
                with pytest.raises(BootFailed):
                    await start
            assert zygotes() == one.others

    run(main)


@pytest.mark.parametrize("zygote_lives", [True, False])
def test_an_init_that_does_not_end_is_killed(run: Any, zygote_lives: bool) -> None:
    """Whoever keeps it from that: its VM is over in a few seconds."""

    async def main() -> None:
        async with Watched() as one:
            vm = await VM(host=one.host).start()
            marker = f"95{os.getpid()}"
            await vm.spawn("sleep", [marker])
            (init,) = inits(one.zygote)
            os.kill(init, signal.SIGSTOP)
            if not zygote_lives:
                one.kill()
            await vm.close()
            assert host_processes(marker) == []

    run(main)


def test_what_is_held_is_held_by_the_next(run: Any, tmp_path: Path) -> None:
    """A descriptor that was to stay open does, until it is released."""
    held = tmp_path / "held"
    held.touch()

    async def main() -> None:
        async with Watched() as one:
            fd = os.open(held, os.O_RDONLY)
            await one.host.hold("it", fd)
            os.close(fd)
            one.kill()
            async with VM(host=one.host):
                assert str(held) in opened_by(one.zygote)
                one.host.release("it")
                await until(lambda: str(held) not in opened_by(one.zygote))

    run(main)


def opened_by(pid: int) -> list[str]:
    """The files that a process has open."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            pass  # closed meanwhile
    return found


@as_root
def test_the_cgroups_go_without_another_zygote(run: Any) -> None:
    """Nobody has to ask for a VM first."""

    async def main() -> None:
        async with Watched(pool=1) as one:
            async with VM(host=one.host):
                assert cgroups([one.zygote]) != []
                one.kill()
            await until(lambda: not cgroups(one.killed))
            assert zygotes() == one.others

    run(main)
