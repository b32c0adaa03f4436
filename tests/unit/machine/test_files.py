"""The file actions, over real workers in child processes on a directory of their own."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentos.errors import (
    AgentOSError,
    FileDenied,
    FileError,
    FileExists,
    FileMissing,
    InvalidRequest,
    IsDirectory,
    LimitExceeded,
    NotDirectory,
    NotRegularFile,
    VmError,
    VmStopped,
)
from agentos.machine import files as files_module
from agentos.machine import fileserver, filewire, fileworkers
from agentos.machine.files import Files
from agentos.machine.fileserver import DATA, HEADER, PAGE, REPLY
from agentos.model import Limits

Scenario = Callable[[Files], Awaitable[Any]]


class Pool:
    """Opens workers as forked children, and knows their pids."""

    def __init__(self, *, uid: int | None = None, serve: Callable[[int], None] = fileserver.serve) -> None:
        self.uid = uid
        self.serve = serve
        self.pids: list[int] = []

    async def open(self) -> socket.socket:
        host, guest = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            self._become_worker(guest.fileno())
        self.pids.append(pid)
        guest.close()
        return host

    def _become_worker(self, fd: int) -> None:
        code = 1
        try:
            os.closerange(3, fd)
            os.closerange(fd + 1, 4096)
            os.umask(0o022)
            if self.uid is not None:
                os.setgroups([])
                os.setresgid(self.uid, self.uid, self.uid)
                os.setresuid(self.uid, self.uid, self.uid)
            self.serve(fd)
            code = 0
        finally:
            os._exit(code)

    def reap(self) -> list[int]:
        """Wait for all workers to end. Returns their exit codes, negative for a signal."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        self.pids.clear()
        return codes


def descriptors() -> list[str]:
    """The numbers that are open here, but for the listing's: that may be another where a thread waits in open(2)."""
    return [one for one in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{one}")]


def run(home: Path, scenario: Scenario, *, pool: Pool | None = None, **limits: int) -> Any:
    """Run `scenario` on Files at `home`; nothing may be left over, and honest workers must end well."""
    honest = pool is None
    pool = pool or Pool()
    fds = descriptors()

    async def main() -> Any:
        files = Files(pool.open, limits=Limits(**limits), home=str(home))
        try:
            return await scenario(files)
        finally:
            files.close()
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    try:
        result = asyncio.run(main())
    finally:
        codes = pool.reap()
    assert descriptors() == fds
    if honest:
        assert set(codes) <= {0}
    return result


async def end_of(pid: int) -> None:
    """Wait until a worker has ended, without reaping it."""
    pidfd = os.pidfd_open(pid)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def temporary_names(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".agentos")]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


class TestReadAndWrite:
    @pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 262_144, 3_000_001])
    def test_what_is_written_is_read(self, home: Path, size: int) -> None:
        """Bytes come back as they went, below and above every internal boundary."""
        data = os.urandom(size)

        async def scenario(files: Files) -> None:
            await files.write_file("a.bin", data)
            assert await files.read_file("a.bin") == data
            assert await files.read_file(str(home / "a.bin")) == data

        run(home, scenario)
        assert (home / "a.bin").read_bytes() == data

    def test_text_is_utf8(self, home: Path) -> None:
        """Text is written as UTF-8; bytearray and memoryview are bytes."""

        async def scenario(files: Files) -> None:
            await files.write_file("t", "grüße\n")
            assert await files.read_file("t") == "grüße\n".encode()
            await files.write_file("t", bytearray(b"abc"))
            await files.write_file("u", memoryview(b"abc"))
            assert await files.read_file("t") == await files.read_file("u") == b"abc"

        run(home, scenario)

    def test_offset_and_length(self, home: Path) -> None:
        """A part of a file is what slicing gives, also over its end."""

        async def scenario(files: Files) -> None:
            await files.write_file("f", b"0123456789")
            assert await files.read_file("f", offset=3) == b"3456789"
            assert await files.read_file("f", offset=3, length=2) == b"34"
            assert await files.read_file("f", offset=8, length=100) == b"89"
            assert await files.read_file("f", offset=10) == b""
            assert await files.read_file("f", offset=2**62) == b""
            assert await files.read_file("f", length=0) == b""
            assert await files.read_file("f", length=2**62) == b"0123456789"

        run(home, scenario)

    def test_parents_are_made(self, home: Path) -> None:
        """Writing makes missing directories, unless told not to."""

        async def scenario(files: Files) -> None:
            await files.write_file("a/b/c.txt", "x")
            assert await files.write_file_stream("s/t/u.txt", [b"x"]) == 1
            with pytest.raises(FileMissing):
                await files.write_file("n/b.txt", "x", make_parents=False)
            with pytest.raises(NotDirectory):
                await files.write_file("a/b/c.txt/d", "x")

        run(home, scenario)
        assert (home / "a/b/c.txt").read_text() == "x"
        assert not (home / "n").exists()

    def test_mode(self, home: Path) -> None:
        """A new file has the given mode or 0644, an existing one keeps its own unless one is given."""

        async def scenario(files: Files) -> None:
            await files.write_file("new", "x")
            await files.write_file("secret", "x", mode=0o600)
            await files.write_file("open", "x", mode=0o777)
            await files.write_file("open", "y")
            await files.write_file("secret", "y", append=True, mode=0o640)
            assert (await files.stat("new")).mode == 0o644
            assert (await files.stat("open")).mode == 0o777
            assert (await files.stat("secret")).mode == 0o640

        run(home, scenario)

    def test_append(self, home: Path) -> None:
        """append adds to the end and creates what is missing."""

        async def scenario(files: Files) -> None:
            await files.write_file("d/log", "one\n", append=True)
            await files.write_file("d/log", "two\n", append=True)
            assert await files.write_file_stream("d/log", [b"three\n"], append=True) == 6
            assert await files.read_file("d/log") == b"one\ntwo\nthree\n"

        run(home, scenario)

    def test_a_replaced_file_is_a_new_one(self, home: Path) -> None:
        """Who has the old file open goes on reading the old content: nothing is overwritten in place."""
        (home / "f").write_bytes(b"old")

        async def scenario(files: Files) -> None:
            with open(home / "f", "rb") as reader:  # noqa: ASYNC230
                await files.write_file("f", b"new")
                assert reader.read() == b"old"

        run(home, scenario)
        assert (home / "f").read_bytes() == b"new"

    def test_symlinks_stay_and_lead_to_what_is_written(self, home: Path) -> None:
        """Writing to a symlink writes its target, which may not exist yet; a loop is an error."""
        (home / "real").write_bytes(b"old")
        (home / "link").symlink_to("real")
        (home / "dangling").symlink_to("later")
        (home / "loop").symlink_to("loop")

        async def scenario(files: Files) -> None:
            await files.write_file("link", b"new")
            await files.write_file("dangling", b"made")
            with pytest.raises(FileError) as caught:
                await files.write_file("loop", b"x")
            assert caught.value.details["errno"] == errno.ELOOP

        run(home, scenario)
        assert (home / "link").is_symlink()
        assert (home / "dangling").is_symlink()
        assert (home / "real").read_bytes() == b"new"
        assert (home / "later").read_bytes() == b"made"

    def test_hard_links_stay_together(self, home: Path) -> None:
        """A file of two names is written under both."""
        (home / "a").write_bytes(b"a long old content")
        os.link(home / "a", home / "b")

        async def scenario(files: Files) -> None:
            await files.write_file("a", b"new", mode=0o600)

        run(home, scenario)
        assert (home / "b").read_bytes() == b"new"
        assert (home / "a").stat().st_nlink == 2
        assert stat.S_IMODE((home / "b").stat().st_mode) == 0o600
        assert temporary_names(home) == []

    def test_a_read_only_file_is_not_written(self, home: Path) -> None:
        """That the directory would allow to replace it does not make a read-only file writable."""
        if os.geteuid() == 0:
            os.chown(home, 1000, 1000)
            os.chmod(home.parent, 0o755)
        (home / "f").write_bytes(b"old")
        (home / "f").chmod(0o444)
        os.chown(home / "f", home.stat().st_uid, -1)

        async def scenario(files: Files) -> None:
            with pytest.raises(FileDenied):
                await files.write_file("f", b"new")

        uid = 1000 if os.geteuid() == 0 else None
        run(home, scenario, pool=Pool(uid=uid))
        assert (home / "f").read_bytes() == b"old"

    def test_a_named_temporary_where_there_is_no_nameless_file(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On file systems without O_TMPFILE writes are just as whole, and leave nothing."""
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
        (home / "f").write_bytes(b"old")

        def broken() -> Iterator[bytes]:
            yield bytes(10_000_000)  # more than the socket holds: the worker has begun
            assert len(temporary_names(home)) == 1
            raise KeyError("mine")

        async def scenario(files: Files) -> None:
            with pytest.raises(KeyError, match="mine"):
                await files.write_file_stream("f", broken())
            assert await files.read_file("f") == b"old"
            await files.write_file("f", b"new")

        run(home, scenario)
        assert os.listdir(home) == ["f"]
        assert (home / "f").read_bytes() == b"new"


class TestRefusals:
    @pytest.mark.parametrize("path", [5, None, b"f", "", "a\0b", "x" * 4097, "\ud800"])
    def test_bad_paths(self, home: Path, path: Any) -> None:
        """A path is text, not empty, without NUL, of at most 4096 bytes: every method names the argument."""

        async def drain(files: Files) -> None:
            async for _ in files.read_file_stream(path):
                pass

        async def scenario(files: Files) -> None:
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: files.read_file(path),
                lambda: drain(files),
                lambda: files.write_file(path, b""),
                lambda: files.write_file_stream(path, []),
                lambda: files.stat(path),
                lambda: files.exists(path),
                lambda: files.mkdir(path),
                lambda: files.readdir(path),
                lambda: files.readdir_entries(path),
                lambda: files.readdir_recursive(path),
                lambda: files.move(path, "x"),
                lambda: files.delete_file(path),
            ]
            for call in calls:
                with pytest.raises(InvalidRequest) as caught:
                    await call()
                assert caught.value.details["argument"] in ("path", "source")
            with pytest.raises(InvalidRequest) as caught:
                await files.move("x", path)
            assert caught.value.details["argument"] == "target"

        run(home, scenario)
        assert os.listdir(home) == []

    def test_bad_arguments(self, home: Path) -> None:
        """Every other wrong argument is named, and nothing changes."""

        async def drain(files: Files, **options: Any) -> None:
            async for _ in files.read_file_stream("f", **options):
                pass

        async def scenario(files: Files) -> None:
            cases: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
                ("offset", lambda: files.read_file("f", offset=-1)),
                ("offset", lambda: files.read_file("f", offset=1.5)),  # type: ignore[arg-type]
                ("length", lambda: files.read_file("f", length=-1)),
                ("length", lambda: files.read_file("f", length=True)),
                ("chunk_bytes", lambda: drain(files, chunk_bytes=0)),
                ("chunk_bytes", lambda: drain(files, chunk_bytes=2**30)),
                ("data", lambda: files.write_file("f", 5)),  # type: ignore[arg-type]
                ("data", lambda: files.write_file("f", "\ud800")),
                ("mode", lambda: files.write_file("f", "", mode=0o10000)),
                ("mode", lambda: files.mkdir("d", mode=-1)),
                ("chunks", lambda: files.write_file_stream("f", b"abc")),  # type: ignore[arg-type]
                ("chunks", lambda: files.write_file_stream("f", 7)),  # type: ignore[arg-type]
                ("chunks", lambda: files.write_file_stream("f", ["text"])),  # type: ignore[list-item]
                ("max_entries", lambda: files.readdir_recursive(".", max_entries=0)),
                ("paths", lambda: files.read_files("abc")),
                ("paths", lambda: files.read_files(3)),  # type: ignore[arg-type]
                ("files", lambda: files.write_files(["ab", "cde"])),  # type: ignore[list-item]
            ]
            for name, call in cases:
                with pytest.raises(InvalidRequest) as caught:
                    await call()
                assert caught.value.details["argument"] == name

        run(home, scenario)
        assert os.listdir(home) == []

    def test_only_regular_files(self, home: Path) -> None:
        """Fifos, sockets, devices and directories are neither read nor written, and never waited for."""
        os.mkfifo(home / "fifo")
        (home / "to-fifo").symlink_to("fifo")
        (home / "dir").mkdir()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(home / "socket"))
        odd = ["fifo", "to-fifo", "socket", "/dev/zero", "/dev/null", "/dev/tty"]

        async def scenario(files: Files) -> None:
            for path in odd:
                for attempt in (
                    files.read_file(path),
                    files.write_file(path, b"x"),
                    files.write_file(path, b"x", append=True),
                    files.write_file_stream(path, [b"x"]),
                ):
                    with pytest.raises(NotRegularFile) as caught:
                        await attempt
                    assert "Not a regular file" in str(caught.value)
                    assert path in str(caught.value)
            for path in ("dir", "dir/", ".", "..", "/"):
                for attempt in (files.read_file(path), files.write_file(path, b"x")):
                    with pytest.raises(IsDirectory):
                        await attempt

        run(home, scenario)
        assert stat.S_ISFIFO((home / "fifo").stat().st_mode)

    def test_a_waiting_fifo_writer_is_not_disturbed(self, home: Path) -> None:
        """Refusing to read a fifo does not even open it: who waits for a reader goes on waiting."""
        os.mkfifo(home / "fifo")
        opened = threading.Event()

        def writer() -> None:
            os.close(os.open(home / "fifo", os.O_WRONLY))
            opened.set()

        thread = threading.Thread(target=writer, daemon=True)

        async def scenario(files: Files) -> None:
            await files.exists("fifo")  # the worker is forked before there is a thread
            thread.start()
            with pytest.raises(NotRegularFile):
                await files.read_file("fifo")
            assert not opened.is_set()

        try:
            run(home, scenario)
        finally:
            os.close(os.open(home / "fifo", os.O_RDONLY | os.O_NONBLOCK))
            thread.join(5)
        assert opened.is_set()

    def test_file_bytes(self, home: Path) -> None:
        """What is over file_bytes is refused before anything is read or written; streams have no bound."""
        (home / "big").write_bytes(b"x" * 1001)
        with open(home / "sparse", "wb") as file:
            file.truncate(1 << 40)

        async def scenario(files: Files) -> None:
            with pytest.raises(LimitExceeded) as caught:
                await files.read_file("big")
            assert caught.value.details == {"limit": "file_bytes", "value": 1001, "maximum": 1000}
            assert len(await files.read_file("big", length=1000)) == 1000
            assert len(await files.read_file("big", offset=1)) == 1000
            with pytest.raises(LimitExceeded):
                await files.read_file("sparse")
            assert await files.read_file("sparse", offset=1 << 39, length=5) == bytes(5)
            with pytest.raises(LimitExceeded):
                await files.write_file("new", b"x" * 1001)
            assert await files.write_file_stream("new", [b"x" * 1001]) == 1001
            async with aclosing(files.read_file_stream("sparse")) as stream:
                assert len(await anext(stream)) == files_module.CHUNK_BYTES

        run(home, scenario, file_bytes=1000)

    def test_files_of_proc(self, home: Path) -> None:
        """Files that do not tell their size are read to the end, within file_bytes."""

        async def scenario(files: Files) -> None:
            assert b"processor" in await files.read_file("/proc/cpuinfo")
            chunks = [chunk async for chunk in files.read_file_stream("/proc/cpuinfo", chunk_bytes=100)]
            assert {len(chunk) for chunk in chunks[:-1]} == {100}
            with pytest.raises((NotRegularFile, FileDenied, FileMissing)):
                await files.read_file("/proc/kmsg")

        async def small(files: Files) -> None:
            with pytest.raises(LimitExceeded):
                await files.read_file("/proc/cpuinfo")

        run(home, scenario)
        run(home, small, file_bytes=50)


class TestStreams:
    @settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        chunks=st.lists(st.binary(max_size=3000) | st.integers(0, 400_000).map(bytes), max_size=12),
        chunk_bytes=st.integers(1000, 500_000),
        data=st.data(),
    )
    def test_round_trip(self, home: Path, chunks: list[bytes], chunk_bytes: int, data: st.DataObject) -> None:
        """However it is cut when written and read, the bytes are the same; a part is what slicing gives."""
        whole = b"".join(chunks)
        offset = data.draw(st.integers(0, len(whole) + 10))
        length = data.draw(st.none() | st.integers(0, len(whole) + 10))
        wanted = whole[offset:] if length is None else whole[offset : offset + length]

        async def scenario(files: Files) -> None:
            assert await files.write_file_stream("f", chunks) == len(whole)
            stream = files.read_file_stream("f", offset=offset, length=length, chunk_bytes=chunk_bytes)
            parts = [part async for part in stream]
            assert b"".join(parts) == wanted
            assert all(len(part) == chunk_bytes for part in parts[:-1])
            assert await files.read_file("f", offset=offset, length=length) == wanted

        run(home, scenario)

    def test_an_async_source(self, home: Path) -> None:
        """Chunks may come from an async iterator, at its own pace."""

        async def source() -> Any:
            for number in range(3):
                await asyncio.sleep(0)
                yield str(number).encode()

        async def scenario(files: Files) -> None:
            assert await files.write_file_stream("f", source()) == 3
            assert await files.read_file("f") == b"012"

        run(home, scenario)

    def test_nothing_is_read_ahead_of_the_reader(self, home: Path) -> None:
        """A reader that takes one chunk leaves the worker waiting, with only what the socket holds read."""
        with open(home / "f", "wb") as file:
            file.truncate(1 << 30)

        async def scenario(files: Files) -> None:
            pool_pid = None
            async with aclosing(files.read_file_stream("f")) as stream:
                await anext(stream)
                pool_pid = pool.pids[-1]
                for _ in range(50):
                    await asyncio.sleep(0.001)
                read = int(Path(f"/proc/{pool_pid}/io").read_text().split()[1])  # noqa: ASYNC240
            assert read < 16 << 20

        pool = Pool()
        run(home, scenario, pool=pool)

    def test_breaking_out_of_a_stream_frees_its_worker(self, home: Path) -> None:
        """Streams left early do not use up workers, though they are more than there are workers."""
        (home / "f").write_bytes(bytes(3_000_000))

        async def scenario(files: Files) -> None:
            for _ in range(fileworkers.WORKERS * 2):
                async for chunk in files.read_file_stream("f"):
                    assert chunk
                    break
            assert await files.exists("f")

        run(home, scenario, pool=Pool())

    def test_slow_readers_do_not_hold_up_other_operations(self, home: Path) -> None:
        """However many streams are open and idle, one worker is left for everything else."""
        (home / "f").write_bytes(bytes(3_000_000))

        async def scenario(files: Files) -> None:
            streams = [files.read_file_stream("f") for _ in range(fileworkers.WORKERS + 2)]
            started = [asyncio.ensure_future(anext(stream)) for stream in streams]
            done, waiting = await asyncio.wait(started, timeout=0.2)
            assert len(done) == fileworkers.STREAM_WORKERS
            assert len(await files.read_file("f", length=10)) == 10
            for stream in streams[: fileworkers.STREAM_WORKERS]:
                await stream.aclose()
            await asyncio.gather(*waiting)
            for stream in streams:
                await stream.aclose()

        run(home, scenario, pool=Pool())

    def test_a_source_that_raises(self, home: Path) -> None:
        """The source's exception reaches the caller, the file is as it was, and the worker is used again."""
        (home / "f").write_bytes(b"old")

        def broken() -> Iterator[bytes]:
            yield b"x" * 1_000_000
            raise KeyError("mine")

        async def scenario(files: Files) -> None:
            with pytest.raises(KeyError, match="mine"):
                await files.write_file_stream("f", broken())
            with pytest.raises(KeyError, match="mine"):
                await files.write_file_stream("new/f", broken())
            assert await files.read_file("f") == b"old"
            assert len(pool.pids) == 1

        pool = Pool()
        run(home, scenario, pool=pool)
        assert not (home / "new/f").exists()
        assert temporary_names(home) == []

    def test_a_cancelled_write(self, home: Path) -> None:
        """Cancelling leaves the old content, no temporary, and no worker in the middle of something."""
        (home / "f").write_bytes(b"old")

        async def endless() -> Any:
            while True:
                yield bytes(100_000)
                await asyncio.sleep(0)

        async def scenario(files: Files) -> None:
            task = asyncio.ensure_future(files.write_file_stream("f", endless()))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await files.read_file("f") == b"old"

        run(home, scenario, pool=Pool())
        assert os.listdir(home) == ["f"]

    def test_an_error_stops_the_source(self, home: Path) -> None:
        """Where the write fails at once, an endless source is not drained."""

        def endless() -> Iterator[bytes]:
            while True:
                yield bytes(1000)

        async def scenario(files: Files) -> None:
            with pytest.raises(IsDirectory):
                await files.write_file_stream(".", endless())
            assert await files.readdir(".") == []

        run(home, scenario)


class TestSeveral:
    def test_one_bad_path_does_not_spoil_the_others(self, home: Path) -> None:
        """Results come in order, each with its content or its error."""

        async def scenario(files: Files) -> None:
            written = await files.write_files({"a": "A", "b": b"B", ".": "x", "": "y"})
            assert [one.path for one in written] == ["a", "b", ".", ""]
            assert [type(one.error) for one in written] == [
                type(None), type(None), IsDirectory, InvalidRequest,
            ]  # fmt: skip
            read = await files.read_files(["a", "nope", "b", "", "."])
            assert [one.content for one in read] == [b"A", None, b"B", None, None]
            assert [type(one.error) for one in read] == [
                type(None), FileMissing, type(None), InvalidRequest, IsDirectory,
            ]  # fmt: skip
            assert await files.write_files([("a", "2")]) == [written[0]]
            assert await files.read_files([]) == []

        run(home, scenario)

    def test_bounds(self, home: Path) -> None:
        """At most 1,000 files at once, and file_bytes for all that is read together."""

        async def scenario(files: Files) -> None:
            for call in (files.read_files(["x"] * 1001), files.write_files([("x", "")] * 1001)):
                with pytest.raises(LimitExceeded) as caught:
                    await call
                assert caught.value.details["limit"] == "files_per_call"
            await files.write_files({"a": bytes(60), "b": bytes(60), "c": bytes(40)})
            read = await files.read_files(["a", "b", "c"])
            assert [one.content is None for one in read] == [False, True, False]
            assert isinstance(read[1].error, LimitExceeded)

        run(home, scenario, file_bytes=100)

    def test_a_dead_vm_is_not_asked_for_each(self, home: Path) -> None:
        """What ails the VM, not a path, is raised."""

        async def dead() -> socket.socket:
            raise VmStopped("stopped", reason="died")

        async def main() -> None:
            files = Files(dead, limits=Limits(), home=str(home))
            with pytest.raises(VmStopped):
                await files.read_files(["a", "b"])
            with pytest.raises(VmStopped):
                await files.write_files({"a": ""})
            files.close()

        asyncio.run(main())


class TestDirectories:
    def test_stat(self, home: Path) -> None:
        """stat says what there is, of a symlink itself too."""
        (home / "f").write_bytes(b"12345")
        (home / "f").chmod(0o640)
        os.utime(home / "f", ns=(0, 1_500_000_000_250_000_000))
        (home / "link").symlink_to("some/where")
        os.mkfifo(home / "fifo")

        async def scenario(files: Files) -> None:
            found = await files.stat("f")
            assert (found.path, found.type, found.size, found.mode) == (str(home / "f"), "file", 5, 0o640)
            assert (found.uid, found.gid, found.mtime, found.target) == (
                os.getuid(), os.getgid(), 1_500_000_000.25, None,
            )  # fmt: skip
            link = await files.stat("link")
            assert (link.type, link.target) == ("symlink", "some/where")
            assert (await files.stat(".")).is_directory
            assert (await files.stat("fifo")).type == "fifo"
            assert (await files.stat("/dev/null")).type == "char"
            with pytest.raises(FileMissing):
                await files.stat("nope")
            with pytest.raises(NotDirectory):
                await files.stat("f/x")

        run(home, scenario)

    def test_set_stat(self, home: Path) -> None:
        """Permissions and the time of the content, each by itself; of what a symlink points to."""
        (home / "f").write_bytes(b"x")
        os.utime(home / "f", ns=(1_400_000_000_000_000_000, 0))
        (home / "dir").mkdir()
        (home / "link").symlink_to("f")

        async def scenario(files: Files) -> None:
            await files.set_stat("f", mode=0o640)
            assert ((await files.stat("f")).mode, (await files.stat("f")).mtime) == (0o640, 0.0)
            await files.set_stat("link", mtime=1_500_000_000.25)
            assert ((await files.stat("f")).mode, (await files.stat("f")).mtime) == (0o640, 1_500_000_000.25)
            assert os.stat(home / "f").st_atime_ns == 1_400_000_000_000_000_000
            await files.set_stat("dir", mode=0o500, mtime=1)
            assert ((await files.stat("dir")).mode, (await files.stat("dir")).mtime) == (0o500, 1.0)
            await files.set_stat("dir")
            with pytest.raises(FileMissing):
                await files.set_stat("nope", mode=0o600)
            for wrong in ({"mode": 0o10000}, {"mode": True}, {"mtime": -1}, {"mtime": "1"}):
                with pytest.raises(InvalidRequest, match=r"^m(ode|time):"):
                    await files.set_stat("f", **wrong)  # type: ignore[arg-type]

        run(home, scenario)

    def test_symlink(self, home: Path) -> None:
        """It says what it was given; what is there stays, or is replaced as a whole, but no directory."""
        (home / "f").write_bytes(b"x")
        (home / "dir").mkdir()

        async def scenario(files: Files) -> None:
            for there in ("f", "dir"):
                with pytest.raises(FileExists):
                    await files.symlink("to", there)
            with pytest.raises(IsDirectory):
                await files.symlink("to", "dir", overwrite=True)
            for target in ("/etc/passwd", "../größe", " -x\n"):
                await files.symlink(target, "f", overwrite=True)
                assert os.readlink(home / "f") == target
            await files.symlink("nothing", "dir/new")
            assert sorted(await files.readdir(".")) == ["dir", "f"]
            assert await files.readdir("dir") == ["new"]
            with pytest.raises(FileMissing):
                await files.symlink("to", "no/such")
            with pytest.raises(FileError):
                await files.symlink("x" * 5000, "long")
            with pytest.raises(InvalidRequest, match=r"^target:"):
                await files.symlink("", "empty")

        run(home, scenario)

    def test_exists(self, home: Path) -> None:
        """exists follows symlinks."""
        (home / "f").touch()
        (home / "good").symlink_to("f")
        (home / "dangling").symlink_to("nope")
        (home / "loop").symlink_to("loop")

        async def scenario(files: Files) -> None:
            answers = [
                await files.exists(path) for path in (".", "f", "good", "dangling", "loop", "no", "f/x")
            ]
            assert answers == [True, True, True, False, False, False, False]

        run(home, scenario)

    def test_mkdir(self, home: Path) -> None:
        """mkdir works as mkdir -p does, or without parents as mkdir does."""
        (home / "file").touch()

        async def scenario(files: Files) -> None:
            await files.mkdir("a/b/c")
            await files.mkdir("a/b/c")
            await files.mkdir("a/b/c/")
            await files.mkdir("open", mode=0o777)
            await files.mkdir("plain", parents=False)
            await files.mkdir("/".join("d" * 1500))
            assert (await files.stat("open")).mode == 0o777
            for call, error in (
                (files.mkdir("plain", parents=False), FileExists),
                (files.mkdir("file"), FileExists),
                (files.mkdir("x/y", parents=False), FileMissing),
                (files.mkdir("file/x"), NotDirectory),
            ):
                with pytest.raises(error):
                    await call
            await files.delete_file("d", recursive=True)

        run(home, scenario)

    def test_readdir(self, home: Path) -> None:
        """Names and entries are sorted and complete; a directory is reached through a symlink, and at /."""
        (home / "d").mkdir()
        for name in ("b", "a", "c"):
            (home / "d" / name).write_text(name * 2)
        (home / "d/sub").mkdir()
        (home / "d/link").symlink_to("a")
        (home / "to-d").symlink_to("d")

        async def scenario(files: Files) -> None:
            assert await files.readdir("d") == ["a", "b", "c", "link", "sub"]
            assert await files.readdir("to-d/") == ["a", "b", "c", "link", "sub"]
            entries = await files.readdir_entries("d")
            assert [(one.name, one.type) for one in entries] == [
                ("a", "file"), ("b", "file"), ("c", "file"), ("link", "symlink"), ("sub", "directory"),
            ]  # fmt: skip
            assert (entries[0].path, entries[0].size) == (str(home / "d/a"), 2)
            assert await files.readdir("/") == sorted(os.listdir("/"))
            assert {one.path for one in await files.readdir_entries("/")} == {
                f"/{n}" for n in os.listdir("/")
            }
            for path, error in (("nope", FileMissing), ("d/a", NotDirectory)):
                for call in (files.readdir(path), files.readdir_entries(path), files.readdir_recursive(path)):
                    with pytest.raises(error):
                        await call
            for call in (files.readdir("d", max_entries=4), files.readdir_entries("d", max_entries=4)):
                with pytest.raises(LimitExceeded) as caught:
                    await call
                assert caught.value.details == {"limit": "max_entries", "value": 5, "maximum": 4}

        run(home, scenario)

    def test_readdir_recursive(self, home: Path) -> None:
        """All that is below, sorted by path; symlinks to directories are not entered."""
        (home / "t/a/b").mkdir(parents=True)
        (home / "t/a/b/f").write_text("123")
        (home / "t/a/up").symlink_to("..")
        (home / "t/z").touch()

        async def scenario(files: Files) -> None:
            entries = await files.readdir_recursive("t")
            assert [(one.path, one.name, one.type) for one in entries] == [
                (str(home / "t/a"), "a", "directory"),
                (str(home / "t/a/b"), "b", "directory"),
                (str(home / "t/a/b/f"), "f", "file"),
                (str(home / "t/a/up"), "up", "symlink"),
                (str(home / "t/z"), "z", "file"),
            ]
            with pytest.raises(LimitExceeded):
                await files.readdir_recursive("t", max_entries=4)

        run(home, scenario)

    def test_names_that_are_not_utf8(self, home: Path) -> None:
        """Any name goes both ways, as surrogate escapes."""
        odd = os.fsdecode(b"caf\xe9 \xff\n\xf0\x9f\x98\x80\x80")

        async def scenario(files: Files) -> None:
            await files.write_file(f"{odd}/{odd}", b"x")
            assert await files.readdir(".") == [odd]
            assert [one.path for one in await files.readdir_recursive(".")] == [
                f"{home}/./{odd}", f"{home}/./{odd}/{odd}",
            ]  # fmt: skip
            assert await files.read_file(f"{odd}/{odd}") == b"x"
            with pytest.raises(FileMissing) as caught:
                await files.stat(f"{odd}/no")
            assert odd in caught.value.details["path"]
            await files.move(odd, "plain")
            assert (await files.stat(f"plain/{odd}")).size == 1

        run(home, scenario)


class TestMoveAndDelete:
    def test_move(self, home: Path) -> None:
        """move is rename(2): onto a file, of a directory, of a symlink itself."""
        (home / "a").write_text("a")
        (home / "b").write_text("b")
        (home / "d/e").mkdir(parents=True)
        (home / "full/x").mkdir(parents=True)
        (home / "link").symlink_to("nowhere")

        async def scenario(files: Files) -> None:
            await files.move("a", "b")
            assert await files.read_file("b") == b"a"
            await files.move("d", "d2")
            await files.move("link", "link2")
            assert (await files.stat("link2")).target == "nowhere"
            for call, error, path in (
                (files.move("nope", "x"), FileMissing, "nope"),
                (files.move("b", "no/x"), FileMissing, "no/x"),
                (files.move("b", "d2"), IsDirectory, "d2"),
                (files.move("d2", "b"), NotDirectory, "b"),
                (files.move("d2", "full"), AgentOSError, "full"),
            ):
                with pytest.raises(error) as caught:
                    await call
                assert caught.value.details["path"] == str(home / path)

        run(home, scenario)
        assert sorted(os.listdir(home)) == ["b", "d2", "full", "link2"]

    def test_move_without_overwriting(self, home: Path) -> None:
        """overwrite=False never replaces anything."""
        for name in ("a", "b"):
            (home / name).write_text(name)
        (home / "d/x").mkdir(parents=True)
        (home / "empty").mkdir()
        (home / "link").symlink_to("nowhere")

        async def scenario(files: Files) -> None:
            for pair in ("a b", "a link", "a empty", "d empty", "d a", "a a"):
                source, target = pair.split()
                with pytest.raises(FileExists):
                    await files.move(source, target, overwrite=False)
            with pytest.raises(FileMissing):
                await files.move("nope", "c", overwrite=False)
            with pytest.raises(FileError):
                await files.move("d", "d/x/y", overwrite=False)
            await files.move("a", "c", overwrite=False)
            await files.move("d", "e", overwrite=False)
            await files.move("link", "f", overwrite=False)

        run(home, scenario)
        assert sorted(os.listdir(home)) == ["b", "c", "e", "empty", "f"]
        assert os.listdir(home / "e") == ["x"]

    def test_delete(self, home: Path) -> None:
        """A file, symlink or fifo is deleted itself; a directory only when asked for."""
        (home / "f").touch()
        (home / "d").mkdir()
        (home / "d/keep").touch()
        (home / "link").symlink_to("d")
        os.mkfifo(home / "fifo")

        async def scenario(files: Files) -> None:
            for path in ("f", "link", "fifo"):
                await files.delete_file(path)
            with pytest.raises(IsDirectory):
                await files.delete_file("d")
            with pytest.raises(FileMissing):
                await files.delete_file("f")
            with pytest.raises(FileMissing):
                await files.delete_file("f", recursive=True)
            await files.delete_file("f", missing_ok=True)
            await files.delete_file("f", recursive=True, missing_ok=True)
            for path in ("/", ".", "d/.."):
                with pytest.raises(FileError) as caught:
                    await files.delete_file(path, recursive=True)
                assert caught.value.details["errno"] == errno.EBUSY

        run(home, scenario)
        assert os.listdir(home) == ["d"]
        assert os.listdir(home / "d") == ["keep"]

    def test_delete_a_tree(self, home: Path) -> None:
        """All below goes; what a symlink in it points to stays."""
        (home / "outside").mkdir()
        (home / "outside/keep").touch()
        for number in range(3):
            (home / f"t/{number}/x/y").mkdir(parents=True)
            (home / f"t/{number}/f").touch()
            (home / f"t/{number}/x/link").symlink_to(home / "outside")
        (home / "to-t").symlink_to("t")

        async def scenario(files: Files) -> None:
            await files.delete_file("to-t", recursive=True)
            assert await files.exists("t/0")
            await files.delete_file("t/", recursive=True)

        run(home, scenario)
        assert os.listdir(home) == ["outside"]
        assert os.listdir(home / "outside") == ["keep"]


def hostile(*frames: bytes, then_read: bool = True) -> Callable[[int], None]:
    """A worker that says it is ready, answers the first request with `frames`, and nothing more."""

    def serve(fd: int) -> None:
        with socket.socket(fileno=fd) as sock:
            sock.sendall(READY)
            sock.recv(65536)
            for frame in frames:
                sock.sendall(frame)
            while then_read and sock.recv(65536):
                pass

    return serve


def framed(kind: int, body: bytes) -> bytes:
    return HEADER.pack(kind, len(body)) + body


READY = framed(REPLY, b"{}")


class TestHostileWorkers:
    @pytest.mark.parametrize(
        "frames",
        [
            b"HTTP/1.1 200 OK\r\n\r\n",
            HEADER.pack(REPLY, 2**32 - 1),
            HEADER.pack(DATA, 2**31),
            HEADER.pack(PAGE, filewire.JSON_BYTES + 1),
            framed(REPLY, b"nonsense"),
            framed(REPLY, b"\xff"),
            framed(REPLY, b"[]"),
            framed(REPLY, b"{}"),
            framed(REPLY, b"[" * 200_000),
            framed(REPLY, b"{}") + b"more",
            framed(REPLY, b'{"error": "no"}'),
            framed(REPLY, b'{"error": -1}'),
            framed(REPLY, b'{"error": 2, "path": 5}'),
            framed(REPLY, b'{"error": 2, "path": "\\ud800"}'),
            framed(DATA, b"data"),
            framed(PAGE, b"[]"),
            framed(
                REPLY, b'{"type":"alien","size":1,"mode":1,"uid":1,"gid":1,"mtime_ns":1}'
            ),
            framed(
                REPLY, b'{"type":"file","size":-1,"mode":1,"uid":1,"gid":1,"mtime_ns":1}'
            ),
            framed(
                REPLY, b'{"type":"file","size":1e300,"mode":1,"uid":1,"gid":1,"mtime_ns":1}'
            ),
        ],
    )  # fmt: skip
    def test_garbage(self, home: Path, frames: bytes) -> None:
        """Whatever a worker says instead of a stat is an error of the VM, at once, and ends the worker."""

        async def scenario(files: Files) -> None:
            with pytest.raises(VmError):
                await files.stat("f")

        assert run(home, scenario, pool=Pool(serve=hostile(frames))) is None

    @pytest.mark.parametrize(
        "page",
        [
            b'[".."]', b'["a/b"]', b'[""]', b'["\\u0000"]', b"[5]", b'["\\ud800"]', b"{}", b"null",
            b'["' + b"x" * 9000 + b'"]', b'["a","b","c"]',
        ],
    )  # fmt: skip
    def test_names_that_are_none(self, home: Path, page: bytes) -> None:
        """Nothing passes as a name that is not one, nor more names than were asked for."""

        async def scenario(files: Files) -> None:
            with pytest.raises(VmError):
                await files.readdir(".", max_entries=2)

        run(home, scenario, pool=Pool(serve=hostile(framed(PAGE, page))))

    @pytest.mark.parametrize(
        "page",
        [b'[["a/../../etc","file",1]]', b'[["/etc","file",1]]', b'[["a","alien",1]]', b'[["a","file"]]',
         b'[["a","file",-1]]', b'["a"]', b'[["a","file",true]]', b'[[["a"],"file",1]]', b'[["a",[],1]]'],
    )  # fmt: skip
    def test_entries_that_are_none(self, home: Path, page: bytes) -> None:
        """No entry leads out of the directory that was asked for."""

        async def scenario(files: Files) -> None:
            with pytest.raises(VmError):
                await files.readdir_recursive(".")

        run(home, scenario, pool=Pool(serve=hostile(framed(PAGE, page))))

    def test_more_bytes_than_asked_for(self, home: Path) -> None:
        """A reader gets no more than it wanted, whatever comes."""

        async def scenario(files: Files) -> None:
            for call in (files.read_file("f", length=3), drain(files), files.read_file("g")):
                with pytest.raises(VmError):
                    await call

        async def drain(files: Files) -> None:
            async for _ in files.read_file_stream("f", length=3):
                pass

        run(home, scenario, pool=Pool(serve=hostile(framed(DATA, b"1234"))), file_bytes=3)

    @pytest.mark.parametrize("frames", [b"", framed(REPLY, b"{}")[:3], framed(DATA, b"12345678")[:9]])
    def test_a_worker_that_stalls(self, home: Path, frames: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker that does nothing for the bound fails the operation, not the host."""
        monkeypatch.setattr(filewire, "PROGRESS_S", 0.1)

        async def scenario(files: Files) -> None:
            for call in (files.read_file("f"), files.exists("f"), files.delete_file("f")):
                with pytest.raises(VmError, match=r"did nothing for 0\.1 seconds"):
                    await call

        run(home, scenario, pool=Pool(serve=hostile(frames)))

    def test_a_worker_that_stops_taking(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A write whose bytes nobody takes fails after the bound."""
        monkeypatch.setattr(filewire, "PROGRESS_S", 0.1)

        def serve(fd: int) -> None:
            with socket.socket(fileno=fd) as sock:
                sock.sendall(READY)
                poll = select.poll()
                poll.register(fd, 0)  # nothing but the host's hanging up
                poll.poll()

        async def scenario(files: Files) -> None:
            with pytest.raises(VmError, match="did nothing"):
                await files.write_file("f", bytes(10_000_000))

        run(home, scenario, pool=Pool(serve=serve))

    def test_a_worker_that_never_gets_ready(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor is a worker waited for without end that never starts."""
        monkeypatch.setattr(filewire, "PROGRESS_S", 0.1)

        def silent(fd: int) -> None:
            with socket.socket(fileno=fd) as sock:
                sock.recv(1)

        async def scenario(files: Files) -> None:
            with pytest.raises(VmError, match="did nothing"):
                await files.exists("f")

        async def never() -> socket.socket:
            await asyncio.Event().wait()
            raise AssertionError

        async def main() -> None:
            files = Files(never, limits=Limits())
            with pytest.raises(VmError, match="could be started"):
                await files.exists("f")
            files.close()

        run(home, scenario, pool=Pool(serve=silent))
        asyncio.run(main())

    def test_an_early_answer_to_a_write_that_is_no_error(self, home: Path) -> None:
        """A worker that answers before the end, without an error, is not believed."""

        def endless() -> Iterator[bytes]:
            while True:
                yield bytes(100_000)

        async def scenario(files: Files) -> None:
            with pytest.raises(VmError):
                await files.write_file_stream("f", endless())

        run(home, scenario, pool=Pool(serve=hostile(framed(REPLY, b"{}"))))

    def test_a_worker_killed_while_it_reads_or_writes(self, home: Path) -> None:
        """A killed worker fails its operation, the next one has a new worker. No temporary stays."""
        with open(home / "big", "wb") as file:
            file.truncate(1 << 30)
        (home / "f").write_bytes(b"old")

        async def scenario(files: Files) -> None:
            async def kill_while_reading() -> None:
                async for _ in files.read_file_stream("big"):
                    os.kill(pool.pids[-1], 9)

            with pytest.raises(VmError, match="ended"):
                await kill_while_reading()

            def chunks() -> Iterator[bytes]:
                for number in range(1000):
                    if number == 10:
                        os.kill(pool.pids[-1], 9)
                    yield bytes(100_000)

            with pytest.raises(VmError, match="ended"):
                await files.write_file_stream("f", chunks())
            assert await files.read_file("f") == b"old"
            assert await files.readdir(".") == ["big", "f"]

        pool = Pool()
        run(home, scenario, pool=pool)

    def test_a_worker_killed_while_idle(self, home: Path) -> None:
        """An idle worker's death is not noticed by the next operation: it gets a new one."""

        async def scenario(files: Files) -> None:
            await files.write_file("f", b"x")
            os.kill(pool.pids[0], 9)
            await end_of(pool.pids[0])
            assert await files.read_file("f") == b"x"
            assert len(pool.pids) == 2

        pool = Pool()
        run(home, scenario, pool=pool)


class TestWorkers:
    def test_few_workers(self, home: Path) -> None:
        """Many operations at once share four workers."""

        async def scenario(files: Files) -> None:
            await asyncio.gather(*(files.write_file(f"{number}", "x") for number in range(100)))
            assert len(pool.pids) <= fileworkers.WORKERS
            assert len(await files.readdir(".")) == 100

        pool = Pool()
        run(home, scenario, pool=pool)

    def test_first_come_first_served(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Operations get their worker in the order they came."""
        monkeypatch.setattr(fileworkers, "WORKERS", 1)
        order: list[int] = []

        async def scenario(files: Files) -> None:
            async def one(number: int) -> None:
                await files.write_file(f"{number}", str(number))
                order.append(number)

            await asyncio.gather(*map(one, range(50)))

        run(home, scenario)
        assert order == list(range(50))

    def test_idle_workers_are_closed(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker that nobody needs for a while ends."""
        monkeypatch.setattr(fileworkers, "IDLE_S", 0.05)

        async def scenario(files: Files) -> None:
            await files.exists("f")
            await files.exists("f")
            assert len(pool.pids) == 1
            await end_of(pool.pids[0])
            await files.exists("f")
            assert len(pool.pids) == 2

        pool = Pool()
        run(home, scenario, pool=pool)

    def test_close_ends_what_is_under_way_and_what_waits(self, home: Path) -> None:
        """close leaves nobody hanging: readers, idle streams, those who wait for a worker, later calls."""
        with open(home / "big", "wb") as file:
            file.truncate(1 << 30)

        async def scenario(files: Files) -> None:
            streams = [files.read_file_stream("big") for _ in range(fileworkers.STREAM_WORKERS)]
            for stream in streams:
                await anext(stream)
            busy = asyncio.ensure_future(files.read_file("big"))
            waiting = [asyncio.ensure_future(files.exists("big")) for _ in range(3)]
            waiting.append(asyncio.ensure_future(anext(files.read_file_stream("big"))))  # type: ignore[arg-type]
            await asyncio.sleep(0.05)
            cancelled = waiting.pop(1)
            cancelled.cancel()
            files.close()
            files.close()
            for one in (busy, *waiting):
                with pytest.raises(VmStopped):
                    await one
            for stream in streams:
                with pytest.raises(VmStopped):
                    await anext(stream)
            with pytest.raises(VmStopped):
                await files.exists("big")

        run(home, scenario, pool=Pool(), file_bytes=1 << 31)

    def test_cancelling_those_who_wait(self, home: Path) -> None:
        """A cancelled operation that waited for a worker takes no place with it."""
        (home / "f").write_bytes(bytes(3_000_000))

        async def scenario(files: Files) -> None:
            for _ in range(20):
                tasks = [asyncio.ensure_future(files.read_file("f")) for _ in range(12)]
                await asyncio.sleep(0.001)
                for task in tasks[::2]:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(one, bytes | asyncio.CancelledError) for one in results)
            assert len(await files.read_file("f")) == 3_000_000

        run(home, scenario, pool=Pool())

    def test_the_event_loop_is_never_blocked(self, home: Path) -> None:
        """No call of the host side blocks, whatever it does."""
        blockbuster = pytest.importorskip("blockbuster")

        async def scenario(files: Files) -> None:
            await files.exists(".")
            with blockbuster.blockbuster_ctx("agentos.machine"):
                await files.write_file("f", bytes(3_000_000))
                assert len(await files.read_file("f")) == 3_000_000
                await files.write_file_stream("g", [b"x"] * 3)
                async for _ in files.read_file_stream("g"):
                    pass
                await files.readdir_recursive(".")
                await files.move("f", "h")
                await files.delete_file("h")

        run(home, scenario)


def test_the_worker_imports_only_light_modules() -> None:
    """Every VM carries the worker's code: a listed handful of standard modules."""
    import ast

    allowed = {"__future__", "collections.abc", "errno", "json", "os", "socket", "stat", "struct", "typing"}
    ours = {"agentos.machine.filetarget", "agentos.machine.filetree"}
    directory = Path(fileserver.__file__).parent
    for name in ("fileserver", "filetarget", "filetree"):
        tree = ast.parse((directory / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.module in allowed | ours
