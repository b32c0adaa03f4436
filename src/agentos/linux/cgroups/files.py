"""Control files and the processes in a cgroup directory: what versions 1 and 2 have in common."""

from __future__ import annotations

import errno
import os
import select
import signal
import time

_BATCH = 64
"""Processes held by pidfd at once: a VM may have more of them than this process may have descriptors."""


def failed(error: OSError, what: str, path: str) -> OSError:
    """`error` again as a plain OSError that names `path` and, in a note, what was tried."""
    again = OSError(error.errno, error.strerror or os.strerror(error.errno or 0), path)
    again.add_note(f"{what} {path}")
    return again


def write(path: str, value: str | int) -> None:
    """Write `value` to control file `path` in one call. Raises OSError with a note naming the file."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise failed(error, f"write {value!r} to", path) from None


def read(path: str) -> str:
    """All of control file `path`. Raises OSError with a note naming the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            pieces = []
            while piece := os.read(fd, 65536):
                pieces.append(piece)
        finally:
            os.close(fd)
    except OSError as error:
        raise failed(error, "read", path) from None
    return b"".join(pieces).decode("ascii", "replace")


def open_changing(path: str) -> int:
    """A descriptor of control file `path`, read once: it is ready (EPOLLPRI) when the file changes next."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.read(fd, 65536)
    except OSError as error:
        raise failed(error, "open", path) from None
    return fd


def read_int(path: str) -> int | None:
    """The number in control file `path`; None where the file is not there (or says `max`)."""
    try:
        text = read(path).strip()
    except FileNotFoundError:
        return None
    return int(text) if text.lstrip("-").isdigit() else None


def read_key(path: str, key: str) -> int | None:
    """The number after `key` in flat keyed file `path`; None where file or key is not there."""
    try:
        text = read(path)
    except FileNotFoundError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return None


class Figure:
    """The number after `key` in flat keyed file `path`, less `base`: held open, so that a look is one call."""

    __slots__ = ("_base", "_fd", "_key", "_last")

    def __init__(self, path: str, key: str, base: int = 0) -> None:
        self._key = b"\n" + key.encode() + b" "
        self._base = base
        self._last = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise failed(error, "open", path) from None

    def read(self) -> int:
        """The number now; the last one once the cgroup is gone, or after `close`."""
        if self._fd >= 0:
            try:
                _, found, rest = (b"\n" + os.pread(self._fd, 4096, 0)).partition(self._key)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                self.close()
            else:
                self._last = int(rest.partition(b"\n")[0]) - self._base if found else 0
        return self._last

    def close(self) -> None:
        """Close the file: before the cgroup may be another's."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def mkdir(path: str) -> None:
    """Make cgroup `path`. Raises OSError with a note naming it."""
    try:
        os.mkdir(path, 0o755)
    except OSError as error:
        raise failed(error, "mkdir", path) from None


def processes(path: str) -> list[int]:
    """Pids in cgroup `path`, none where it is gone. A pid of 0 is a process outside our pid namespace."""
    try:
        return [int(line) for line in read(path + "/cgroup.procs").split()]
    except OSError as error:
        # ENODEV: removed between open and read.
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise


def _open_pidfds(pids: list[int]) -> dict[int, int]:
    handles = {}
    for pid in pids[:_BATCH]:
        try:
            handles[pid] = os.pidfd_open(pid)
        except OSError as error:
            # Gone, or (EINVAL) not visible from here.
            if error.errno not in (errno.ESRCH, errno.EINVAL):
                raise
    return handles


def kill_processes(path: str) -> bool:
    """Send SIGKILL to every process now in cgroup `path`. Says whether there was any.

    A pid read from a list may since belong to another process, so the signal goes through a pidfd, and
    only if the list still names that pid after the pidfd was opened.
    """
    listed = processes(path)
    for start in range(0, len(listed), _BATCH):
        handles = _open_pidfds(listed[start : start + _BATCH])
        try:
            for pid in set(processes(path)) & set(handles):
                try:
                    signal.pidfd_send_signal(handles[pid], signal.SIGKILL)
                except ProcessLookupError:
                    pass
        finally:
            for fd in handles.values():
                os.close(fd)
    return bool(listed)


def wait_empty(path: str, deadline: float) -> bool:
    """Wait until no process is in cgroup `path`, at most until monotonic `deadline`. Says whether so.

    Waits for the processes themselves (pidfds): version 1 has no event for an emptied cgroup.
    """
    while listed := processes(path):
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        handles = _open_pidfds(listed)
        try:
            if handles:
                poll = select.poll()
                for fd in handles.values():
                    poll.register(fd, select.POLLIN)
                # One that exits wakes us, though others remain; the loop then looks again.
                ready = poll.poll(left * 1000)
                if not ready:
                    return False
        finally:
            for fd in handles.values():
                os.close(fd)
        # A process is listed for a moment after its pidfd is readable, and a zombie leader for longer.
        time.sleep(0.001)
    return True


def remove(path: str, deadline: float) -> None:
    """Remove cgroup directory `path`; that it is gone already is no error.

    Where processes are still on their way out of it (EBUSY) waits for them, at most until monotonic
    `deadline`. Raises OSError EBUSY with a note after that.
    """
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or not wait_empty(path, deadline) or time.monotonic() >= deadline:
                raise failed(error, "rmdir", path) from None
        # The list of processes empties a moment before the kernel lets the directory go.
        time.sleep(0.001)


def children(path: str) -> list[str]:
    """Names of the cgroups directly in cgroup `path`; none where it is gone."""
    try:
        with os.scandir(path) as entries:
            return sorted(one.name for one in entries if one.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def destroy(paths: list[str], deadline: float) -> None:
    """Kill what is in cgroups `paths` and in those under them, and remove them all.

    `paths` are one cgroup in each of its hierarchies. Raises OSError EBUSY with a note where that takes
    longer than until monotonic `deadline`.
    """
    for path in paths:
        _make_killable(path)
    for path in paths:
        _kill_and_remove(path, deadline)


def _make_killable(path: str) -> None:
    """Forbid forks, thaw and (version 2) kill, with those of the control files that are in this hierarchy."""
    for name, value in (("pids.max", 0), ("freezer.state", "THAWED"), ("cgroup.kill", 1)):
        try:
            write(f"{path}/{name}", value)
        except OSError:
            # Not in this hierarchy, or gone. What is alive afterwards is killed one by one.
            pass
    for name in children(path):
        _make_killable(f"{path}/{name}")


def _kill_and_remove(path: str, deadline: float) -> None:
    for name in children(path):
        _kill_and_remove(f"{path}/{name}", deadline)
    # Again and again: what is being killed may have forked since the list was read.
    while kill_processes(path) and time.monotonic() < deadline:
        wait_empty(path, min(deadline, time.monotonic() + 0.1))
    remove(path, deadline)
