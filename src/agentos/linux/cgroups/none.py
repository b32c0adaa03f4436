"""What the controllers of a VM's cgroup can do, and how a missing one behaves: it does nothing.

These classes are the interface; v1 and v2 derive from them. Sizes are bytes, times nanoseconds. A figure
that nobody keeps is None; a count of events of which none can have happened is 0. Every setter raises
OSError with a note naming the control file that refused.
"""

from __future__ import annotations

import errno

from agentos.linux.cgroups.files import Figure


class Memory:
    """Memory of all processes in the cgroup, page cache and tmpfs pages that they touched first included."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def probe(self) -> frozenset[str]:
        """Set and read back limits in a cgroup made for it; names of the limits that hold."""
        return frozenset()

    def set_limit(self, limit_bytes: int | None, *, swap: bool) -> None:
        """Limit memory, None for no limit; with `swap` also keep its pages out of swap beyond that."""

    def used(self) -> int | None:
        """Bytes charged now."""
        return None

    def peak(self) -> int | None:
        """Most bytes charged at once."""
        return None

    def reset_peak(self) -> None:
        """Let `peak` start again from `used`."""

    def oom_kills(self) -> int:
        """Processes killed for want of memory, since the cgroup was made."""
        return 0

    def open_oom_kills(self, base: int) -> Figure | None:
        """The same beyond `base`, for who looks often. The caller closes it."""
        return None

    def alarm(self) -> tuple[int, int] | None:
        """What to wait on for the end of the memory: see Cgroup.alarms."""
        return None

    def drop_cache(self) -> None:
        """Give back page cache as far as possible. Meant for a cgroup without processes."""


class Pids:
    """Processes and threads in the cgroup."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def probe(self) -> frozenset[str]:
        """As Memory.probe."""
        return frozenset()

    def set_limit(self, limit: int | None) -> None:
        """Let fork and clone fail with EAGAIN beyond `limit` tasks, None for no limit."""

    def current(self) -> int | None:
        """Tasks now."""
        return None

    def limit_hits(self) -> int:
        """Forks refused, since the cgroup was made."""
        return 0

    def alarm(self) -> tuple[int, int] | None:
        """What to wait on for a fork that is refused: see Cgroup.alarms."""
        return None


class Cpu:
    """CPU time that the cgroup may take."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def probe(self) -> frozenset[str]:
        """As Memory.probe."""
        return frozenset()

    def set_cores(self, cores: float | None) -> None:
        """Allow `cores` cores' worth of CPU time (0.001 at the least), None for no limit."""

    def set_weight(self, weight: int) -> None:
        """Share of the CPU against the cgroups beside it: 1 to 10000, 100 is the kernel's default."""


class Account:
    """CPU time that the cgroup took."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def probe(self) -> frozenset[str]:
        """As Memory.probe; there is no limit to name."""
        return frozenset()

    def cpu_time_ns(self) -> int | None:
        """CPU time of all its processes, since the cgroup was made."""
        return None


class Freezer:
    """Stops every process of the cgroup without its noticing."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def probe(self) -> frozenset[str]:
        """As Memory.probe; there is no limit to name."""
        return frozenset()

    def freeze(self, deadline: float) -> bool:
        """Stop all processes. Says whether all stand still, which it awaits until monotonic `deadline`."""
        return False

    def thaw(self) -> None:
        """Let them go on."""


def quota_us(cores: float) -> tuple[int, int]:
    """Quota and period in microseconds for `cores`, in the kernel's bounds (sched-bwc.rst: 1 ms to 1 s).

    The period is 100 ms as is the kernel's default, and 1 s where the quota would be under 1 ms otherwise.
    """
    period = 100_000 if cores >= 0.01 else 1_000_000
    return max(1000, round(cores * period)), period


def unlike(path: str, wanted: object, found: object) -> OSError:
    """The error of a control file that does not hold what it should, though nothing refused it."""
    error = OSError(errno.EIO, f"holds {found!r} instead of {wanted!r}", path)
    error.add_note(f"read back {path}")
    return error
