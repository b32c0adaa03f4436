"""What an exec collects of one of its program's streams."""

from __future__ import annotations

import asyncio
import codecs
import os
from collections.abc import Callable

from agentos.machine.pipes import MOST_LEFT_READS, READ_BYTES, Reader
from agentos.model import Encoding


class Capture:
    """The first `limit` bytes of what comes out of the pipe `fd`, and how many there were. Owns `fd`.

    Nothing is read before `listen` or `drain`: most programs have ended by then, with all that they wrote in the pipe.
    """

    def __init__(self, fd: int, limit: int) -> None:
        self.total = 0
        self.ended = False
        """Whether the end of the pipe was reached, and `fd` is closed."""
        self._fd = fd
        self._limit = limit
        self._parts: list[bytes] = []
        self._reader: Reader | None = None
        self._noticed: Callable[[], None] | None = None

    def listen(self, loop: asyncio.AbstractEventLoop, noticed: Callable[[], None]) -> None:
        """Read what comes from now on; `noticed` is called after each piece."""
        if not self.ended:
            self._noticed = noticed
            self.reader(loop).resume()

    def reader(self, loop: asyncio.AbstractEventLoop) -> Reader:
        """What reads the pipe from now on, and then owns it: for whoever goes on with that when this is done."""
        if self._reader is None:
            self._reader = Reader(loop, self._fd, self._add, self._end, listen=False)
        return self._reader

    def _add(self, data: bytes) -> None:
        room = self._limit - self.total
        self.total += len(data)
        if room > 0:
            self._parts.append(data if len(data) <= room else data[:room])
        if self._noticed is not None:
            self._noticed()

    def _end(self) -> None:
        self.ended = True

    def drain(self, loop: asyncio.AbstractEventLoop, *, complete: bool) -> None:
        """Read what is there now, as Reader.drain does."""
        if self._reader is None and complete:
            # As it mostly goes, and so without one.
            for _ in range(MOST_LEFT_READS):
                try:
                    data = os.read(self._fd, READ_BYTES)
                except BlockingIOError:
                    break
                if not data:
                    os.close(self._fd)
                    self.ended = True
                    return
                self._add(data)
        if not self.ended:
            self.reader(loop).drain(complete=complete)

    def value(self, encoding: Encoding) -> str | bytes:
        """What was kept, as bytes or as text. A character that the limit cut in two is left out whole."""
        data = b"".join(self._parts)
        if encoding == "bytes":
            return data
        if self.total > self._limit:
            # final=False leaves an incomplete last character out; what follows it was cut off, not wrong.
            return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=False)
        return data.decode("utf-8", "replace")
