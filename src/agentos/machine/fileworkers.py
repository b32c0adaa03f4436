"""The few file workers of a VM, shared by all file operations: opened at need, kept for a while, closed.

No task runs for it: a timer closes an idle worker, and whoever leaves a worker lets the next one have it.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Awaitable, Callable

from agentos.errors import NoSpace, VmError, VmStopped
from agentos.machine import filewire
from agentos.machine.filewire import Worker

WORKERS = 4
"""Workers of one VM at once, each busy with one operation; more operations wait, first come, first served."""
STREAM_WORKERS = 3
"""Of them, how many streams may hold: a stream whose reader is slow keeps its worker."""
IDLE_S = 10.0
"""Seconds that an idle worker is kept for the next operation."""

OpenWorker = Callable[[], Awaitable[socket.socket]]


class Workers:
    """The workers of one VM: taken for one operation each, kept for a while, at most WORKERS of them."""

    def __init__(self, open_worker: OpenWorker, no_space: Callable[[str], None] | None) -> None:
        self._open_worker = open_worker
        self.no_space = no_space
        """Called when an operation has met a limit of the VM's disk, with its name."""
        self._all = _Gate(WORKERS)
        self._streams = _Gate(STREAM_WORKERS)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed: VmStopped | None = None

    def close(self, why: VmStopped) -> None:
        """Close every worker, for good: what they do, and what waits for one, ends with `why`."""
        self._closed = why
        for worker in [*self._idle, *self._busy]:
            worker.close(VmStopped(why.message, **why.details))
        self._idle.clear()
        self._all.open_wide()
        self._streams.open_wide()

    def take(self, *, stream: bool = False) -> _Taken:
        """A worker at rest, as an async context manager. Given back not at rest, it is closed."""
        return _Taken(self, (self._streams, self._all) if stream else (self._all,))

    async def find(self) -> Worker:
        """An idle worker or a new one, which is busy now."""
        worker = self._pick() or await self._open()
        self._busy.add(worker)
        return worker

    def put_back(self, worker: Worker) -> None:
        """Keep the worker for the next operation, or close it where it is in the middle of one."""
        self._busy.discard(worker)
        if not worker.at_rest:
            worker.broken("was interrupted")
            return
        worker.rest()
        self._idle.append(worker)
        loop = asyncio.get_running_loop()
        worker.idle_timer = loop.call_later(IDLE_S, self._close_idle, worker)

    def _pick(self) -> Worker | None:
        while self._idle:
            worker = self._idle.pop()
            if worker.idle_timer is not None:
                worker.idle_timer.cancel()
            if worker.is_usable():
                return worker
            worker.broken("spoke unasked")
        return None

    async def _open(self) -> Worker:
        self._check()
        try:
            async with asyncio.timeout(filewire.PROGRESS_S) as bound:
                sock = await self._open_worker()
        except TimeoutError:
            if not bound.expired():
                raise
            raise VmError("No file worker could be started in the VM in time", reason="fileWorker") from None
        worker = Worker(sock, asyncio.get_running_loop())
        self._busy.add(worker)
        try:
            self._check()
            await worker.ready()
        except BaseException:
            self._busy.discard(worker)
            worker.broken("was not wanted any more")
            raise
        return worker

    def _check(self) -> None:
        if self._closed is not None:
            raise VmStopped(self._closed.message, **self._closed.details)

    def _close_idle(self, worker: Worker) -> None:
        self._idle.remove(worker)
        worker.broken("was idle")


class _Taken:
    """A worker for one operation. A class, not a generator: a stream left open may end in any order."""

    def __init__(self, workers: Workers, gates: tuple[_Gate, ...]) -> None:
        self._workers = workers
        self._gates = gates
        self._passed: list[_Gate] = []
        self._worker: Worker | None = None

    async def __aenter__(self) -> Worker:
        try:
            for gate in self._gates:
                await gate.enter()
                self._passed.append(gate)
            self._worker = await self._workers.find()
        except BaseException:
            self._leave()
            raise
        return self._worker

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NoSpace) and "limit" in error.details and self._workers.no_space is not None:
            self._workers.no_space(error.details["limit"])
        if self._worker is not None:
            self._workers.put_back(self._worker)
        self._leave()

    def _leave(self) -> None:
        while self._passed:
            self._passed.pop().leave()


class _Gate:
    """Lets `room` through at a time, in the order they came."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._wide = False

    async def enter(self) -> None:
        if self._wide or self._room > 0:
            self._room -= 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._waiting.remove(waiter)
            else:
                self.leave()  # the place was ours already
            raise

    def leave(self) -> None:
        """Hand the place on to the one who waits longest. A cancelled one takes itself out."""
        for waiter in self._waiting:
            if not waiter.done():
                self._waiting.remove(waiter)
                waiter.set_result(None)
                return
        self._room += 1

    def open_wide(self) -> None:
        """Let everyone through, now and later."""
        self._wide = True
        for waiter in list(self._waiting):
            if not waiter.done():
                self._waiting.remove(waiter)
                self._room -= 1
                waiter.set_result(None)
