"""Hostile objects in a VM's files, and hostile output: every action answers, with a typed error or the truth.

What blocks here would block the event loop or a worker for good: the time limit of the tests is what would tell.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agentos import VM, Host, Limits
from agentos.errors import AgentOSError, FileError, LimitExceeded

HOME = "/home/agentos"
ENTRIES = 200_000
"""In one directory. A million are more than disk_files by default."""
GROWTH_BYTES = 96 * 1024 * 1024
"""What the host process may grow by while it handles any of these."""

OBJECTS = f"""
cd {HOME}
mkfifo fifo
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
ln -s /dev/zero endless
ln -s /dev/tty terminal
ln -s /dev/ptmx multiplexer
ln -s loop loop
ln -s /proc/self/mem memory
ln -s /proc/self/fd/3 descriptor
ln -s /proc/1/root/etc/shadow init
ln -s /root/secret denied
ln -s /etc/shadow shadow
mkdir closed && touch closed/file && chmod 0 closed
truncate -s 1T sparse
"""
NAMES = (
    "fifo", "socket", "endless", "terminal", "multiplexer", "loop", "memory", "descriptor", "init", "denied", "shadow",
    "closed/file",
)  # fmt: skip


def run(body: Callable[[VM], Awaitable[Any]], *, limit: float = 55, **limits: int) -> None:
    """Run `body` with a VM of its own host, and see that this process has not grown."""

    async def main() -> None:
        async with asyncio.timeout(limit), Host() as host, VM(host=host, limits=Limits(**limits)) as vm:
            await body(vm)
            assert (await vm.exec("echo ok")).stdout == "ok\n"

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    asyncio.run(main())
    assert resident("VmHWM") - before < GROWTH_BYTES


def resident(field: str) -> int:
    """A field of this process's memory, in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


async def few() -> AsyncIterator[bytes]:
    """A short source of a stream."""
    yield b"data"


async def read(vm: VM, path: str) -> object:
    return await vm.files.read_file(path)


async def read_stream(vm: VM, path: str) -> object:
    return [piece async for piece in vm.files.read_file_stream(path)]


async def write(vm: VM, path: str) -> object:
    return await vm.files.write_file(path, "data")


async def append(vm: VM, path: str) -> object:
    return await vm.files.write_file(path, "data", append=True)


async def write_stream(vm: VM, path: str) -> object:
    return await vm.files.write_file_stream(path, few())


async def list_it(vm: VM, path: str) -> object:
    return await vm.files.readdir(path)


async def list_below(vm: VM, path: str) -> object:
    return await vm.files.readdir_recursive(path)


async def make(vm: VM, path: str) -> object:
    return await vm.files.mkdir(path, parents=False)


@pytest.mark.parametrize(
    "action", [read, read_stream, write, append, write_stream, list_it, list_below, make]
)
def test_what_is_no_file_is_refused(action: Callable[[VM, str], Awaitable[object]]) -> None:
    """A fifo without a writer, a socket, a device, a loop, what belongs to another: a FileError each, at once."""

    async def body(vm: VM) -> None:
        made = await vm.exec(OBJECTS)
        assert made.exit_code == 0, made.stderr
        # With a single id the VM's root is its user: what is root's is no other's.
        single = (await vm.exec("stat -c %u /root")).stdout != "0\n"
        for name in NAMES:
            if single and name in ("denied", "shadow"):
                continue
            with pytest.raises(FileError):
                await action(vm, f"{HOME}/{name}")

    run(body)


def test_what_is_no_file_can_be_looked_at_moved_and_deleted() -> None:
    """None of that opens it or goes through it."""

    async def body(vm: VM) -> None:
        await vm.exec(OBJECTS)
        types = {entry.name: entry.type for entry in await vm.files.readdir_entries(HOME)}
        assert (types["fifo"], types["socket"], types["memory"]) == ("fifo", "socket", "symlink")
        for name in NAMES[:-1]:
            await vm.files.stat(f"{HOME}/{name}")
            await vm.files.exists(f"{HOME}/{name}")
            await vm.files.move(f"{HOME}/{name}", f"{HOME}/moved")
            await vm.files.delete_file(f"{HOME}/moved")
        many = await vm.files.read_files([f"{HOME}/.bashrc", f"{HOME}/closed/file", "/dev/zero"])
        assert [one.error is None for one in many] == [True, False, False]

    run(body)


def test_a_sparse_terabyte() -> None:
    """Is said to be too large, read in part, and streamed for as long as somebody wants to."""

    async def body(vm: VM) -> None:
        await vm.exec(OBJECTS)
        with pytest.raises(LimitExceeded):
            await vm.files.read_file(f"{HOME}/sparse")
        assert await vm.files.read_file(f"{HOME}/sparse", offset=2**39, length=10) == bytes(10)
        got = 0
        async for piece in vm.files.read_file_stream(f"{HOME}/sparse"):
            got += len(piece)
            if got > 200_000_000:
                break
        await vm.files.move(f"{HOME}/sparse", "/dev/shm/sparse")  # to another mount: copied, holes and all
        assert (await vm.files.stat("/dev/shm/sparse")).size == 2**40

    run(body)


SWAPS = """
import ctypes, os
os.makedirs("a", exist_ok=True)
open("a/file", "w").write("inside")
os.symlink("/usr/share", "b")
os.mkfifo("fifo")
open("plain", "w").write("x" * 1000)
exchange = ctypes.CDLL(None).renameat2
print("ready", flush=True)
size = 0
while True:
    exchange(-100, b"a", -100, b"b", 2)
    exchange(-100, b"fifo", -100, b"plain", 2)
    size = (size + 4096) % 1_000_000
    os.truncate("growing", size) if os.path.exists("growing") else open("growing", "w").close()
"""


def test_what_changes_while_it_is_used() -> None:
    """Directory and link, fifo and file change places, a file grows and shrinks: each call ends."""

    async def body(vm: VM) -> None:
        swapper = await vm.spawn("python3", ["-c", SWAPS], cwd=HOME)
        await swapper.read_output(0, wait=20)
        files = vm.files
        for turn in range(150):
            for step in (
                files.read_file(f"{HOME}/a/file"), files.read_file(f"{HOME}/plain"), files.read_file(f"{HOME}/growing"),
                files.write_file(f"{HOME}/a/new-{turn}", "x"), files.readdir_recursive(HOME),
                files.move(f"{HOME}/a/new-{turn}", f"{HOME}/moved"), files.delete_file(f"{HOME}/a/new-{turn}"),
                files.stat(f"{HOME}/a/file"), files.write_file(f"{HOME}/plain", "y", append=True),
            ):  # fmt: skip
                with suppress(AgentOSError):
                    await step
        await swapper.kill()
        names = await files.readdir("/usr/share")
        assert not [name for name in names if name.startswith(("new-", "moved"))]

    run(body)


REFILLS = """
import os
print("ready", flush=True)
number = 0
while True:
    number += 1
    try:
        os.makedirs(f"tree/{number % 7}/deep/er", exist_ok=True)
        open(f"tree/{number % 7}/{number}", "w").close()
    except OSError:
        pass
"""


def test_a_tree_that_is_filled_while_it_is_deleted() -> None:
    """The deletion ends: with success, or with an error that names what it could not delete."""

    async def body(vm: VM) -> None:
        filler = await vm.spawn("python3", ["-c", REFILLS], cwd=HOME)
        await filler.read_output(0, wait=20)
        for _ in range(5):
            with suppress(FileError):
                await vm.files.delete_file(f"{HOME}/tree", recursive=True)
            with suppress(FileError):
                await vm.files.readdir_recursive(f"{HOME}/tree")
        await filler.kill()
        await vm.files.delete_file(f"{HOME}/tree", recursive=True, missing_ok=True)

    run(body)


def test_names() -> None:
    """Not UTF-8, with newlines and escape sequences, as long as can be, and as deep."""
    code = (
        "import os\nfor n in (b'\\xff\\xfe', b'a\\nb', b'\\x1b[2J', b'-rf', b'x' * 255):\n"
        " open(n, 'w').write('in it')\n"
        "for _ in range(1500):\n os.mkdir('d'); os.chdir('d')\n"
    )

    async def body(vm: VM) -> None:
        await vm.files.mkdir(f"{HOME}/odd")
        made = await vm.exec_file("python3", ["-c", code], cwd=f"{HOME}/odd")
        assert made.exit_code == 0, made.stderr
        names = await vm.files.readdir(f"{HOME}/odd")
        assert {os.fsdecode(b"\xff\xfe"), "a\nb", "\x1b[2J", "-rf", "x" * 255, "d"} == set(names)
        for name in names:
            if name != "d":
                assert await vm.files.read_file(f"{HOME}/odd/{name}") == b"in it"
        assert len(await vm.files.readdir_recursive(f"{HOME}/odd")) == 1505
        await vm.files.delete_file(f"{HOME}/odd", recursive=True)
        assert not await vm.files.exists(f"{HOME}/odd")

    run(body)


@pytest.mark.timeout(120)
def test_very_many_entries() -> None:
    """A directory of 200,000 links: listed within its bound or refused, and deleted; others are served meanwhile."""
    code = f"import os\nos.mkdir('many')\nfor n in range({ENTRIES}): os.symlink('x', f'many/{{n}}')"

    async def body(vm: VM) -> None:
        made = await vm.exec_file("python3", ["-c", code], cwd=HOME)
        assert made.exit_code == 0, made.stderr
        with pytest.raises(LimitExceeded):
            await vm.files.readdir_recursive(HOME)
        listing = asyncio.ensure_future(vm.files.readdir(f"{HOME}/many"))
        turns = 0
        while not listing.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(listing.result()) == ENTRIES
        assert turns > 20
        await vm.files.delete_file(f"{HOME}/many", recursive=True)
        assert not await vm.files.exists(f"{HOME}/many")

    run(body, limit=110, disk_files=ENTRIES + 10_000)


def test_a_terminal_that_floods_and_one_that_nobody_reads() -> None:
    """Escape sequences, a line without an end, both directions at once, closed early: the scrollback stays bounded."""

    async def body(vm: VM) -> None:
        flood = "import sys\nwhile True: sys.stdout.write('\\x1b[2J\\x07' + 'x' * 100_000)"
        shell = await vm.open_shell("python3", ["-c", flood])
        cursor = 0
        for _ in range(20):
            page = await shell.read(cursor, wait=10)
            cursor = page.cursor
            assert sum(len(event.data) for event in page.events) <= 4 * 1024 * 1024
        await shell.close()
        deaf = await vm.open_shell("python3", ["-c", "import time, tty; tty.setraw(0); time.sleep(1000)"])
        writing = asyncio.ensure_future(deaf.write("x" * 3_000_000))
        assert (await vm.exec("echo meanwhile")).stdout == "meanwhile\n"
        await deaf.close()
        with suppress(AgentOSError):
            await writing
        gone = await vm.open_shell("bash", ["-c", "exec <&- >&- 2>&-; sleep 0.1"])
        await gone.wait()

    run(body)


def test_ten_thousand_children_that_write_and_end() -> None:
    """Output of very many short-lived programs is bounded like any other, and none of them stays."""
    code = "for i in $(seq 10000); do (echo $i; echo $i >&2) & [ $((i % 100)) = 0 ] && wait; done; wait"

    async def body(vm: VM) -> None:
        result = await vm.exec(code, timeout=50, max_output_bytes=10_000)
        assert (result.exit_code, len(result.stdout), result.stdout_truncated) == (0, 10_000, True)
        assert not [one for one in await vm.all_processes() if one.status == "running"]

    run(body)


def test_a_process_table_too_large_for_one_message() -> None:
    """Hundreds of processes with arguments of control characters, each of which takes six bytes to say."""
    code = (
        "import os, sys\nargs = [sys.executable, '-c', 'import time; time.sleep(1000)', '\\x01' * 60_000]\n"
        "for _ in range(300): os.posix_spawn(sys.executable, args, {})\nprint('ready', flush=True)\n"
        "import time; time.sleep(1000)"
    )

    async def body(vm: VM) -> None:
        process = await vm.spawn("python3", ["-c", code])
        await process.read_output(0, wait=40)
        assert (
            len([one for one in await vm.all_processes() if len(one.args) == 3 and "\x01" in one.args[2]])
            == 300
        )
        await process.kill()

    run(body, live_processes=10)
