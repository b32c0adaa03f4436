"""The host's end of a file worker: frames over a socket whose other end a hostile guest may hold.

Whatever comes from a worker is bounded in size and time before it is believed; a worker that ends, stalls
or speaks anything but the protocol is closed, and whoever was using it gets VmError. Nothing here blocks
the event loop, runs a task of its own, or knows what the frames mean.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from agentos.errors import AgentOSError, VmError
from agentos.machine.fileserver import DATA, FRAME_BYTES, HEADER, PAGE, REPLY, REQUEST

PROGRESS_S = 30.0
"""Seconds within which a worker must take or give the next frame."""
JSON_BYTES = 256 * 1024
"""Greatest JSON that a worker may send: parsing it takes the event loop a few milliseconds."""
TURN_BYTES = 1024 * 1024
"""Bytes moved without waiting after which others get their turn: about a millisecond."""

_BUFFER_BYTES = 64 * 1024
_FRAME_COST = 2048  # what a frame of no size counts towards a turn
_JSON_COST = 64  # what a byte of JSON counts, which has to be parsed

NONSENSE = "gave an answer that makes no sense"

T = TypeVar("T")


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
        await self._send([memoryview(one) for one in (first, *more)])

    async def send_data(self, data: memoryview) -> None:
        """Send at most FRAME_BYTES of bytes as DATA."""
        await self._send([memoryview(HEADER.pack(DATA, len(data))), data])

    async def send_mark(self, kind: int) -> None:
        """Send a frame that has no body."""
        await self._send([memoryview(HEADER.pack(kind, 0))])

    async def receive(self) -> tuple[int, memoryview]:
        """The next frame, with its body, which is overwritten by the one after it."""
        self._check()
        deadline = self._loop.time() + PROGRESS_S
        await self._fill(HEADER.size, deadline)
        kind, length = HEADER.unpack_from(self._buffer, self._start)
        if kind not in (DATA, PAGE, REPLY) or length > (FRAME_BYTES if kind == DATA else JSON_BYTES):
            raise self.broken("spoke what is no frame")
        await self._fill(HEADER.size + length, deadline)
        await self._take_turns(length if kind == DATA else length * _JSON_COST)
        self._check()
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
        """The REPLY to the request. DATA and PAGEs before it are handed on; ValueError there ends it."""
        while True:
            kind, body = await self.receive()
            if kind == REPLY:
                return self.reply(body)
            try:
                if kind == DATA and take_data is not None:
                    take_data(body)
                elif kind == PAGE and take_page is not None:
                    take_page(_parse(body, list))
                else:
                    raise ValueError
            except (ValueError, TypeError, RecursionError):
                raise self.broken(NONSENSE) from None

    def reply(self, body: memoryview) -> dict[str, Any]:
        """What a REPLY says."""
        try:
            return _parse(body, dict)
        except (ValueError, RecursionError):
            raise self.broken(NONSENSE) from None

    async def _fill(self, needed: int, deadline: float) -> None:
        """Have at least `needed` bytes in the buffer."""
        while self._end - self._start < needed:
            self._make_room(needed)
            try:
                self._receive()
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader, deadline)

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


def _parse(body: memoryview, kind: type[T]) -> T:
    content = json.loads(str(body, "ascii"))
    if not isinstance(content, kind):
        raise ValueError
    return content


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
