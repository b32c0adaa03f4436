"""Frames on their way into one WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agentos.server.http import Send
from agentos.wire.encodings import Frame


class Outgoing:
    """Sends frames one at a time, in the order in which they come. `lost` is called when one cannot be sent."""

    def __init__(self, send: Send, lost: Callable[[], None]) -> None:
        self.unsent = 0
        """Bytes that are being sent, or wait for that."""
        self.waiting = 0
        """The frames that these bytes are in."""
        self._raw_send = send
        self._lost = lost
        self._alone = False
        """Whether a frame is being sent that found no other: it does without the lock, which is for those behind it."""
        self._sending = asyncio.Lock()
        self._taken: asyncio.Event | None = None
        """What the end of a send is waited for with, while somebody does."""

    async def send(self, frame: Frame) -> None:
        """Send a frame; returns when the socket takes more."""
        message = {"type": "websocket.send", "text" if isinstance(frame, str) else "bytes": frame}
        alone = not self.unsent
        self.unsent += len(frame)
        self.waiting += 1
        try:
            if alone:
                self._alone = True
                try:
                    await self._raw_send(message)
                finally:
                    self._alone = False
            else:
                async with self._sending:
                    while self._alone:
                        await self._something_taken()
                    await self._raw_send(message)
        except asyncio.CancelledError:
            raise
        except Exception:
            self._lost()
        finally:
            self.unsent -= len(frame)
            self.waiting -= 1
            if self._taken is not None:
                self._taken.set()
                self._taken = None

    async def at_most(self, size: int, frames: int) -> None:
        """Return when no more than `size` bytes are unsent, in no more than `frames` frames."""
        while self.unsent > size or self.waiting > frames:
            await self._something_taken()

    async def _something_taken(self) -> None:
        if self._taken is None:
            self._taken = asyncio.Event()
        await self._taken.wait()
