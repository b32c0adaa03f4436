"""Carries bytes both ways between two sockets. It holds none itself: what one side does not take stays with the other.

A byte leaves the kernel's buffer of the one socket only when that of the other has it: it is looked at
(MSG_PEEK), sent, and then dropped without being copied again (MSG_TRUNC, tcp(7)).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Final

CHUNK_BYTES: Final = 256 * 1024
"""Moved at once, before the event loop turns to something else."""
HALF_CLOSED_SECONDS: Final = 120.0
"""Silence after which a connection is dropped of which one way has ended already."""
_RESET: Final = struct.pack("ii", 1, 0)
_per_thread = threading.local()


def _buffer() -> memoryview:
    found: memoryview | None = getattr(_per_thread, "buffer", None)
    if found is None:
        found = _per_thread.buffer = memoryview(bytearray(CHUNK_BYTES))
    return found


def reset(sock: socket.socket) -> None:
    """Close it so that the other end reads ECONNRESET, and not an end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


class Relay:
    """Two connected, non-blocking sockets, closed here. `sent` and `received` count the bytes from and to `inner`."""

    def __init__(self, inner: socket.socket, outer: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._out = _Way(self, inner, outer)
        self._in = _Way(self, outer, inner)
        self._sockets = (inner, outer)
        self._timer: asyncio.TimerHandle | None = None
        self._moved = 0

    @property
    def sent(self) -> int:
        """Bytes that went out."""
        return self._out.count

    @property
    def received(self) -> int:
        """Bytes that came in."""
        return self._in.count

    async def run(self) -> None:
        """Carry until both ways have ended, or one end has failed: the other then reads a reset."""
        whole = False
        try:
            self._out.begin()
            self._in.begin()
            await self._done
            whole = self._out.ended and self._in.ended
        finally:
            self._out.stop()
            self._in.stop()
            if self._timer is not None:
                self._timer.cancel()
            for sock in self._sockets:
                sock.close() if whole else reset(sock)

    def way_ended(self) -> None:
        """One way has come to its end."""
        if self._out.ended and self._in.ended:
            self.over()
        else:
            self._watch()

    def _watch(self) -> None:
        self._moved = self.sent + self.received
        self._timer = self._loop.call_later(HALF_CLOSED_SECONDS, self._look)

    def _look(self) -> None:
        if self._moved == self.sent + self.received:
            self.over()
        else:
            self._watch()

    def over(self) -> None:
        """Nothing more is carried."""
        if not self._done.done():
            self._done.set_result(None)


class _Way:
    """One direction."""

    def __init__(self, relay: Relay, source: socket.socket, sink: socket.socket) -> None:
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._sink = sink
        self._waits_for_sink = False
        self.count = 0
        self.ended = False

    def begin(self) -> None:
        """Wait for bytes to carry."""
        self._loop.add_reader(self._source.fileno(), self._move)

    def _move(self) -> None:
        buffer = _buffer()
        try:
            size = self._source.recv_into(buffer, 0, socket.MSG_PEEK)
            if size == 0:
                self._end()
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._relay.over()
            return
        try:
            sent = self._sink.send(buffer[:size])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._relay.over()
            return
        if sent:
            self._source.recv_into(buffer, sent, socket.MSG_TRUNC)
            self.count += sent
        if (sent < size) != self._waits_for_sink:
            self._switch()

    def _switch(self) -> None:
        """Wait for the sink to take more, or again for the source to have more."""
        self._waits_for_sink = not self._waits_for_sink
        if self._waits_for_sink:
            self._loop.remove_reader(self._source.fileno())
            self._loop.add_writer(self._sink.fileno(), self._move)
        else:
            self._loop.remove_writer(self._sink.fileno())
            self._loop.add_reader(self._source.fileno(), self._move)

    def _end(self) -> None:
        self.stop()
        self.ended = True
        with contextlib.suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)
        self._relay.way_ended()

    def stop(self) -> None:
        """Wait for nothing any more."""
        if self.ended:
            return
        if self._waits_for_sink:
            self._loop.remove_writer(self._sink.fileno())
        else:
            self._loop.remove_reader(self._source.fileno())
