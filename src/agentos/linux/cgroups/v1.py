"""Controllers of cgroup version 1 (Documentation/admin-guide/cgroup-v1/)."""

from __future__ import annotations

import errno
import os
import select
import time

from agentos.linux.cgroups import none
from agentos.linux.cgroups.files import Figure, open_changing, read, read_int, read_key, write

_MIB = 1024 * 1024
SOCKETS_PART = 8
"""The buffers of a VM's TCP and UDP sockets may take this part of its memory, beside it."""
_LEAST_FOR_SOCKETS = 16 * _MIB


def add(path: str, pid: int) -> None:
    """Move process `pid`, all threads, into cgroup `path`."""
    write(path + "/cgroup.procs", pid)


def join_file(path: str) -> str:
    """The control file of `join`."""
    return path + "/tasks"


def join(path: str) -> None:
    """Move the calling thread, which must be its process's only one, into cgroup `path`.

    By `tasks` and 0: a thread that moves itself needs no lock against forks, whereas cgroup.procs waits
    for an RCU grace period, several milliseconds (kernel/cgroup/cgroup.c, cgroup_procs_write_start).
    """
    write(join_file(path), 0)


class Memory(none.Memory):
    """memory.rst. The limit on swap is that of memory and swap together (memsw)."""

    def probe(self) -> frozenset[str]:
        limit, memsw = f"{self.path}/memory.limit_in_bytes", f"{self.path}/memory.memsw.limit_in_bytes"
        swap = os.path.exists(memsw)
        self.set_limit(64 * _MIB, swap=swap)
        for path in (limit, memsw) if swap else (limit,):
            if (found := read_int(path)) != 64 * _MIB:
                raise none.unlike(path, 64 * _MIB, found)
        return frozenset(("memory", "swap") if swap else ("memory",))

    def set_limit(self, limit_bytes: int | None, *, swap: bool) -> None:
        limit, memsw = f"{self.path}/memory.limit_in_bytes", f"{self.path}/memory.memsw.limit_in_bytes"
        value = -1 if limit_bytes is None else limit_bytes
        files = [limit, memsw] if swap else [limit]
        # EINVAL for a memory limit above memsw, even for a moment: so memsw rises first and falls last.
        if swap and (limit_bytes is None or limit_bytes > (read_int(memsw) or 0)):
            files.reverse()
        for path in files:
            write(path, value)
        # What sockets hold is counted beside it, and only where it has a limit of its own: without one, up to what the
        # machine has for all sockets.
        sockets = self.path + "/memory.kmem.tcp.limit_in_bytes"
        if os.path.exists(sockets):
            write(
                sockets, -1 if limit_bytes is None else max(_LEAST_FOR_SOCKETS, limit_bytes // SOCKETS_PART)
            )

    def used(self) -> int | None:
        return read_int(self.path + "/memory.usage_in_bytes")

    def peak(self) -> int | None:
        return read_int(self.path + "/memory.max_usage_in_bytes")

    def reset_peak(self) -> None:
        write(self.path + "/memory.max_usage_in_bytes", 0)

    def oom_kills(self) -> int:
        return read_key(self.path + "/memory.oom_control", "oom_kill") or 0

    def open_oom_kills(self, base: int) -> Figure | None:
        return Figure(self.path + "/memory.oom_control", "oom_kill", base)

    def alarm(self) -> tuple[int, int] | None:
        eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            control = os.open(self.path + "/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                write(self.path + "/cgroup.event_control", f"{eventfd} {control}")
            finally:
                os.close(control)
        except BaseException:
            os.close(eventfd)
            raise
        return eventfd, select.EPOLLIN

    def drop_cache(self) -> None:
        try:
            write(self.path + "/memory.force_empty", 0)
        except OSError as error:
            # EBUSY: some pages could not go. What remains is for `used` to tell.
            if error.errno != errno.EBUSY:
                raise


class Pids(none.Pids):
    """pids.rst."""

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
        # Linux 6.18, for one, counts in this file but does not wake who waits for it.
        return open_changing(self.path + "/pids.events"), select.EPOLLPRI


class Cpu(none.Cpu):
    """sched-bwc.rst, sched-design-CFS.rst."""

    def probe(self) -> frozenset[str]:
        self.set_weight(50)
        if (found := read_int(self.path + "/cpu.shares")) != 512:
            raise none.unlike(self.path + "/cpu.shares", 512, found)
        # A kernel without CONFIG_CFS_BANDWIDTH has weights only.
        if not os.path.exists(self.path + "/cpu.cfs_quota_us"):
            return frozenset(("cpu_weight",))
        # Small, since a quota above that of an ancestor is refused.
        self.set_cores(0.01)
        if (found := read_int(self.path + "/cpu.cfs_quota_us")) != 1000:
            raise none.unlike(self.path + "/cpu.cfs_quota_us", 1000, found)
        return frozenset(("cpu_weight", "cpu_cores"))

    def set_cores(self, cores: float | None) -> None:
        quota, period = (-1, 100_000) if cores is None else none.quota_us(cores)
        # Without a quota first: quota and period that are in force are checked together at every write.
        write(self.path + "/cpu.cfs_quota_us", -1)
        write(self.path + "/cpu.cfs_period_us", period)
        if quota >= 0:
            try:
                write(self.path + "/cpu.cfs_quota_us", quota)
            except OSError as error:
                error.add_note("version 1 refuses (EINVAL) a quota above that of a parent cgroup")
                raise

    def set_weight(self, weight: int) -> None:
        # 100 of version 2 is 1024 here; the kernel takes 2 to 262144.
        write(self.path + "/cpu.shares", max(2, weight * 1024 // 100))


class Account(none.Account):
    """cpuacct.rst."""

    def probe(self) -> frozenset[str]:
        read(self.path + "/cpuacct.usage")
        return frozenset()

    def cpu_time_ns(self) -> int | None:
        return read_int(self.path + "/cpuacct.usage")


class Freezer(none.Freezer):
    """freezer-subsystem.rst. A frozen process dies of SIGKILL only when thawed."""

    def probe(self) -> frozenset[str]:
        if not self.freeze(time.monotonic() + 1):
            raise none.unlike(self.path + "/freezer.state", "FROZEN", "FREEZING")
        self.thaw()
        return frozenset()

    def freeze(self, deadline: float) -> bool:
        path = self.path + "/freezer.state"
        while True:
            # Written each time: that takes in what was forked meanwhile. There is no event to wait for.
            write(path, "FROZEN")
            if read(path).strip() == "FROZEN":
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)

    def thaw(self) -> None:
        write(self.path + "/freezer.state", "THAWED")
