"""VMs whose files are in a directory of the host: what outlives them, what they may take up, and those kept ready."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
from pathlib import Path
from typing import Any

import pytest
from e2e_support import as_root

from agentos import VM, Host, Limits, Mount
from agentos.errors import BootFailed, NoSpace
from agentos.machine.disk import Disks
from agentos.model import MIB, LimitReached, VmSpec


def spec(path: Path, **limits: int) -> VmSpec:
    """A VM whose files are in `path`."""
    return VmSpec(storage=str(path), limits=Limits(**limits))


def test_files_outlive_the_vm(run: Any, tmp_path: Path) -> None:
    """With their owners, modes, links and times; what is in /tmp and /usr too."""

    async def main() -> None:
        async with VM(spec=spec(tmp_path / "kept")) as vm:
            await vm.exec("echo one > f; chmod 604 f; ln -s f l; touch -d @1000 f; echo two > /tmp/t")
        async with VM(storage=str(tmp_path / "kept")) as vm:
            result = await vm.exec("cat l /tmp/t; stat -c '%a %U %Y' f")
            assert result.stdout == "one\ntwo\n604 agentos 1000\n"

    run(main)


def test_directories_that_cannot_be_used(run: Any, tmp_path: Path) -> None:
    """Of a storage and of a mount: the error names them, and says what would do."""

    async def main() -> None:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"mounts": [Mount(str(tmp_path / "none"), "/data")]}, "mounts"),
            ({"storage": "/proc/none"}, "storage"),
            ({"storage": "/dev/null"}, "storage"),
        ]
        for options, step in cases:
            with pytest.raises(BootFailed) as caught:
                await VM(**options).start()
            named = options.get("storage", str(tmp_path / "none"))
            assert str(named) in caught.value.message
            assert caught.value.details["step"] == step
            assert caught.value.details["remedy"].startswith("name a directory")

    run(main)


def test_a_ready_vm_takes_the_name_of_the_directory(run: Any, tmp_path: Path) -> None:
    """It is a new VM like any other: its files are where they were asked for, and outlive it."""

    async def main() -> None:
        async with Host() as host:
            await host.keep_ready(VmSpec(), 1, str(tmp_path))
            (spare,) = os.listdir(tmp_path)
            assert spare.startswith("spare-")
            async with VM(spec=spec(tmp_path / "mine"), host=host) as vm:
                assert "mine" in os.listdir(tmp_path)
                assert spare not in os.listdir(tmp_path)
                await vm.exec("echo content > f")
            async with VM(spec=spec(tmp_path / "mine"), host=host) as vm:
                assert (await vm.exec("cat f")).stdout == "content\n"
        assert os.listdir(tmp_path) == ["mine"]
        await host.close()  # closed twice, it closes nothing that is somebody else's by now

    run(main)


def test_a_ready_vm_that_has_died_is_not_handed_out(run: Any, tmp_path: Path) -> None:
    """Whoever asks gets one that lives."""

    async def main() -> None:
        async with Host() as host:
            await host.keep_ready(VmSpec(), 2, str(tmp_path))
            first, _ = (await host.ready()).pool.ready()
            first.sock.shutdown(2)
            assert first.remains.wait(10)
            async with VM(spec=spec(tmp_path / "mine"), host=host) as vm:
                assert (await vm.exec("echo lives")).stdout == "lives\n"

    run(main)


def test_a_ready_vm_is_handed_out_when_its_warm_up_is_over(run: Any) -> None:
    """Nothing of it is in the process table, and the VM is taken while it still boots."""

    async def main() -> None:
        async with Host() as host:
            for _ in range(20):
                await host.keep_ready(VmSpec(), 1)
                async with VM(host=host) as vm:
                    assert await vm.all_processes() == []

    run(main)


def test_another_kind_is_not_served_by_the_pool(run: Any, tmp_path: Path) -> None:
    """Each kind has ready VMs of its own, with its own limits and user."""

    async def main() -> None:
        async with Host() as host:
            root = VmSpec(user="root", limits=Limits(open_files=77))
            await host.keep_ready(VmSpec(), 1, str(tmp_path))
            await host.keep_ready(root, 1, str(tmp_path))
            theirs = VmSpec(user="root", limits=Limits(open_files=77), storage=str(tmp_path / "r"))
            async with VM(spec=theirs, host=host) as vm:
                assert (await vm.exec("id -un; ulimit -n")).stdout == "root\n77\n"
            assert len(os.listdir(tmp_path)) >= 2

    run(main)


def test_without_a_disk_a_vm_is_held_to_its_limit_too(run: Any, tmp_path: Path) -> None:
    """What writes on and on is killed, and told; files can be deleted, and then written again."""

    async def main() -> None:
        (tmp_path / "vm").mkdir()
        (tmp_path / "vm" / "kept").touch()  # such a directory is used as it is
        told: asyncio.Queue[LimitReached] = asyncio.Queue()
        async with VM(spec=spec(tmp_path / "vm", disk_bytes=32 * MIB)) as vm:
            vm.on_limit = told.put_nowait
            left = await vm.spawn("sleep", ["1000"])
            written = await vm.exec(
                "while :; do dd if=/dev/zero of=big bs=1M count=8 oflag=append conv=notrunc; done"
            )
            assert (written.signal, written.exit_code) == ("SIGKILL", 137)
            assert (written.reason, written.limit) == ("diskLimit", "disk_bytes")
            ended = await left.wait_status()
            assert (ended.exit_code, ended.reason) == (137, "diskLimit")
            assert (await vm.exec("kill -9 $$")).reason == "signaled"
            one = await told.get()
            assert (one.limit, one.value) == ("disk_bytes", 32 * MIB)
            with pytest.raises(NoSpace):
                await vm.files.write_file("more", "text")
            await vm.exec("rm big")
            while True:
                with contextlib.suppress(NoSpace):
                    await vm.files.write_file("more", "text")
                    break
                await asyncio.sleep(0.05)
            assert (await vm.exec("cat more")).stdout == "text"

    run(main)


@as_root
def test_disk_bytes_hold(run: Any, tmp_path: Path) -> None:
    """A full disk is ENOSPC inside and NoSpace for a file action; after a deletion there is room again."""

    async def main() -> None:
        async with VM(spec=spec(tmp_path / "vm", disk_bytes=20 * MIB)) as vm:
            full = await vm.exec("dd if=/dev/zero of=big bs=64k; stat -c %s big")
            assert "No space left on device" in full.stderr
            assert 18 * MIB < int(full.stdout) <= 20 * MIB
            with pytest.raises(NoSpace):
                await vm.files.write_file("more", b"x" * MIB)
            assert taken(tmp_path) < 30 * MIB
            await vm.exec("rm big; sync")
            await vm.files.write_file("more", b"x" * MIB)

    run(main)


@as_root
def test_disk_files_hold(run: Any, tmp_path: Path) -> None:
    """A VM makes as many files as it may, and the host hardly notices."""

    async def main() -> None:
        async with VM(spec=spec(tmp_path / "vm", disk_files=500, disk_bytes=20 * MIB)) as vm:
            full = await vm.exec("mkdir d; cd d; for n in $(seq 2000); do : > $n || break; done; ls | wc -l")
            assert "No space left on device" in full.stderr
            assert 400 < int(full.stdout) < 600

    run(main)


@as_root
def test_what_is_deleted_is_given_back(run: Any, tmp_path: Path) -> None:
    """The host's disk holds no more for a VM than the VM has."""

    async def main() -> None:
        async with VM(spec=spec(tmp_path / "vm")) as vm:
            await vm.exec("dd if=/dev/urandom of=big bs=1M count=32; sync")
            assert taken(tmp_path) > 32 * MIB
            await vm.exec("rm big; sync")
        async with VM(spec=spec(tmp_path / "vm")):
            assert taken(tmp_path) < 16 * MIB

    run(main)


@as_root
def test_a_disk_serves_one_vm(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told, and the first has lost nothing."""
    monkeypatch.setattr("agentos.machine.disk._IN_USE_SECONDS", 0.1)

    async def main() -> None:
        async with VM(spec=spec(tmp_path / "vm")) as vm:
            with pytest.raises(BootFailed, match="in use"):
                await VM(spec=spec(tmp_path / "vm")).start()
            assert (await vm.exec("echo fine > f; cat f")).stdout == "fine\n"

    run(main)


@as_root
def test_no_loop_device_stays(run: Any, tmp_path: Path) -> None:
    """Nor does a mount, whichever way a VM ended."""

    async def main() -> None:
        async with Host() as host:
            vm = await VM(spec=spec(tmp_path / "vm"), host=host).start()
            await vm.exec("echo x > f")
            assert loop_files(tmp_path)
            await vm.close()
        # Who can have the disk knows that the kernel has let go of it.
        mount_fd = Disks().open(str(tmp_path / "vm"), Limits())
        assert mount_fd is not None
        assert len(loop_files(tmp_path)) == 1
        os.close(mount_fd)
        assert not loop_files(tmp_path)

    run(main)


def loop_files(directory: Path) -> list[str]:
    """The files below a directory that are loop devices."""
    found = []
    for path in glob.glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.append(Path(path).read_text(encoding="utf-8").strip())
    return [one for one in found if one.startswith(str(directory))]


def taken(directory: Path) -> int:
    """Bytes of the host's disk that the files below a directory take up."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
