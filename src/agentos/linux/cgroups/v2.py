"""Controllers of cgroup version 2 (Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import errno
import os
import select
import time

from agentos.linux.cgroups import none
from agentos.linux.cgroups.files import Figure, open_changing, read, read_int, read_key, write

_MIB = 1024 * 1024


def add(path: str, pid: int) -> None:
    """Move process `pid`, all threads, into cgroup `path`.

    May wait milliseconds for an RCU grace period: version 2 has no way round it for a process that
    exists, unless the host mounts the hierarchy with `favordynmods` (Linux 6.0).
    """
    write(path + "/cgroup.procs", pid)


def join_file(path: str) -> str:
    """The control file of `join`."""
    return path + "/cgroup.procs"


def join(path: str) -> None:
    """Move the calling process into cgroup `path`. As slow as `add`."""
    write(join_file(path), 0)


def kill(path: str) -> bool:
    """Kill all processes of cgroup `path` at once. Says whether the kernel can (Linux 5.14)."""
    try:
        write(path + "/cgroup.kill", 1)
    except FileNotFoundError:
        return False
    return True


class Memory(none.Memory):
    """An out-of-memory kill takes one process, not the whole VM: memory.oom.group stays 0, its default."""

    def probe(self) -> frozenset[str]:
        swap = os.path.exists(self.path + "/memory.swap.max")
        self.set_limit(64 * _MIB, swap=swap)
        if (found := read_int(self.path + "/memory.max")) != 64 * _MIB:
            raise none.unlike(self.path + "/memory.max", 64 * _MIB, found)
        if swap and (found := read_int(self.path + "/memory.swap.max")) != 0:
            raise none.unlike(self.path + "/memory.swap.max", 0, found)
        return frozenset(("memory", "swap") if swap else ("memory",))

    def set_limit(self, limit_bytes: int | None, *, swap: bool) -> None:
        write(self.path + "/memory.max", "max" if limit_bytes is None else limit_bytes)
        if swap:
            write(self.path + "/memory.swap.max", "max" if limit_bytes is None else 0)

    def used(self) -> int | None:
        return read_int(self.path + "/memory.current")

    def peak(self) -> int | None:
        # Linux 5.19.
        return read_int(self.path + "/memory.peak")

    def oom_kills(self) -> int:
        return read_key(self.path + "/memory.events", "oom_kill") or 0

    def open_oom_kills(self, base: int) -> Figure | None:
        return Figure(self.path + "/memory.events", "oom_kill", base)

    def alarm(self) -> tuple[int, int] | None:
        return open_changing(self.path + "/memory.events"), select.EPOLLPRI

    def drop_cache(self) -> None:
        try:
            write(self.path + "/memory.reclaim", self.used() or 0)
        except OSError as error:
            # EAGAIN: less was reclaimed than asked for. ENOENT: before Linux 5.19.
            if error.errno not in (errno.EAGAIN, errno.ENOENT):
                raise


class Pids(none.Pids):
    """The process number controller."""

    def probe(self) -> frozenset[str]:
        self.set_limit(16)
        if (found := read_int(self.path + "/pids.max")) != 16:
            raise none.unlike(self.path + "/pids.max", 16, found)
        return frozenset(("pids",))

    def set_limit(self, limit: int | None) -> None:
        write(self.path + "/pids.max", "max" if limit is None else limit)

    def current(self) -> int | None:
        return read_int(self.path + "/pids.current")

    def limit_hits(self) -> int:
        return read_key(self.path + "/pids.events", "max") or 0

    def alarm(self) -> tuple[int, int] | None:
        return open_changing(self.path + "/pids.events"), select.EPOLLPRI


class Cpu(none.Cpu):
    """The CPU controller."""

    def probe(self) -> frozenset[str]:
        self.set_weight(50)
        if (found := read_int(self.path + "/cpu.weight")) != 50:
            raise none.unlike(self.path + "/cpu.weight", 50, found)
        if not os.path.exists(self.path + "/cpu.max"):
            return frozenset(("cpu_weight",))
        self.set_cores(0.01)
        if (text := read(self.path + "/cpu.max").strip()) != "1000 100000":
            raise none.unlike(self.path + "/cpu.max", "1000 100000", text)
        return frozenset(("cpu_weight", "cpu_cores"))

    def set_cores(self, cores: float | None) -> None:
        if cores is None:
            write(self.path + "/cpu.max", "max 100000")
        else:
            write(self.path + "/cpu.max", "{} {}".format(*none.quota_us(cores)))

    def set_weight(self, weight: int) -> None:
        write(self.path + "/cpu.weight", weight)


class Account(none.Account):
    """cpu.stat, which is there without the CPU controller."""

    def probe(self) -> frozenset[str]:
        read(self.path + "/cpu.stat")
        return frozenset()

    def cpu_time_ns(self) -> int | None:
        used = read_key(self.path + "/cpu.stat", "usage_usec")
        return None if used is None else used * 1000


class Freezer(none.Freezer):
    """cgroup.freeze (Linux 5.2). A frozen process dies of SIGKILL."""

    def probe(self) -> frozenset[str]:
        if not self.freeze(time.monotonic() + 1):
            raise none.unlike(self.path + "/cgroup.events", "frozen 1", "frozen 0")
        self.thaw()
        return frozenset()

    def freeze(self, deadline: float) -> bool:
        events = self.path + "/cgroup.events"
        # Opened before the request, so that no event is missed.
        fd = os.open(events, os.O_RDONLY | os.O_CLOEXEC)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            write(self.path + "/cgroup.freeze", 1)
            while read_key(events, "frozen") != 1:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
                os.lseek(fd, 0, os.SEEK_SET)
                os.read(fd, 4096)
        finally:
            os.close(fd)
        return True

    def thaw(self) -> None:
        write(self.path + "/cgroup.freeze", 0)
