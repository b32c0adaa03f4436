"""The processes that spawn started: those that run, and the newest of those that have ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable

from agentos.errors import ProcessNotFound
from agentos.machine.once import check_same
from agentos.machine.process import Process
from agentos.machine.retention import Retention
from agentos.model import Limits, SpawnedProcess

_REMEMBERED_KEYS = 1024
"""Idempotency keys remembered for one VM, oldest forgotten first."""


class Spawned:
    """Of one VM, by pid. Bounded by the limit exited_processes; their output by `retention`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.retention = Retention(limits.exited_log_bytes, limits.lossless_bytes)
        self._processes: dict[int, Process] = {}
        self._exited: deque[Process] = deque()
        self._keys: OrderedDict[str, tuple[int, asyncio.Future[Process]]] = OrderedDict()
        """With the hash of what was asked for."""

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

    async def once(self, key: str, asked: Hashable, spawn: Callable[[], Awaitable[Process]]) -> Process:
        """What the first `spawn` with this key started. InvalidRequest where that was not `asked` for."""
        before = self._keys.get(key)
        if before is not None:
            asked_before, spawning = before
            check_same(key, asked_before, asked)
        else:
            # A task of its own: who asks again must not be cancelled with the first, whose connection broke.
            spawning = asyncio.ensure_future(spawn())
            spawning.add_done_callback(lambda done: self._forget_failed(key, done))
            self._keys[key] = hash(asked), spawning
            while len(self._keys) > _REMEMBERED_KEYS:
                self._keys.popitem(last=False)
        return await asyncio.shield(spawning)

    def _forget_failed(self, key: str, done: asyncio.Future[Process]) -> None:
        if done.cancelled() or done.exception() is not None:
            known = self._keys.get(key)
            if known is not None and known[1] is done:
                del self._keys[key]
