"""Pseudoterminals: a pair from this mount namespace's own devpts, and its window size."""

from __future__ import annotations

import fcntl
import os
import struct
import termios

# asm-generic/ioctls.h; the termios module of older Pythons lacks them.
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441


def open_pair() -> tuple[int, int]:
    """(master, slave) descriptors of a new pseudoterminal, pty(7). Both are close-on-exec."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        # TIOCGPTPEER opens the other end without a path: no walk that somebody could redirect.
        slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        os.close(master)
        raise
    return master, slave


def set_size(fd: int, rows: int, cols: int) -> None:
    """TIOCSWINSZ: the kernel sends SIGWINCH to the foreground process group when the size changes."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def make_controlling(slave: int) -> None:
    """TIOCSCTTY: makes `slave` the controlling terminal of the session that the caller leads."""
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
