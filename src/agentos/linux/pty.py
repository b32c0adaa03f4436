"""Pseudoterminals of this mount namespace's own devpts, and their window size."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import termios

# asm-generic/ioctls.h; the termios module of older Pythons lacks them.
_PTMX = os.makedev(5, 2)  # Documentation/admin-guide/devices.txt
_TIOCSPTLCK, _TIOCGPTN, _TIOCGPTPEER = 0x40045431, 0x80045430, 0x5441


def open_master() -> int:
    """The master of a new pseudoterminal of this mount namespace's devpts, pty(7), close-on-exec."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    except OSError:
        os.close(master)
        raise
    return master


def is_master(fd: int) -> bool:
    """Whether `fd` is the master of a pseudoterminal, and nothing else."""
    found = os.fstat(fd)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == _PTMX


def slave_path(master: int) -> str:
    """The path of the other end, ptsname(3)."""
    number = struct.unpack("I", fcntl.ioctl(master, _TIOCGPTN, b"\0\0\0\0"))[0]
    return f"/dev/pts/{number}"


def open_slave(master: int) -> int:
    """The other end, close-on-exec, whichever mount namespace it lies in (TIOCGPTPEER). It does not become ours."""
    return fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)


def set_size(fd: int, rows: int, cols: int) -> None:
    """TIOCSWINSZ: the kernel sends SIGWINCH to the foreground process group when the size changes."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
