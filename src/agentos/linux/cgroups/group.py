"""The cgroup of one VM: a directory in each hierarchy that limits it, behind one object."""

from __future__ import annotations

import time

from agentos.linux.cgroups import files, none, v1, v2

_VERSIONS = {1: v1, 2: v2}

Homes = dict[str, tuple[int, str]]
"""Controller -> cgroup version and directory. A controller that is not there cannot be used."""

Limits = dict[str, int | float | None]
"""memory_bytes, pids, cpu_cores, cpu_weight; None where there is to be no limit."""

_LIMITS = {"memory_bytes": "memory", "pids": "pids", "cpu_cores": "cpu_cores", "cpu_weight": "cpu_weight"}
"""Each limit that can be asked for and the name under which `enforced` lists it."""

_DEFAULT_WEIGHT = 100


class Cgroup:
    """One VM's cgroup. Figures are of this VM only, also where the directories served another before it.

    Rebuild it elsewhere with `to_dict` and `from_dict`: figures can be read by any process that may read
    the files. They are meaningless once the process that made it has released or removed it, because
    the directories may then be another VM's.
    """

    __slots__ = (
        "_account",
        "_base",
        "_cpu",
        "_freezer",
        "_limits",
        "_memory",
        "_offered",
        "_pids",
        "homes",
        "name",
    )

    def __init__(self, name: str, homes: Homes, offered: frozenset[str]) -> None:
        self.name = name
        self.homes = homes
        self._offered = offered
        self._limits: Limits = dict.fromkeys(_LIMITS)
        self._base: dict[str, int] = {}
        self._memory, self._pids, self._cpu, self._account, self._freezer = controllers(homes)

    # Set-up, by the process that starts VMs.

    @property
    def directories(self) -> dict[str, int]:
        """Each directory once, with its cgroup version."""
        return {path: version for version, path in self.homes.values()}

    @property
    def limits(self) -> Limits:
        """The limits asked for, enforced or not."""
        return dict(self._limits)

    @property
    def enforced(self) -> frozenset[str]:
        """Which limits the kernel now holds: of memory, swap, pids, cpu_cores, cpu_weight those asked for."""
        names = {name for key, name in _LIMITS.items() if self._limits[key] is not None}
        if "memory" in names:
            names.add("swap")
        return frozenset(names & self._offered)

    def set_limits(self, limits: Limits) -> None:
        """Apply those of `limits` that the host supports and that differ from what holds.

        Raises OSError with a note naming the control file; the cgroup must not be used then.
        """
        changed = {key: limits.get(key) for key in _LIMITS if limits.get(key) != self._limits[key]}
        for key, value in changed.items():
            if _LIMITS[key] in self._offered:
                self._set_limit(key, value)
            self._limits[key] = value

    def _set_limit(self, key: str, value: int | float | None) -> None:
        whole = None if value is None else int(value)
        if key == "memory_bytes":
            self._memory.set_limit(whole, swap="swap" in self._offered)
        elif key == "pids":
            self._pids.set_limit(whole)
        elif key == "cpu_cores":
            self._cpu.set_cores(value)
        else:
            self._cpu.set_weight(_DEFAULT_WEIGHT if whole is None else whole)

    def add(self, host_pid: int) -> None:
        """Move process `host_pid`, all its threads, into this cgroup. Raises OSError with a note.

        Waits milliseconds for the kernel (see v1.join): a process that can should `join` instead.
        """
        for path, version in self.directories.items():
            _VERSIONS[version].add(path, host_pid)

    def join_files(self) -> list[str]:
        """The control files to which a process with a single thread writes "0" to move itself into this cgroup."""
        return [_VERSIONS[version].join_file(path) for path, version in self.directories.items()]

    def join(self) -> None:
        """Move the calling process into this cgroup. Raises OSError with a note.

        The process must have a single thread: with version 1 others would stay behind.
        """
        for path, version in self.directories.items():
            _VERSIONS[version].join(path)

    # Figures, by either process.

    def memory_used(self) -> int | None:
        """Bytes charged now, page cache included; None where it is not accounted."""
        return self._memory.used()

    def memory_peak(self) -> int | None:
        """Most bytes charged at once; None where it is not accounted."""
        return self._memory.peak()

    def oom_kills(self) -> int:
        """Processes of this VM that were killed for want of memory."""
        return self._memory.oom_kills() - self._base.get("oom_kills", 0)

    def open_oom_kills(self) -> files.Figure | None:
        """The same for who looks often, None where they are not counted. The caller closes it, before the release."""
        return self._memory.open_oom_kills(self._base.get("oom_kills", 0))

    def pids_current(self) -> int | None:
        """Processes and threads now; None where they are not counted."""
        return self._pids.current()

    def pids_limit_hits(self) -> int:
        """Forks that the limit on processes refused."""
        return self._pids.limit_hits() - self._base.get("pids_limit_hits", 0)

    def cpu_time_ns(self) -> int | None:
        """CPU time taken by all processes, in nanoseconds; None where it is not accounted."""
        used = self._account.cpu_time_ns()
        return None if used is None else used - self._base.get("cpu_time_ns", 0)

    def usage(self) -> dict[str, int | None]:
        """All figures at once, named as their methods: what to keep before release or removal."""
        return {
            "memory_used": self.memory_used(),
            "memory_peak": self.memory_peak(),
            "oom_kills": self.oom_kills(),
            "pids_current": self.pids_current(),
            "pids_limit_hits": self.pids_limit_hits(),
            "cpu_time_ns": self.cpu_time_ns(),
        }

    def alarms(self) -> dict[str, tuple[int, int]]:
        """Where the kernel says that `memory` or `pids` came to their limits, those of them that the host has.

        Each is a descriptor, which the caller closes, and the event of epoll(7) to wait for; read it from its
        beginning before waiting again. Figures may change a moment after that. Raises OSError with a note where the
        cgroup is gone.
        """
        found = {"memory": self._memory.alarm(), "pids": self._pids.alarm()}
        return {name: alarm for name, alarm in found.items() if alarm is not None}

    # Control of what is in it.

    def processes(self) -> list[int]:
        """Host pids of the processes in it."""
        return sorted({pid for path in self.directories for pid in files.processes(path)})

    def freeze(self, timeout: float = 1.0) -> bool:
        """Stop all processes. Says whether all stand still; False, too, where the host has no freezer."""
        return self._freezer.freeze(time.monotonic() + timeout)

    def thaw(self) -> None:
        """Let frozen processes go on. Does nothing where the host has no freezer."""
        self._freezer.thaw()

    def kill(self, timeout: float = 5.0) -> bool:
        """Kill every process and wait, at most `timeout` seconds, until all are gone. Says whether so."""
        deadline = time.monotonic() + timeout
        remaining = self.directories
        if not any(files.processes(path) for path in remaining):
            return True
        if any(v2.kill(path) for path, version in remaining.items() if version == 2):
            # A freezer of version 1 beside it would hold back even this.
            self.thaw()
            return all(files.wait_empty(path, deadline) for path in remaining)
        if "pids" in self._offered:
            # From now on nothing in it can fork, so that the loop below comes to an end.
            self._pids.set_limit(0)
            self._limits["pids"] = 0
        while True:
            # Not any(generator): each directory's processes are to be killed, not the first one's only.
            found = [files.kill_processes(path) for path in remaining]
            self.thaw()
            if not any(found):
                return True
            if time.monotonic() >= deadline:
                return False
            for path in remaining:
                files.wait_empty(path, min(deadline, time.monotonic() + 0.1))

    def remove(self, timeout: float = 5.0) -> None:
        """Remove the directories. Processes on their way out are awaited, others are not killed.

        Raises OSError EBUSY with a note where any is left after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        for path in self.directories:
            files.remove(path, deadline)

    # Recycling, by the scope.

    def drop_cache(self, keep_bytes: int) -> bool:
        """Give back page cache of former processes above `keep_bytes`. Says whether no more is left."""
        if (self._memory.used() or 0) <= keep_bytes:
            return True
        self._memory.drop_cache()
        return (self._memory.used() or 0) <= keep_bytes

    def start_again(self, name: str, limits: Limits) -> None:
        """Become the empty cgroup of another VM: its limits, and figures from zero. Raises as set_limits."""
        # Written even if the same: that refills the quota, which the last VM may have used up for the period
        # (kernel/sched/core.c, tg_set_cfs_bandwidth). Otherwise the next one would begin by standing still.
        if limits.get("cpu_cores") is not None:
            self._limits["cpu_cores"] = None
        # The host may have changed it while the last VM ran.
        self._limits["pids"] = None
        self.set_limits(limits)
        self.name = name
        self._memory.reset_peak()
        self._base = {
            "oom_kills": self._memory.oom_kills(),
            "pids_limit_hits": self._pids.limit_hits(),
            "cpu_time_ns": self._account.cpu_time_ns() or 0,
        }

    def to_dict(self) -> dict[str, object]:
        """What `from_dict` needs, of JSON's types only."""
        return {
            "name": self.name,
            "homes": {controller: [version, path] for controller, (version, path) in self.homes.items()},
            "offered": sorted(self._offered),
            "limits": dict(self._limits),
            "base": dict(self._base),
        }

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> Cgroup:
        """The cgroup that `to_dict` described. Touches no file. Raises ValueError where it is not one."""
        try:
            name, homes, offered, limits, base = (
                data[key] for key in ("name", "homes", "offered", "limits", "base")
            )
        except KeyError as missing:
            raise ValueError(f"not a cgroup: no {missing}") from None
        if not (
            isinstance(name, str)
            and isinstance(homes, dict)
            and isinstance(offered, list)
            and isinstance(limits, dict)
            and isinstance(base, dict)
        ):
            raise ValueError("not a cgroup: a field of another type")
        made = cls(name, {key: (int(one[0]), str(one[1])) for key, one in homes.items()}, frozenset(offered))
        made._limits.update(limits)
        made._base = dict(base)
        return made


def controllers(homes: Homes) -> tuple[none.Memory, none.Pids, none.Cpu, none.Account, none.Freezer]:
    """An object for each controller of `homes`, one that does nothing for those missing."""
    absent = (0, "")
    memory, path_memory = homes.get("memory", absent)
    pids, path_pids = homes.get("pids", absent)
    cpu, path_cpu = homes.get("cpu", absent)
    account, path_account = homes.get("cpuacct", absent)
    freezer, path_freezer = homes.get("freezer", absent)
    return (
        (none.Memory, v1.Memory, v2.Memory)[memory](path_memory),
        (none.Pids, v1.Pids, v2.Pids)[pids](path_pids),
        (none.Cpu, v1.Cpu, v2.Cpu)[cpu](path_cpu),
        (none.Account, v1.Account, v2.Account)[account](path_account),
        (none.Freezer, v1.Freezer, v2.Freezer)[freezer](path_freezer),
    )
