"""The file worker against the real kernel: as it runs in a VM, on full disks, over mounts, on huge trees."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentos.errors import FileDenied, FileError, FileExists, NoSpace, NotRegularFile
from agentos.linux import syscalls
from agentos.machine import fileserver
from agentos.machine.files import Files
from agentos.machine.fileserver import HEADER, REPLY, REQUEST
from agentos.model import Limits

SOURCE = Path(fileserver.__file__).parents[2]
USER = 1000

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Workers:
    """Workers as forked children, made ready by `prepare`."""

    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self.prepare = prepare
        self.pids: list[int] = []

    async def open(self) -> socket.socket:
        host, guest = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                os.closerange(3, guest.fileno())
                os.closerange(guest.fileno() + 1, 4096)
                os.umask(0o022)
                self.prepare()
                fileserver.serve(guest.fileno())
                os._exit(0)
            finally:
                os._exit(1)
        self.pids.append(pid)
        guest.close()
        return host


def run(
    home: Path, scenario: Callable[[Files], Awaitable[Any]], prepare: Callable[[], None] = lambda: None
) -> None:
    """Run `scenario` on Files at `home`; every worker must end well."""
    workers = Workers(prepare)

    async def main() -> None:
        files = Files(workers.open, limits=Limits(), home=str(home))
        try:
            await scenario(files)
        finally:
            files.close()

    try:
        asyncio.run(main())
    finally:
        codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers.pids}
    assert codes <= {0}


def as_in_a_vm() -> None:
    """uid 0 without a capability, with the user's file system ids: what a worker is in a VM."""
    os.setgroups([])
    syscalls.setfsgid(USER)
    syscalls.setfsuid(USER)
    syscalls.capset(0, 0)
    syscalls.prctl(4, 0)  # undumpable: /proc/self belongs to root then


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB and few files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=32", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def user_home(tmp_path: Path) -> Path:
    """A home of the VM's user, reachable by it."""
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    return home


@as_root
class TestAsInAVm:
    def test_files_belong_to_the_user(self, user_home: Path) -> None:
        """All that is made belongs to the VM's user; an undumpable worker can have nameless temporaries."""

        def chunks() -> Iterator[bytes]:
            yield bytes(10_000_000)
            assert os.listdir(user_home) == ["d"]

        async def scenario(files: Files) -> None:
            await files.mkdir("d")
            await files.write_file_stream("big", chunks())
            await files.write_file("big", "x")
            await files.write_file("d/e/f", "x", append=True)
            for path in ("d", "big", "d/e", "d/e/f"):
                found = await files.stat(path)
                assert (found.uid, found.gid) == (USER, USER)

        run(user_home, scenario, as_in_a_vm)

    def test_the_user_s_rights_and_no_more(self, user_home: Path) -> None:
        """What the user may not do, the file actions may not."""
        secret = user_home.parent / "secret"
        secret.write_text("root's")
        secret.chmod(0o600)
        (user_home / "link").symlink_to(secret)
        (user_home / "read-only").write_text("x")
        (user_home / "read-only").chmod(0o444)

        async def scenario(files: Files) -> None:
            for call in (
                files.read_file("link"),
                files.write_file("link", "x"),
                files.write_file(str(secret), "x", append=True),
                files.write_file(str(user_home.parent / "new"), "x"),
                files.write_file("read-only", "x"),
                files.mkdir(str(user_home.parent / "d")),
                files.delete_file(str(secret)),
                files.move(str(secret), "mine"),
                files.move(str(secret), "mine", overwrite=False),
                files.readdir("/root"),
            ):
                with pytest.raises(FileDenied):
                    await call

        run(user_home, scenario, as_in_a_vm)
        assert secret.read_text() == "root's"

    def test_another_owner_s_file_is_written_in_place(self, user_home: Path) -> None:
        """A writable file of someone else keeps its owner; so does one in a read-only directory."""
        (user_home / "shared").write_text("a longer old content")
        (user_home / "shared").chmod(0o666)
        (user_home.parent / "fixed").write_text("a longer old content")
        os.chown(user_home.parent / "fixed", USER, USER)

        async def scenario(files: Files) -> None:
            await files.write_file("shared", "new")
            await files.write_file(str(user_home.parent / "fixed"), "new", mode=0o640)
            with pytest.raises(FileDenied):
                await files.write_file("shared", "newer", mode=0o600)

        run(user_home, scenario, as_in_a_vm)
        for path in (user_home / "shared", user_home.parent / "fixed"):
            assert path.read_text() == "new"
        assert (user_home / "shared").stat().st_uid == 0
        assert stat.S_IMODE((user_home.parent / "fixed").stat().st_mode) == 0o640

    def test_a_tree_with_a_part_that_may_not_be_read_or_deleted(self, user_home: Path) -> None:
        """It is listed without what is in it; deleting stops there and says where."""
        (user_home / "t/mine").mkdir(parents=True)
        (user_home / "t/mine/theirs/below").mkdir(parents=True)
        (user_home / "t/mine/theirs").chmod(0o700)
        for path in (user_home / "t", user_home / "t/mine"):
            os.chown(path, USER, USER)

        async def scenario(files: Files) -> None:
            entries = await files.readdir_recursive("t")
            assert [entry.name for entry in entries] == ["mine", "theirs"]
            with pytest.raises(FileDenied) as caught:
                await files.delete_file("t", recursive=True)
            assert caught.value.details["path"] == str(user_home / "t/mine")

        run(user_home, scenario, as_in_a_vm)

    def test_devices(self, user_home: Path) -> None:
        """A device is refused, even one that anyone may open."""
        os.mknod(user_home / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        os.chmod(user_home / "zero", 0o666)

        async def scenario(files: Files) -> None:
            with pytest.raises(NotRegularFile):
                await files.read_file("zero")
            with pytest.raises(NotRegularFile):
                await files.write_file("zero", "x")

        run(user_home, scenario, as_in_a_vm)

    def test_inside_another_root(self, user_home: Path) -> None:
        """Links that climb out or are absolute stay inside the worker's root."""
        (user_home / "etc").mkdir()
        (user_home / "etc/passwd").write_text("the guest's")
        (user_home / "climb").symlink_to("../../../../../../etc/passwd")
        (user_home / "absolute").symlink_to("/etc/passwd")

        async def scenario(files: Files) -> None:
            for path in ("climb", "absolute", "/etc/passwd", "../../etc/passwd"):
                assert await files.read_file(path) == b"the guest's"
            await files.write_file("absolute", "changed")
            assert await files.read_file("climb") == b"changed"

        def prepare() -> None:
            os.chroot(user_home)
            os.chdir("/")

        run(Path("/"), scenario, prepare)
        assert (user_home / "etc/passwd").read_text() == "changed"


@as_root
class TestFullDisk:
    def test_the_old_content_is_intact(self, small_disk: Path) -> None:
        """A write that does not fit changes nothing and leaves nothing, however it was sent."""
        (small_disk / "f").write_bytes(b"old")
        (small_disk / "g").write_bytes(b"old")
        os.link(small_disk / "g", small_disk / "h")

        def endless() -> Iterator[bytes]:
            while True:
                yield bytes(100_000)

        async def scenario(files: Files) -> None:
            for call in (
                files.write_file("f", bytes(8 << 20)),
                files.write_file("g", bytes(8 << 20)),
                files.write_file("new/file", bytes(8 << 20)),
                files.write_file_stream("f", endless()),
            ):
                with pytest.raises(NoSpace) as caught:
                    await call
                assert caught.value.details["errno"] == errno.ENOSPC
            assert await files.read_file("f") == b"old"
            assert await files.read_file("g") == b"old"
            assert await files.readdir(".") == ["f", "g", "h", "new"]
            assert await files.readdir("new") == []
            await files.write_file("f", bytes(3 << 20))
            with pytest.raises(NoSpace):
                await files.write_file("f", bytes(2 << 20), append=True)

        run(small_disk, scenario)
        assert (small_disk / "f").stat().st_size >= 3 << 20

    def test_no_more_files(self, small_disk: Path) -> None:
        """A disk out of files is a full disk too."""

        async def scenario(files: Files) -> None:
            written = await files.write_files([(f"{number}", "x") for number in range(40)])
            errors = [one.error for one in written if one.error is not None]
            assert errors
            assert all(isinstance(error, NoSpace) for error in errors)
            assert len(await files.readdir(".")) == 40 - len(errors)

        run(small_disk, scenario)


@as_root
class TestOverMounts:
    def test_files_and_trees_are_copied(self, small_disk: Path, tmp_path: Path) -> None:
        """A move to another mount carries contents, modes, times, links and odd names; no source is left."""
        source = tmp_path / "tree"
        (source / "sub").mkdir(parents=True)
        (source / "sub/f").write_bytes(b"content")
        (source / "sub/f").chmod(0o751)
        (source / "sub/link").symlink_to("nowhere")
        (source / os.fsdecode(b"\xff")).touch()
        os.utime(source / "sub/f", ns=(10**18, 10**18))
        os.utime(source / "sub", ns=(10**18, 10**18))
        (source / "sub").chmod(0o555)
        with open(source / "sparse", "wb") as file:
            file.truncate(1 << 40)
            file.seek(1 << 30)
            file.write(b"in the middle")

        async def scenario(files: Files) -> None:
            await files.move(str(source), "there")
            await files.write_file(str(tmp_path / "one"), "1")
            await files.write_file("two", "2")
            with pytest.raises(FileExists):
                await files.move(str(tmp_path / "one"), "two", overwrite=False)
            await files.move(str(tmp_path / "one"), "two")
            assert await files.read_file("two") == b"1"
            assert await files.readdir(".") == ["there", "two"]

        run(small_disk, scenario)
        assert not source.exists()
        there = small_disk / "there"
        assert os.readlink(there / "sub/link") == "nowhere"
        assert os.fsdecode(b"\xff") in os.listdir(there)
        assert (there / "sub/f").stat().st_mtime_ns == (there / "sub").stat().st_mtime_ns == 10**18
        assert stat.S_IMODE((there / "sub/f").stat().st_mode) == 0o751
        assert stat.S_IMODE((there / "sub").stat().st_mode) == 0o555
        with open(there / "sparse", "rb") as copied:
            copied.seek(1 << 30)
            assert copied.read(13) == b"in the middle"
            assert (there / "sparse").stat().st_size == 1 << 40

    def test_what_does_not_fit_stays(self, small_disk: Path, tmp_path: Path) -> None:
        """A move that fails half way leaves the source whole and nothing at the target."""
        source = tmp_path / "tree"
        source.mkdir()
        for number in range(4):
            (source / f"{number}").write_bytes(bytes(2 << 20))
        (source / "big").write_bytes(bytes(8 << 20))
        odd = tmp_path / "odd"
        odd.mkdir()
        os.mkfifo(odd / "fifo")
        (small_disk / "old").write_text("old")

        async def scenario(files: Files) -> None:
            with pytest.raises(NoSpace):
                await files.move(str(source), "there")
            with pytest.raises(NoSpace):
                await files.move(str(source / "big"), "old")
            with pytest.raises(NotRegularFile) as caught:
                await files.move(str(odd), "there")
            assert caught.value.details["path"] == str(odd / "fifo")
            assert await files.readdir(".") == ["old"]
            assert await files.read_file("old") == b"old"

        run(small_disk, scenario)
        assert len(os.listdir(source)) == 5

    def test_a_mount_point_is_written_in_place(self, tmp_path: Path) -> None:
        """A file that is itself a mount can not be replaced: it is overwritten."""
        (tmp_path / "inner").write_text("a longer old content")
        (tmp_path / "outer").touch()
        subprocess.run(["mount", "--bind", tmp_path / "inner", tmp_path / "outer"], check=True)

        async def scenario(files: Files) -> None:
            await files.write_file("outer", "new")
            await files.write_file("outer", bytes(3_000_000))
            await files.write_file("outer", "new")

        try:
            run(tmp_path, scenario)
        finally:
            subprocess.run(["umount", tmp_path / "outer"], check=True)
        assert (tmp_path / "inner").read_text() == "new"
        assert sorted(os.listdir(tmp_path)) == ["inner", "outer"]

    def test_overlay(self, small_disk: Path, tmp_path: Path) -> None:
        """On an overlay, as a VM's root is, what the image holds is replaced, moved and deleted."""
        for name in ("lower", "merged"):
            (tmp_path / name).mkdir()
        for name in ("upper", "work"):
            (small_disk / name).mkdir()
        (tmp_path / "lower/d/e").mkdir(parents=True)
        (tmp_path / "lower/d/f").write_text("image")
        (tmp_path / "lower/g").write_text("image")
        options = f"lowerdir={tmp_path}/lower,upperdir={small_disk}/upper,workdir={small_disk}/work,userxattr"
        merged = tmp_path / "merged"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)

        async def scenario(files: Files) -> None:
            await files.write_file("g", "new")
            assert await files.read_file("g") == b"new"
            await files.move("d", "d2")
            assert await files.read_file("d2/f") == b"image"
            assert not await files.exists("d")
            await files.write_file("d2/e/x", "new")
            await files.delete_file("d2", recursive=True)
            assert await files.readdir(".") == ["g"]

        try:
            run(merged, scenario)
        finally:
            subprocess.run(["umount", merged], check=True)


class TestHugeTrees:
    def test_a_hundred_thousand_entries(self, tmp_path: Path) -> None:
        """A big directory is listed and deleted completely, in order, with the event loop running on."""
        count = 100_000
        (tmp_path / "d").mkdir()
        for number in range(count):
            os.close(os.open(tmp_path / f"d/{number:x}", os.O_CREAT | os.O_WRONLY))

        async def scenario(files: Files) -> None:
            turns = 0

            async def count_turns() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            async def fairly(call: Awaitable[Any]) -> Any:
                """The result of `call`, which may not hold the event loop for more than 5,000 entries."""
                before = turns
                result = await call
                assert turns - before >= count / 5000
                return result

            counting = asyncio.ensure_future(count_turns())
            names = await fairly(files.readdir("d"))
            entries = await fairly(files.readdir_entries("d"))
            deep = await fairly(files.readdir_recursive(".", max_entries=count + 1))
            await fairly(files.delete_file("d", recursive=True))
            counting.cancel()
            assert names == sorted(f"{number:x}" for number in range(count))
            assert [entry.name for entry in entries] == names
            assert [entry.name for entry in deep] == ["d", *names]

        run(tmp_path, scenario)
        assert os.listdir(tmp_path) == []

    def test_a_very_deep_tree(self, tmp_path: Path) -> None:
        """5,000 levels need neither recursion nor descriptors; listing says why it can not."""
        fd = os.open(tmp_path, os.O_RDONLY)
        for _ in range(5000):
            os.mkdir("d", dir_fd=fd)
            os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)

        async def scenario(files: Files) -> None:
            with pytest.raises(FileError) as caught:
                await files.readdir_recursive(".")
            assert caught.value.details["errno"] == errno.ENAMETOOLONG
            await files.delete_file("d", recursive=True)
            assert await files.readdir(".") == ["f"]

        run(tmp_path, scenario)

    def test_many_subdirectories(self, tmp_path: Path) -> None:
        """More subdirectories than are kept in mind at once are deleted all the same."""
        for number in range(25_000):
            os.mkdir(tmp_path / f"{number}")
        (tmp_path / "0/x").mkdir()

        async def scenario(files: Files) -> None:
            await files.delete_file(str(tmp_path), recursive=True)

        run(Path("/"), scenario)
        assert not tmp_path.exists()
        tmp_path.mkdir()


class TestRaces:
    def test_a_directory_moved_while_it_is_deleted(self, tmp_path: Path) -> None:
        """Deletion never continues in a directory that it came to by `..` from one that was moved away."""
        (tmp_path / "other/keep").mkdir(parents=True)
        stop = threading.Event()

        def shuffle() -> None:
            while not stop.is_set():
                for source, target in (("t/a/b", "other/b"), ("other/b", "t/a/b")):
                    try:
                        os.rename(tmp_path / source, tmp_path / target)
                    except OSError:
                        pass

        async def scenario(files: Files) -> None:
            await files.exists(".")  # the worker is forked before there is a thread
            thread = threading.Thread(target=shuffle)
            thread.start()
            try:
                for _ in range(100):
                    try:
                        for number in range(20):
                            os.makedirs(tmp_path / f"t/a/b/{number}/x", exist_ok=True)
                        await files.delete_file("t", recursive=True)
                    except OSError:
                        pass  # something was in the way; what counts is what is left alone
                    assert (tmp_path / "other/keep").is_dir()
            finally:
                stop.set()
                thread.join()

        run(tmp_path, scenario)

    def test_a_reader_sees_all_or_nothing(self, tmp_path: Path) -> None:
        """While a file is written over and over, every reader finds one whole version."""
        (tmp_path / "f").write_bytes(b"a" * 500_000)
        stop = threading.Event()
        seen: list[tuple[int, set[int]]] = []

        def read() -> None:
            while not stop.is_set():
                content = (tmp_path / "f").read_bytes()
                seen.append((len(content), set(content)))

        async def scenario(files: Files) -> None:
            await files.exists(".")
            thread = threading.Thread(target=read)
            thread.start()
            try:
                for letter in (b"b", b"c", b"d") * 20:
                    await files.write_file("f", letter * 500_000)
            finally:
                stop.set()
                thread.join()

        run(tmp_path, scenario)
        assert seen
        assert all(size == 500_000 and len(letters) == 1 for size, letters in seen)


class TestOnItsOwn:
    def test_a_bare_interpreter_can_serve(self, tmp_path: Path) -> None:
        """The worker runs in a bare interpreter, speaks the documented protocol, and ends with its socket."""
        host, guest = socket.socketpair()
        code = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        # The package's public names are not for the worker: load the bare modules.
        code += "import types; package = types.ModuleType('agentos')\n"
        code += f"package.__path__ = [{str(SOURCE / 'agentos')!r}]; sys.modules['agentos'] = package\n"
        code += f"from agentos.machine.fileserver import serve; serve({guest.fileno()})\n"
        code += "assert not {'asyncio', 'ctypes', 'subprocess', 'typing_extensions'} & set(sys.modules)"
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], pass_fds=[guest.fileno()])
        guest.close()
        stream = host.makefile("rwb")

        def answer() -> Any:
            kind, length = HEADER.unpack(stream.read(HEADER.size))
            assert kind == REPLY
            return json.loads(stream.read(length))

        assert answer() == {}
        for path, wanted in ((str(tmp_path), True), (str(tmp_path / "no"), False)):
            body = json.dumps({"op": "exists", "path": path}).encode()
            stream.write(HEADER.pack(REQUEST, len(body)) + body)
            stream.flush()
            assert answer() == {"exists": wanted}
        stream.close()
        host.close()
        assert process.wait() == 0

    @pytest.mark.parametrize(
        "sent", [b"", b"Q", HEADER.pack(REQUEST, 2**31), HEADER.pack(REQUEST, 10) + b"12"]
    )
    def test_it_ends_when_the_host_is_gone(self, sent: bytes) -> None:
        """Whatever came last, a worker whose host is gone ends, quietly."""
        host, guest = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                host.close()
                fileserver.serve(guest.detach())
                os._exit(0)
            finally:
                os._exit(1)
        guest.close()
        host.sendall(sent)
        host.close()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
