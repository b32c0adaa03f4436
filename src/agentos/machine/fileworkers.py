"""The host's end of the file workers: frames over a socket whose other end a hostile guest may hold.

Whatever comes from a worker is bounded in size and time before it is believed; a worker that ends, stalls
or speaks anything but the protocol is closed, and whoever was using it gets VmError. Nothing here blocks
the event loop, runs a task of its own, or knows what the frames mean.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from agentos.errors import AgentOSError, VmError, VmStopped
from agentos.machine.fileserver import DATA, FRAME_BYTES, HEADER, PAGE, REPLY, REQUEST

WORKERS = 4
"""Workers of one VM at once, each busy with one operation; more operations wait, first come, first served."""
STREAM_WORKERS = 3
"""Of them, how many streams may hold: a stream whose reader is slow keeps its worker."""
IDLE_S = 10.0
"""Seconds that an idle worker is kept for the next operation."""
PROGRESS_S = 30.0
"""Seconds within which a worker must take or give the next frame."""
JSON_BYTES = 256 * 1024
"""Greatest JSON that a worker may send: parsing it takes the event loop a few milliseconds."""
TURN_BYTES = 1024 * 1024
"""Bytes moved without waiting after which others get their turn."""

_BUFFER_BYTES = 64 * 1024
_FRAME_COST = 2048  # what a frame of no size counts towards a turn

OpenWorker = Callable[[], Awaitable[socket.socket]]


def frame(kind: int, body: bytes) -> bytes:
    """A whole frame, for bodies that are small."""
    return HEADER.pack(kind, len(body)) + body


def request_frame(request: dict[str, Any]) -> bytes:
    """`request` as the frame that travels."""
    return frame(REQUEST, json.dumps(request, separators=(",", ":")).encode("ascii"))


class Worker:
    """One worker: one request at a time. `at_rest` where the last one is answered in full."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FRAME_BYTES)
        self._sock = sock
        self._loop = loop
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = self._end = 0
        self._turn_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._problem: AgentOSError | None = None
        self.at_rest = False
        self.idle_timer: asyncio.TimerHandle | None = None

    def close(self, problem: AgentOSError) -> None:
        """Close the socket, which ends the worker. Whoever waits for it gets `problem`."""
        if self._problem is not None:
            return
        self._problem = problem
        self.at_rest = False
        if self.idle_timer is not None:
            self.idle_timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._buffer = bytearray()
        if self._waiter is not None:
            _wake(self._waiter)

    def broken(self, what: str) -> AgentOSError:
        """Close because of `what` the worker did. Returns the error to raise."""
        self.close(VmError(f"The file worker in the VM {what}", reason="fileWorker"))
        assert self._problem is not None
        return self._problem

    def is_usable(self) -> bool:
        """Whether a worker at rest can take a request: it is there and has said nothing unasked."""
        return self.at_rest and not self.has_spoken()

    def has_spoken(self) -> bool:
        """Whether something came, or the worker has ended."""
        if self._problem is None and self._start == self._end:
            try:
                self._receive()
            except (BlockingIOError, AgentOSError):
                pass
        return self._problem is not None or self._end > self._start

    async def ready(self) -> None:
        """Wait for the worker to say that it is ready."""
        if await self.answer():
            raise self.broken("did not start as it should")

    async def request(self, first: bytes, *more: bytes | memoryview) -> None:
        """Send the frame of a request, and with it whole frames that follow."""
        self.at_rest = False
        await self._send([memoryview(first), *map(memoryview, more)])

    async def send_data(self, data: memoryview) -> None:
        """Send at most FRAME_BYTES of bytes as DATA."""
        await self._send([memoryview(HEADER.pack(DATA, len(data))), data])

    async def send_mark(self, kind: int) -> None:
        """Send a frame that has no body."""
        await self._send([memoryview(HEADER.pack(kind, 0))])

    async def receive(self) -> tuple[int, memoryview]:
        """The next frame, with its body, which is overwritten by the one after it."""
        deadline = self._loop.time() + PROGRESS_S
        await self._fill(HEADER.size, deadline)
        kind, length = HEADER.unpack_from(self._buffer, self._start)
        if kind not in (DATA, PAGE, REPLY) or length > (FRAME_BYTES if kind == DATA else JSON_BYTES):
            raise self.broken("spoke what is no frame")
        await self._fill(HEADER.size + length, deadline)
        start = self._start + HEADER.size
        self._start = start + length
        if kind == REPLY:
            if self._start != self._end:
                raise self.broken("spoke unasked")
            self.at_rest = True
        return kind, memoryview(self._buffer)[start : self._start]

    async def answer(
        self,
        take_data: Callable[[memoryview], object] | None = None,
        take_page: Callable[[list[Any]], object] | None = None,
    ) -> dict[str, Any]:
        """The REPLY to the request. DATA and PAGEs before it are handed on; ValueError from there: garbage."""
        while True:
            kind, body = await self.receive()
            try:
                if kind == DATA and take_data is not None:
                    take_data(body)
                    continue
                content = json.loads(str(body, "ascii")) if kind != DATA else None
                if kind == REPLY and isinstance(content, dict):
                    return content
                if not (kind == PAGE and take_page is not None and isinstance(content, list)):
                    raise ValueError
                take_page(content)
            except (ValueError, TypeError, RecursionError):
                raise self.broken("gave an answer that makes no sense") from None

    async def _fill(self, needed: int, deadline: float) -> None:
        """Have at least `needed` bytes in the buffer."""
        while self._end - self._start < needed:
            self._make_room(needed)
            try:
                count = self._receive()
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader, deadline)
                continue
            await self._take_turns(count)

    def _make_room(self, needed: int) -> None:
        left = self._end - self._start
        if self._start + needed > len(self._buffer) or not left:
            old = self._buffer[self._start : self._end]
            if needed > len(self._buffer):
                self._buffer = bytearray(needed + _BUFFER_BYTES)
            self._buffer[:left] = old
            self._start, self._end = 0, left

    def _receive(self) -> int:
        """Read what is there into the buffer. Raises BlockingIOError where nothing is."""
        self._check()
        if self._start == self._end:
            self._start = self._end = 0
        try:
            count = self._sock.recv_into(memoryview(self._buffer)[self._end :])
        except BlockingIOError:
            raise
        except OSError:
            count = 0
        if not count:
            raise self.broken("ended")
        self._end += count
        return count

    async def _send(self, parts: list[memoryview]) -> None:
        deadline = self._loop.time() + PROGRESS_S
        while parts:
            self._check()
            try:
                count = self._sock.sendmsg(parts, [], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await self._wait(self._loop.add_writer, self._loop.remove_writer, deadline)
                continue
            except OSError:
                raise self.broken("ended") from None
            await self._take_turns(count)
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][count:]

    async def _wait(
        self, add: Callable[..., object], remove: Callable[[int], object], deadline: float
    ) -> None:
        """Wait until the socket can be read or written. Closes the worker where that is not by `deadline`."""
        self._turn_bytes = 0
        waiter: asyncio.Future[None] = self._loop.create_future()
        fd = self._sock.fileno()
        add(fd, _wake, waiter)
        timer = self._loop.call_at(deadline, self.broken, f"did nothing for {PROGRESS_S:g} seconds")
        self._waiter = waiter
        try:
            await waiter
        finally:
            self._waiter = None
            timer.cancel()
            if self._problem is None:
                remove(fd)
        self._check()

    async def _take_turns(self, count: int) -> None:
        self._turn_bytes += count + _FRAME_COST
        if self._turn_bytes > TURN_BYTES:
            self._turn_bytes = 0
            await asyncio.sleep(0)

    def _check(self) -> None:
        if self._problem is not None:
            raise self._problem

    def rest(self) -> None:
        """Give up memory that only a large operation needs."""
        if len(self._buffer) > _BUFFER_BYTES:
            self._buffer = bytearray(_BUFFER_BYTES)
            self._start = self._end = 0


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Workers:
    """The workers of one VM: taken for one operation each, kept for a while, at most WORKERS of them."""

    def __init__(self, open_worker: OpenWorker) -> None:
        self._open_worker = open_worker
        self._all = _Gate(WORKERS)
        self._streams = _Gate(STREAM_WORKERS)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed: AgentOSError | None = None

    def close(self) -> None:
        """Close every worker, for good: what they do, and what waits for one, ends with VmStopped."""
        if self._closed is None:
            self._closed = VmStopped("The VM was closed", reason="closed")
        for worker in [*self._idle, *self._busy]:
            worker.close(self._closed)
        self._idle.clear()
        self._all.open_wide()
        self._streams.open_wide()

    @asynccontextmanager
    async def take(self, *, stream: bool = False) -> AsyncIterator[Worker]:
        """A worker at rest. Given back not at rest (an error, a cancellation), it is closed."""
        gates = (self._streams, self._all) if stream else (self._all,)
        passed: list[_Gate] = []
        try:
            for gate in gates:
                await gate.enter()
                passed.append(gate)
            worker = self._pick() or await self._open()
            self._busy.add(worker)
            try:
                yield worker
            finally:
                self._busy.discard(worker)
                self._put_back(worker)
        finally:
            for gate in reversed(passed):
                gate.leave()

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
        sock = await asyncio.wait_for(self._open_worker(), PROGRESS_S)
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
            raise self._closed

    def _put_back(self, worker: Worker) -> None:
        if not worker.at_rest:
            worker.broken("was interrupted")
            return
        worker.rest()
        self._idle.append(worker)
        loop = asyncio.get_running_loop()
        worker.idle_timer = loop.call_later(IDLE_S, self._close_idle, worker)

    def _close_idle(self, worker: Worker) -> None:
        self._idle.remove(worker)
        worker.broken("was idle")


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
        while self._waiting:
            self._room -= 1
            _wake(self._waiting.popleft())
