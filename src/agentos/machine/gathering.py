"""The output of a writer that is about as fast as its reader, in large pieces.

What each piece costs beyond its bytes is a multiple of a read(2). A read that empties a full pipe keeps the writer
waiting, while between short ones it works on: so many short reads make one piece.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import threading

PIECE_BYTES = 512 * 1024
"""The most that is read as one piece."""
_PIPE_BYTES = 512 * 1024
"""What the pipe takes meanwhile, so that the writer works on while a piece is dealt with."""
_MOST_READS = 256
_MISSES = 3
"""Reads in a row that find nothing: the writer is about to write its next page."""
_ONCE_FREED_BYTES = 8 * 1024 * 1024

_buffers = threading.local()


class Gatherer:
    """Reads a pipe's end `fd`, which does not block and stays the caller's, of a writer that is fast."""

    def __init__(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # an ordinary user may have so much in pipes, and no more
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        # It says with None, not with an exception, that there is nothing.
        self._read = io.FileIO(fd, closefd=False).readinto

    def read(self, most: int) -> tuple[bytes, bool]:
        """What comes while the writer keeps up, at most `most` bytes or PIECE_BYTES, and whether that was the end."""
        buffer = _buffer()[:most]
        got = misses = 0
        for _ in range(_MOST_READS):
            count = self._read(buffer[got:])
            if count:
                got += count
                misses = 0
                if got == len(buffer):
                    break
            elif count == 0:
                return bytes(buffer[:got]), True
            else:
                misses += 1
                if misses == _MISSES:
                    break
        return bytes(buffer[:got]), False


def _buffer() -> memoryview:
    """PIECE_BYTES of this thread's that stay in the CPU's cache: to be used until the next call."""
    found: memoryview | None = getattr(_buffers, "found", None)
    if found is None:
        # The C library gets memory for each piece from the kernel, page by page, and gives it back, until a larger
        # one was freed (M_MMAP_THRESHOLD in mallopt(3)): that takes as long as all the rest.
        bytes(_ONCE_FREED_BYTES)
        found = _buffers.found = memoryview(bytearray(PIECE_BYTES))
    return found
