"""binfmt_misc: which interpreter runs which files, for a user namespace and those below it (Linux 6.7)."""

from __future__ import annotations

import os

from agentos.linux import mounts


def register(rule: str) -> int:
    """Add `rule` in this user namespace. It holds as long as the returned descriptor, which shows it to nobody."""
    mount_fd = mounts.make_filesystem("binfmt_misc", {}, 0)
    try:
        fd = os.open("register", os.O_WRONLY | os.O_CLOEXEC, dir_fd=mount_fd)
        try:
            os.write(fd, rule.encode())
        finally:
            os.close(fd)
    except OSError:
        os.close(mount_fd)
        raise
    return mount_fd
