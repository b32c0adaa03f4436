"""The cgroups of one host process: a parent directory in each hierarchy, and in it one cgroup per VM.

The directory's name says who owns it (pid namespace, pid, start time), so that what a killed host leaves
behind can be told from what a living one uses.
"""

from __future__ import annotations

import errno
import os
import time

from agentos.linux.cgroups import delegation, files
from agentos.linux.cgroups.detect import CgroupSetup
from agentos.linux.cgroups.group import Cgroup, Homes, Limits

_PREFIX = "agentos-"

_KEEP_CACHE = 32 * 1024 * 1024
"""Bytes of page cache that a recycled cgroup may bring along. More than nothing, because dropping it would
evict the system's own files, which the next VM is about to read."""


class Scope:
    """Makes and recycles VMs' cgroups. For a single thread of a single process.

    A version 1 cgroup that is released is kept, empty, for the next VM: its five directories are made and
    removed one by one, and each removed memory cgroup lingers in the kernel while page cache is charged
    to it. A version 2 cgroup is one directory, whose memory.peak could not be reset: it is removed.
    """

    def __init__(self, setup: CgroupSetup, name: str, max_free: int) -> None:
        self.name = name
        self.limits = setup.limits
        """Limits that its cgroups can enforce: of memory, swap, pids, cpu_cores, cpu_weight."""
        self._homes: Homes = {
            one: (version, f"{path}/{name}") for one, (version, path) in setup.homes.items()
        }
        self._max_free = max_free if all(version == 1 for version, _ in setup.homes.values()) else 0
        self._free: list[Cgroup] = []
        self._made = 0

    @property
    def directories(self) -> dict[str, int]:
        """The parent directories, with their cgroup versions."""
        return {path: version for version, path in self._homes.values()}

    def create(
        self,
        name: str,
        *,
        memory_bytes: int | None = None,
        pids: int | None = None,
        cpu_cores: float | None = None,
        cpu_weight: int | None = None,
    ) -> Cgroup:
        """An empty cgroup for VM `name` with those limits that the host supports: see `Cgroup.enforced`.

        `name` is a label only. Raises OSError with a note naming the file where a limit that the host
        supports cannot be set; nothing is left behind then.
        """
        limits: Limits = {
            "memory_bytes": memory_bytes,
            "pids": pids,
            "cpu_cores": cpu_cores,
            "cpu_weight": cpu_weight,
        }
        return self._reuse(name, limits) or self._make(name, limits)

    def release(self, cgroup: Cgroup, timeout: float = 5.0) -> bool:
        """Take `cgroup` back once its VM has ended; what is left in it is killed. Says whether it is kept.

        Its figures end here: read them before. Raises OSError EBUSY with a note where a process does not
        die or a directory not go within `timeout` seconds; the cgroup is then given up to `close`.
        """
        deadline = time.monotonic() + timeout
        emptied = cgroup.kill(timeout)
        fit = emptied and len(self._free) < self._max_free and bool(cgroup.homes)
        if fit and cgroup.drop_cache(_KEEP_CACHE):
            # A VM that was frozen must not freeze the next one.
            cgroup.thaw()
            self._free.append(cgroup)
            return True
        cgroup.remove(deadline - time.monotonic())
        return False

    def close(self, timeout: float = 5.0) -> None:
        """Kill what is left in the scope and remove it all. Raises OSError EBUSY after `timeout` seconds."""
        self._free.clear()
        deadline = time.monotonic() + timeout
        files.destroy(list(self.directories), deadline)

    def _reuse(self, name: str, limits: Limits) -> Cgroup | None:
        # One that already has these limits needs no writing.
        self._free.sort(key=lambda one: one.limits == limits)
        while self._free:
            cgroup = self._free.pop()
            try:
                cgroup.start_again(name, limits)
            except OSError:
                # EBUSY where memory still charged exceeds a smaller limit. A fresh one has no such past,
                # and raises by itself whatever else is wrong.
                cgroup.remove()
                continue
            return cgroup
        return None

    def _make(self, name: str, limits: Limits) -> Cgroup:
        self._made += 1
        homes = {one: (version, f"{path}/vm-{self._made}") for one, (version, path) in self._homes.items()}
        cgroup = Cgroup(name, homes, self.limits)
        made = []
        try:
            for path in cgroup.directories:
                files.mkdir(path)
                made.append(path)
            cgroup.set_limits(limits)
        except OSError:
            for path in made:
                files.remove(path, time.monotonic() + 1)
            raise
        return cgroup


def open_scope(setup: CgroupSetup, *, owner_pid: int | None = None, max_free: int = 32) -> Scope:
    """Make the scope of host process `owner_pid` (by default this one); its parent directories are new.

    At most `max_free` emptied cgroups are kept for recycling. Raises OSError with a note.
    """
    scope = Scope(setup, scope_name(owner_pid or os.getpid()), max_free)
    made = []
    try:
        for path, version in scope.directories.items():
            files.mkdir(path)
            made.append(path)
            if version == 2:
                for controller in ("memory", "pids", "cpu"):
                    if scope._homes.get(controller) == (version, path):
                        delegation.enable(path, controller)
    except OSError:
        for path in made:
            files.remove(path, time.monotonic() + 1)
        raise
    return scope


def scope_name(owner_pid: int) -> str:
    """The name of the scope of living process `owner_pid`. Raises OSError where there is none."""
    started = _start_time(owner_pid)
    if started is None or started < 0:
        raise OSError(errno.ESRCH, "no such living process, or hidden", f"/proc/{owner_pid}/stat")
    return f"{_PREFIX}{_pid_namespace()}-{owner_pid}-{started}"


def sweep_stale(setup: CgroupSetup, timeout: float = 5.0) -> dict[str, list[str]]:
    """Remove scopes whose owner no longer exists, killing what is left in them; at most `timeout` seconds.

    Gives their names under `removed`, and under `left` those that would not go in time. Scopes of another
    pid namespace are left alone: whether their owners live cannot be seen from here.
    """
    deadline = time.monotonic() + timeout
    done: dict[str, list[str]] = {"removed": [], "left": []}
    bases = sorted(set(setup.homes.values()))
    for name in sorted({name for _, base in bases for name in files.children(base) if _is_stale(name)}):
        try:
            files.destroy([f"{base}/{name}" for _, base in bases], deadline)
            done["removed"].append(name)
        except OSError:
            done["left"].append(name)
    for version, base in bases:
        if version == 2:
            _remove_leaf(base)
    return done


def remove(directories: list[str], timeout: float = 5.0) -> None:
    """Remove the directories of a scope whose owner has ended, killing what is left in them.

    No effect where they are gone. Raises OSError EBUSY with a note after `timeout` seconds.
    """
    files.destroy(directories, time.monotonic() + timeout)


def _remove_leaf(base: str) -> None:
    try:
        os.rmdir(f"{base}/{delegation.LEAF}")
    except OSError:
        # In use (EBUSY), or never made.
        pass


def _is_stale(name: str) -> bool:
    head, _, rest = name.partition("-")
    parts = rest.split("-")
    if head + "-" != _PREFIX or len(parts) != 3 or not all(one.isdecimal() for one in parts):
        return False
    if int(parts[0]) != _pid_namespace():
        return False
    pid, started = int(parts[1]), int(parts[2])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    # With hidepid a living process may be invisible in /proc (proc(5)): not seen is not gone.
    found = _start_time(pid)
    return found is not None and found != started


def _start_time(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot; -1 for a zombie, None where /proc does not show it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    # proc(5): state is field 3 and starttime field 22, counted from 1; fields[0] is the state.
    return -1 if fields[0] in "ZX" else int(fields[19])


def _pid_namespace() -> int:
    """The inode number of our pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino
