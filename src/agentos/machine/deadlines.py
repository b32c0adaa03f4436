"""The time limits of one process tree: wall clock, silence, and CPU time.

Each that passes calls `stop(reason)` once. Timers are set for the moment when a limit could pass at the
earliest and set again when it has not; nothing is looked at in between.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from agentos.model import Reason

_CPUS = os.cpu_count() or 1
_LEAST_CPU_WAIT = 0.01


class Deadlines:
    """Call `touch` whenever there is output, and `cancel` at the end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stop: Callable[[Reason], None],
        *,
        wall: float | None = None,
        idle: float | None = None,
        cpu: float | None = None,
        cpu_used: Callable[[], Awaitable[float]] | None = None,
    ) -> None:
        self._loop = loop
        self._stop = stop
        self._idle = idle
        self._last_output = loop.time()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._cpu_task: asyncio.Task[None] | None = None
        if wall is not None:
            self._timers["wall"] = loop.call_later(wall, self._passed, "timeout")
        if idle is not None:
            self._timers["idle"] = loop.call_later(idle, self._check_idle)
        if cpu is not None and cpu_used is not None:
            self._cpu_task = loop.create_task(self._watch_cpu(cpu, cpu_used))

    def touch(self) -> None:
        """There was output just now."""
        if self._idle is not None:
            self._last_output = self._loop.time()

    def _check_idle(self) -> None:
        assert self._idle is not None
        left = self._last_output + self._idle - self._loop.time()
        if left <= 0:
            self._passed("idleTimeout")
        else:
            self._timers["idle"] = self._loop.call_later(left, self._check_idle)

    async def _watch_cpu(self, limit: float, used: Callable[[], Awaitable[float]]) -> None:
        left = limit
        while left > 0:
            # With all CPUs busy, this is when the limit is reached at the earliest.
            await asyncio.sleep(max(left / _CPUS, _LEAST_CPU_WAIT))
            left = limit - await used()
        self._passed("cpuTimeout")

    def _passed(self, reason: Reason) -> None:
        self.cancel(keep_task=True)
        self._stop(reason)

    def cancel(self, *, keep_task: bool = False) -> None:
        """No limit passes any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._cpu_task and not keep_task:
            self._cpu_task.cancel()
            self._cpu_task = None
