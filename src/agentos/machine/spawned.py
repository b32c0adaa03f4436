"""The processes that spawn started: those that run, and the newest of those that have ended."""

from __future__ import annotations

import contextlib
from collections import deque

from agentos.errors import ProcessNotFound
from agentos.machine.once import StartedOnce
from agentos.machine.process import Process
from agentos.machine.retention import Retention
from agentos.model import Limits, SpawnedProcess


class Spawned:
    """Of one VM, by pid. Bounded by the limit exited_processes; their output by `retention`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.retention = Retention(limits.exited_log_bytes, limits.lossless_bytes)
        self._processes: dict[int, Process] = {}
        self._exited: deque[Process] = deque()
        self.once: StartedOnce[Process] = StartedOnce()

    def get(self, pid: int) -> Process:
        """The one of this pid. ProcessNotFound when there is none."""
        found = self._processes.get(pid)
        if found is None:
            raise ProcessNotFound.of(pid)
        return found

    def running(self) -> list[Process]:
        """Those that run."""
        return [one for one in self._processes.values() if one.running]

    def infos(self) -> list[SpawnedProcess]:
        """All of them, oldest first."""
        return sorted((one.info() for one in self._processes.values()), key=lambda info: info.start_time)

    def add(self, process: Process) -> None:
        """One has started."""
        # A pid may come round again: the process that had it before is the one to forget.
        before = self._processes.get(process.pid)
        if before is not None:
            with contextlib.suppress(ValueError):  # of which the end has not been heard yet
                self._exited.remove(before)
            self._forget(before)
        self._processes[process.pid] = process

    def ended(self, process: Process) -> None:
        """One has ended: remember it, and forget the oldest beyond the limit."""
        if self._processes.get(process.pid) is not process:
            return
        self._exited.append(process)
        while len(self._exited) > self._limits.exited_processes:
            self._forget(self._exited.popleft())

    def _forget(self, process: Process) -> None:
        del self._processes[process.pid]
        self.retention.forget(process.log)
