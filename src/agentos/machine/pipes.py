"""The host's ends of a process's pipes and terminals, on the event loop.

Everything that comes out of a VM is read as fast as it comes into something bounded, and what goes in
waits for the process to take it. No descriptor here ever blocks.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import termios
from collections import deque
from collections.abc import Callable

from agentos.errors import StdinClosed
from agentos.machine.gathering import Gatherer

READ_BYTES = 64 * 1024
_READS_PER_WAKE = 8
MOST_LEFT_READS = 17
"""What the greatest pipe takes that a guest may have (pipe-max-size, pipe(7)), and the end."""
_SMALL_BYTES = 4096
_SMALL_READS = 64
"""In `_WINDOW_SECONDS`: who writes little and often shall not keep the event loop from all else. Beyond that the pipe
is left to fill for a moment, longer each time in a row."""
_WINDOW_SECONDS = 0.01
_REST_SECONDS = (0.001, 0.008)


def pending(fd: int) -> int:
    """Bytes that could be read right now (FIONREAD)."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0])


class Reader:
    """Reads `fd` whenever it has something, hands it to `sink`, and calls `ended` once at its end.

    Owns `fd`. A pty's master reports EIO when its last slave is closed: that is its end. `room` says how much `sink`
    takes now, to READ_BYTES more or less; where that is nothing, reading rests until `resume`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        sink: Callable[[bytes], None],
        ended: Callable[[], None],
        *,
        room: Callable[[], int] | None = None,
        listen: bool = True,
    ) -> None:
        self._loop = loop
        self.fd = fd
        self._sink = sink
        self._ended = ended
        self._room = room
        self._gatherer: Gatherer | None = None
        self._fast = False
        """Whether the last read has shown a writer that is worth it."""
        self._listening = False
        self._small = 0
        self._window = 0.0
        self._rest = 0.0
        self._resting: asyncio.TimerHandle | None = None
        if listen:
            self.resume()

    @property
    def open(self) -> bool:
        """Whether the end has not been reached."""
        return self.fd >= 0

    def resume(self) -> None:
        """Begin to read, or read again after there was no room."""
        if self.fd >= 0 and not self._listening:
            self._loop.add_reader(self.fd, self._readable)
            self._listening = True

    def _pause(self) -> None:
        if self._listening:
            self._loop.remove_reader(self.fd)
            self._listening = False

    def _readable(self) -> None:
        for _ in range(_READS_PER_WAKE):
            room = READ_BYTES if self._room is None else self._room()
            if room <= 0:
                self._pause()
                return
            if self._fast and room > READ_BYTES:
                self._gather(room)
                return
            got = self._read(READ_BYTES)
            self._fast = got > READ_BYTES // 2
            # A short read means that the pipe is empty: asking again would only cost a call.
            if got < READ_BYTES:
                if got < _SMALL_BYTES and self.fd >= 0:
                    self._count_small()
                return

    def _gather(self, room: int) -> None:
        if self._gatherer is None:
            self._gatherer = Gatherer(self.fd)
        data, ended = self._gatherer.read(room)
        self._fast = len(data) >= READ_BYTES
        if data:
            self._sink(data)
        if ended:
            self.close()
            self._ended()

    def _count_small(self) -> None:
        now = self._loop.time()
        if now - self._window > _WINDOW_SECONDS:
            if self._small <= _SMALL_READS:
                self._rest = 0.0
            self._window, self._small = now, 0
        self._small += 1
        if self._small > _SMALL_READS and self._resting is None:
            least, most = _REST_SECONDS
            self._rest = min(max(self._rest * 2, least), most)
            self._pause()
            self._resting = self._loop.call_later(self._rest, self._go_on)

    def _go_on(self) -> None:
        self._resting = None
        self.resume()

    def _read(self, size: int) -> int:
        if self.fd < 0:
            return 0
        try:
            data = os.read(self.fd, size)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""
        if data:
            self._sink(data)
        else:
            self.close()
            self._ended()
        return len(data)

    def drain(self, *, complete: bool = False) -> None:
        """Read what is there now, and no more: a writer that never stops can not hold this up.

        With `complete` no writer is known of, so everything to the end is what is there. (One may have been given
        the pipe, and write on: no more is read than a pipe holds, and then as without.)
        """
        for _ in range(MOST_LEFT_READS if complete else 0):
            if self.fd < 0 or not self._read(READ_BYTES):
                return
        left = pending(self.fd) if self.fd >= 0 else 0
        while left > 0 and self.fd >= 0:
            got = self._read(min(left, READ_BYTES))
            if not got:
                return
            left -= got
        if self.fd >= 0:
            self._read(READ_BYTES)

    def drain_terminal(self) -> None:
        """Read what a terminal has now, at most a few times its buffer."""
        for _ in range(_READS_PER_WAKE):
            if self.fd < 0 or not self._read(READ_BYTES):
                return

    def discard(self) -> None:
        """From now on read only to keep the writers going."""
        self._sink = _ignore
        self._room = None
        self.resume()

    def close(self) -> None:
        """Stop reading and close the descriptor."""
        if self.fd >= 0:
            self._pause()
            if self._resting:
                self._resting.cancel()
            os.close(self.fd)
            self.fd = -1


def _ignore(data: bytes) -> None:
    """The sink of output that nobody will ask for."""


class Writer:
    """Writes to `fd` what it takes, keeps the rest up to `limit` bytes, and makes writers wait beyond that."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        limit: int,
        *,
        duplicate: bool = False,
        what: str = "stdin",
    ) -> None:
        self._loop = loop
        # epoll knows a descriptor once: a master that is also read needs a number of its own for writing.
        self.fd = os.dup(fd) if duplicate else fd
        self._limit = limit
        self._what = what
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._closing = False
        self._broken = False
        self._order = asyncio.Lock()
        self._waiter: asyncio.Future[None] | None = None
        self._listening = False

    async def write(self, data: bytes) -> None:
        """Accept `data`; waits while more than the limit is queued. After StdinClosed nothing of it was queued."""
        async with self._order:
            while self._queued and self._queued + len(data) > self._limit and not self._unusable:
                self._waiter = self._loop.create_future()
                await self._waiter
            self._accept(data)

    def _accept(self, data: bytes) -> None:
        if self._unusable:
            raise self.closed_error()
        if data:
            self._queue.append(memoryview(data))
            self._queued += len(data)
            if not self._listening:
                self._flush()
            if self._broken:
                raise self.closed_error()

    @property
    def _unusable(self) -> bool:
        return self._closing or self._broken

    def closed_error(self) -> StdinClosed:
        """The error of writing now."""
        why = f"{self._what} was closed" if self._closing else f"nobody reads {self._what} any more"
        return StdinClosed(why)

    def _flush(self) -> None:
        while self._queue:
            chunk = self._queue[0]
            try:
                written = os.write(self.fd, chunk)
            except (BlockingIOError, InterruptedError):
                self._listen()
                return
            except OSError:
                self._break()
                return
            self._queued -= written
            if written == len(chunk):
                self._queue.popleft()
            else:
                self._queue[0] = chunk[written:]
            self._wake()
        self._unlisten()
        if self._closing:
            self._close_fd()

    def _listen(self) -> None:
        if not self._listening:
            self._loop.add_writer(self.fd, self._flush)
            self._listening = True

    def _unlisten(self) -> None:
        if self._listening:
            self._loop.remove_writer(self.fd)
            self._listening = False

    def _break(self) -> None:
        self._broken = True
        self._queue.clear()
        self._queued = 0
        self._close_fd()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def finish(self) -> None:
        """Close once everything queued is written: what end of file means to the reader."""
        if not self._unusable:
            self._closing = True
            if not self._queue:
                self._close_fd()
        self._wake()

    def close(self) -> None:
        """Close now; what is still queued is dropped."""
        if not self._broken and not self._closing:
            self._break()
        else:
            self._queue.clear()
            self._close_fd()

    def _close_fd(self) -> None:
        if self.fd >= 0:
            self._unlisten()
            os.close(self.fd)
            self.fd = -1
        self._wake()
