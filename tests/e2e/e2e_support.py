"""What several tests of the embedded VM need: readers of output, views from the host, and what this host can do."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from agentos import VM, Process, Shell

MUST_RUN = os.environ.get("AGENTOS_TESTS_MUST_RUN") == "1"

as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs cgroups or a whole range of ids, which root has"
)


def needs_program(*names: str) -> pytest.MarkDecorator:
    """Skips where a program is not installed; with AGENTOS_TESTS_MUST_RUN=1 the test runs, and fails of it."""
    missing = [name for name in names if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing) and not MUST_RUN, reason=f"needs {', '.join(missing)}")


def absent(why: str) -> None:
    """Skip a test that cannot run for want of something; with AGENTOS_TESTS_MUST_RUN=1 it has failed."""
    if MUST_RUN:
        pytest.fail(why)
    pytest.skip(why)


class Transcript:
    """Reads the output of a process or shell as it comes, and keeps all of it."""

    def __init__(self, source: Process | Shell, cursor: int = 0) -> None:
        self._source = source
        self.cursor = cursor
        self.data = b""
        self.skipped = 0
        self.exited = False
        self._seen = 0

    async def more(self) -> bool:
        """Read what follows, waiting for it. False at the end."""
        read = self._source.read if isinstance(self._source, Shell) else self._source.read_output
        page = await read(self.cursor, wait=60)
        self.cursor = page.cursor
        self.skipped += page.skipped
        self.exited = page.exited
        self.data += b"".join(event.data for event in page.events)
        return not page.exited

    async def until(self, pattern: bytes) -> re.Match[bytes]:
        """Wait for `pattern` in what follows the previous match. AssertionError when the output ends without it."""
        wanted = re.compile(pattern, re.DOTALL)
        while True:
            found = wanted.search(self.data, self._seen)
            if found:
                self._seen = found.end()
                return found
            if self.exited or not await self.more():
                found = wanted.search(self.data, self._seen)
                assert found, f"{pattern!r} never came; the end is {self.data[self._seen :][-2000:]!r}"

    async def to_end(self) -> bytes:
        """Read to the end."""
        while await self.more():
            pass
        return self.data


async def commands(vm: VM) -> list[str]:
    """Every process of the VM that runs, as one line of text (a dead one may wait to be reaped)."""
    return [" ".join((one.command, *one.args)) for one in await vm.all_processes() if one.status == "running"]


async def still_works(vm: VM) -> None:
    """The VM answers as if nothing had happened."""
    result = await vm.exec("echo ok")
    assert (result.stdout, result.exit_code, result.reason) == ("ok\n", 0, "exited")


async def size_of(vm: VM, path: str) -> int:
    """The size of a file in the VM."""
    return (await vm.files.stat(path)).size


async def assert_stands_still(vm: VM, path: str, *, beat: float = 0.01) -> None:
    """The file at `path`, to which a process wrote every `beat` seconds, no longer grows."""
    before = await size_of(vm, path)
    await asyncio.sleep(20 * beat)  # in which a living writer would have written twenty times
    assert await size_of(vm, path) == before > 0


def host_processes(marker: str) -> list[int]:
    """Pids of this host's processes that have `marker` in their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in arguments:
                found.append(int(entry.name))
    return found


def descendants(pid: int) -> list[int]:
    """Pids of all living descendants of a process of this host."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    pending = [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def status_of(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def parent_of(pid: int) -> int:
    """The parent of a process of this host, 0 when it has ended: processes that make a VM live for milliseconds."""
    try:
        return int(status_of(pid)["PPid"])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process of this host, without what it shares with others through files."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def peak_rss_bytes() -> int:
    """The greatest resident size of this process since `reset_peak`."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def reset_peak() -> None:
    """Begin anew with `peak_rss_bytes`."""
    Path("/proc/self/clear_refs").write_text("5")


def open_descriptors(pid: int | str = "self") -> int:
    """How many descriptors a process of this host has open; 0 where only root may look: at a VM's processes."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except PermissionError:
        if os.geteuid() == 0:
            raise
        return 0


async def ended(pids: list[int]) -> None:
    """Wait until each of these processes of the host has ended."""
    loop = asyncio.get_running_loop()
    waiting: list[Any] = []
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        gone = loop.create_future()
        loop.add_reader(pidfd, _note_end, loop, pidfd, gone)
        waiting.append(gone)
    for gone in waiting:
        await gone


def _note_end(loop: asyncio.AbstractEventLoop, pidfd: int, gone: asyncio.Future[None]) -> None:
    loop.remove_reader(pidfd)
    os.close(pidfd)
    gone.set_result(None)


async def one_id(vm: VM) -> bool:
    """Whether VMs have a single id here: their root is agentos under another name."""
    return (await vm.exec("cat /proc/self/uid_map")).stdout.split()[2] == "1"
