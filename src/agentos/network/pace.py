"""Takes what arrives at a socket only so fast: whatever a guest does, it costs the host a bounded part of its time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

_BURST_SECONDS: Final = 0.5
"""What was not used for so long may be used at once."""


class Pace:
    """Calls `ready` when `sock` is readable, unless `take` has said no: then when there is something to take again."""

    def __init__(self, per_second: float, sock: socket.socket, ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._rate = per_second
        self._most = per_second * _BURST_SECONDS
        self._left = self._most
        self._at = self._loop.time()
        self._sock = sock
        self._ready = ready
        self._timer: asyncio.TimerHandle | None = None
        self._paused = True
        self._closed = False
        self.resume()

    def take(self) -> bool:
        """Whether one more may be taken now."""
        now = self._loop.time()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return True
        # Not only until there is one: the loop would be woken for each.
        self.rest(_BURST_SECONDS / 10)
        return False

    def rest(self, seconds: float = 1.0) -> None:
        """Take no more for a while."""
        self.pause()
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self.resume)

    def pause(self) -> None:
        """Take no more until `resume`."""
        if not self._paused:
            self._paused = True
            self._loop.remove_reader(self._sock.fileno())

    def resume(self) -> None:
        """Go on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._paused and not self._closed:
            self._paused = False
            self._loop.add_reader(self._sock.fileno(), self._ready)

    def close(self) -> None:
        """For good."""
        self._closed = True
        self.pause()
        if self._timer is not None:
            self._timer.cancel()
