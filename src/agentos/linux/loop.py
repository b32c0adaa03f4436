"""Loop devices: a file as a block device (loop(4)), for as long as something has it open or mounted."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

# linux/loop.h
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16
_CONFIG = struct.Struct("=II 5Q4I 64s64s32s2Q 8Q")  # struct loop_config with its struct loop_info64
_TRIES = 50


def attach(file_fd: int, block_bytes: int) -> tuple[int, str]:
    """A loop device of the file: a descriptor of it, and its path.

    It is given back by the kernel when its last user is gone, however that ends (LO_FLAGS_AUTOCLEAR). Until then the
    kernel holds the open file too, and with it a flock(2) that the caller had taken on `file_fd`.
    """
    for _ in range(_TRIES):
        number = _free_number()
        path = f"/dev/loop{number}"
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO  # a page is cached by what is mounted, not twice
            config = _CONFIG.pack(file_fd, block_bytes, *([0] * 8), flags, b"", b"", b"", *([0] * 10))
            fcntl.ioctl(device, LOOP_CONFIGURE, config)
        except OSError as error:
            os.close(device)
            if error.errno == errno.EBUSY:
                continue  # somebody was quicker to take this number
            error.add_note(f"LOOP_CONFIGURE on {path}")
            raise
        return device, path
    raise OSError(errno.EBUSY, "every free loop device was taken by somebody else")


def _free_number() -> int:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    finally:
        os.close(control)
