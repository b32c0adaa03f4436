"""Which cgroup controllers this process may use, found out by using them.

Nothing is concluded from versions or from the mode of a file: a probe cgroup is made, limits are written
and read back, and it is removed again. What stood in the way is kept as data for a diagnostic command.
"""

from __future__ import annotations

import errno
import os
import time

from agentos.linux.cgroups import delegation, files, find
from agentos.linux.cgroups.group import Homes, controllers

CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "freezer")
LIMITS = ("memory", "swap", "pids", "cpu_cores", "cpu_weight")

_CORE_OF_V2 = ("cpuacct", "freezer")
"""Version 2 has what these do in every cgroup, without a controller."""

Problem = dict[str, str | int | None]
"""version, directory, errno (its name), what (one sentence)."""


class CgroupSetup:
    """Where this process may make cgroups. `homes` lists own directories: VMs' cgroups go below them."""

    __slots__ = ("homes", "limits", "problems")

    def __init__(self, homes: Homes, limits: frozenset[str], problems: dict[str, list[Problem]]) -> None:
        self.homes = homes
        self.limits = limits
        """Limits that can be enforced: of memory, swap, pids, cpu_cores, cpu_weight."""
        self.problems = problems
        """Controller -> why one of its hierarchies cannot be used."""

    def describe(self) -> dict[str, object]:
        """For a diagnostic command, of JSON's types only: controllers, and which limits would hold."""
        state: dict[str, object] = {}
        for controller in CONTROLLERS:
            version, directory = self.homes.get(controller, (None, None))
            problems = self.problems.get(controller, [])
            state[controller] = {"version": version, "directory": directory, "problems": problems}
        return {
            "controllers": state,
            "enforced": [name for name in LIMITS if name in self.limits],
            "not_enforced": [name for name in LIMITS if name not in self.limits],
        }


def detect(*, owner_pid: int | None = None, may_move: bool = True) -> CgroupSetup:
    """Find the usable controllers of this process. Never raises for what the host lacks.

    On version 2 a cgroup with processes cannot hand controllers down. Where that alone is in the way and
    `may_move`, the processes of this process's own cgroup are moved to its child `agentos-host`:
    `owner_pid` (by default this process) with its descendants, and others only where the cgroup was
    delegated as a whole. With version 1 nothing is moved.
    """
    try:
        memberships = find.parse_memberships(_text("/proc/self/cgroup"))
        mounts = find.parse_mounts(_text("/proc/self/mountinfo"))
    except OSError as error:
        problem = _problem(0, str(error.filename), error)
        return CgroupSetup({}, frozenset(), {one: [problem] for one in CONTROLLERS})
    return _Search(memberships, mounts, owner_pid or os.getpid(), may_move).run()


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _problem(version: int, directory: str | None, error: OSError) -> Problem:
    name = errno.errorcode.get(error.errno or 0)
    notes = "; ".join(getattr(error, "__notes__", ()))
    what = f"{error.strerror or error}" + (f" ({notes})" if notes else "")
    return {"version": version, "directory": directory, "errno": name, "what": what}


class _Search:
    def __init__(
        self, memberships: dict[str, str], mounts: list[find.Mount], owner_pid: int, may_move: bool
    ) -> None:
        self.memberships = memberships
        self.mounts = mounts
        self.owner_pid = owner_pid
        self.may_move = may_move
        self.homes: Homes = {}
        self.limits: set[str] = set()
        self.problems: dict[str, list[Problem]] = {}

    def run(self) -> CgroupSetup:
        for controller in ("memory", "pids", "cpu"):
            self._try_v1(controller)
        self._try_v2([one for one in ("memory", "pids", "cpu") if one not in self.homes])
        # Fewer hierarchies make a VM start sooner: take these where its cgroup is anyway.
        order = (self._core_of_v2, self._try_v1)
        if not any(version == 2 for version, _ in self.homes.values()):
            order = (self._try_v1, self._core_of_v2)
        for controller in _CORE_OF_V2:
            for attempt in order:
                if controller not in self.homes:
                    attempt(controller)
        return CgroupSetup(self.homes, frozenset(self.limits), self.problems)

    def _refused(self, controller: str, version: int, directory: str | None, error: OSError) -> None:
        self.problems.setdefault(controller, []).append(_problem(version, directory, error))

    def _try_v1(self, controller: str) -> None:
        directories = find.own_directories(controller, self.memberships, self.mounts)
        if not directories:
            why = "not mounted as version 1 where this process's cgroup could be seen"
            self._refused(controller, 1, None, OSError(errno.ENOENT, why))
        for directory in directories:
            if self._probe(controller, 1, directory):
                return

    def _core_of_v2(self, controller: str) -> None:
        for directory in self._v2_directories():
            if self._probe(controller, 2, directory):
                return

    def _try_v2(self, wanted: list[str]) -> None:
        if not wanted:
            return
        directories = self._v2_directories()
        for controller in wanted if not directories else ():
            why = "version 2 is not mounted where this process's cgroup could be seen"
            self._refused(controller, 2, None, OSError(errno.ENOENT, why))
        for directory in directories[:1]:
            problems = delegation.hand_down(directory, wanted, self._owner())
            for controller in wanted:
                if controller in problems:
                    self._refused(controller, 2, directory, problems[controller])
                else:
                    self._probe(controller, 2, directory)

    def _owner(self) -> int | None:
        return self.owner_pid if self.may_move else None

    def _v2_directories(self) -> list[str]:
        found = find.own_directories(find.V2, self.memberships, self.mounts)
        return [delegation.above_leaf(one) for one in found]

    def _probe(self, controller: str, version: int, directory: str) -> bool:
        """Try `controller` in a cgroup made for that below `directory`, and note the outcome."""
        path = f"{directory}/agentos-probe-{os.getpid()}"
        try:
            # Of a process with this pid that was killed at this point.
            files.remove(path, time.monotonic())
            files.mkdir(path)
            try:
                if version == 2:
                    delegation.check_joinable(directory, path)
                index = CONTROLLERS.index(controller)
                limits = controllers({controller: (version, path)})[index].probe()
            finally:
                files.remove(path, time.monotonic() + 1)
        except OSError as error:
            self._refused(controller, version, directory, error)
            return False
        self.homes[controller] = (version, directory)
        self.limits |= limits
        return True
