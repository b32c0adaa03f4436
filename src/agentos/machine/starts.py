"""What all programs that the API starts have in common: how many may run, a second try, what their ends tell."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

from agentos.errors import LimitExceeded, SpawnFailed
from agentos.machine.alarms import Alarms
from agentos.machine.jobs import Program
from agentos.model import Limits

_T = TypeVar("_T")
_SPAWNER_TRIES = 5


class Starts:
    """The starts of one VM."""

    def __init__(self, limits: Limits, alarms: Alarms) -> None:
        self._limits = limits
        self._alarms = alarms
        self.oom_kills = alarms.oom_kills
        self._live = 0
        self.disk_kills = 0
        """How often all that ran was killed because the VM's files were beyond a limit."""
        self.disk_limit = ""
        """Which limit that was, the last time."""

    async def insist(self, start: Callable[[bool], Awaitable[_T]]) -> _T:
        """Begin again where a guest has killed the spawner, or left it no process, before anything was started.

        Then with the reserve: `start` is told whether to use that. LimitExceeded where it has no process left either.
        """
        if self._alarms.watched:
            self._alarms.startless = 0
        else:
            self._alarms.watch()
        limits, reserve = self._limits, False
        for attempt in range(_SPAWNER_TRIES):
            try:
                return await start(reserve)
            except SpawnFailed as error:
                step, number = error.details.get("step"), error.os_errno
                if step == "pty" and number == errno.ENOSPC:
                    self._alarms.reached("terminals")
                    raise LimitExceeded.of(
                        "terminals",
                        limits.terminals + 1,
                        limits.terminals,
                        "all terminals of the VM are open",
                    ) from error
                if number == errno.EAGAIN:
                    self._alarms.reached("processes")
                    self._alarms.make_room()
                if number == errno.EAGAIN and reserve:
                    said = (
                        "the VM has as many processes as it may, and the reserve for commands is used up too"
                    )
                    raise LimitExceeded.of(
                        "processes", limits.processes + 1, limits.processes, said
                    ) from error
                if not (step == "spawner" or number == errno.EAGAIN):
                    raise
                if attempt == _SPAWNER_TRIES - 1:
                    said = "nothing was started: what starts the VM's programs was ended again and again"
                    raise SpawnFailed(said, **error.details) from error
                reserve = number == errno.EAGAIN or attempt > 0
        raise AssertionError("unreachable")

    def begin(self) -> None:
        """Count a program from now on, until `end`. LimitExceeded (live_processes) where as many run as may."""
        limit = self._limits.live_processes
        if self._live >= limit:
            self._alarms.reached("live_processes")
            raise LimitExceeded.of("live_processes", self._live + 1, limit, f"{limit} processes run already")
        self._live += 1

    def end(self) -> None:
        """It runs no more."""
        self._live -= 1

    def note_end(self, reason: str | None, pid: int | None, program: Program) -> None:
        """A program has ended: of one of the VM's limits, perhaps."""
        if reason == "oom":
            self._alarms.killed(pid, program.argv[0])
        elif reason == "outputLimit":
            self._alarms.reached("runaway_bytes", pid=pid, command=program.argv[0])
        if self._alarms.made_room:
            self._alarms.settle()
