"""What a VM takes up of the host's disk, where nothing but the file system bounds it: watched, and stopped.

For ordinary users, and where there are no loop devices, a VM's files lie in a directory. The kernel has no limit for
that, and tells nobody how it grows. So the file system's free space is looked at every second, which costs a
system call; when it has shrunk by a part of the limit, the directory is measured. A VM that is beyond its limit has
its programs killed, as one without memory would, and gets room again by deleting files.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

from agentos.model import Limits

_LOOK_SECONDS: Final = 1.0
_PART: Final = 8
"""The directory is measured when the file system has lost this part of the limit."""
_REST: Final = 20.0
"""How many times as long as a measurement took there is none."""


class Footprint:
    """Watches the directory of one running VM.

    `measure` starts a measurement, of which the descriptor that it returns brings two lines: bytes and files.
    `exceeded` is called with the name of the limit each time the VM is beyond it and has grown.
    """

    def __init__(
        self,
        directory: str,
        limits: Limits,
        measure: Callable[[str], int],
        exceeded: Callable[[str], None],
    ) -> None:
        self.full: str | None = None
        """The limit that the VM is beyond, as far as is known."""
        self._loop = asyncio.get_running_loop()
        self._directory = directory
        self._most = {"disk_bytes": limits.disk_bytes, "disk_files": limits.disk_files}
        self._measure = measure
        self._exceeded = exceeded
        self._free: tuple[int, int] | None = None
        """Bytes and files that were free on the host when the directory was measured last."""
        self._last = {"disk_bytes": 0, "disk_files": 0}
        self._fd = -1
        self._told = b""
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(_LOOK_SECONDS, self._look)

    def stop(self) -> None:
        """The VM has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _look(self) -> None:
        try:
            found = os.statvfs(self._directory)
            free = (found.f_bavail * found.f_frsize, found.f_favail)
            if self.full is None and self._free is not None and not self._shrunk(free):
                self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)
                return
            self._free = free
            self._began = self._loop.time()
            self._fd = self._measure(self._directory)
        except OSError:
            return  # the host is closing, and the VM with it
        self._loop.add_reader(self._fd, self._readable)

    def _shrunk(self, free: tuple[int, int]) -> bool:
        assert self._free is not None
        parts = (most // _PART for most in self._most.values())
        return any(before - now > part for before, now, part in zip(self._free, free, parts, strict=True))

    def _readable(self) -> None:
        told = os.read(self._fd, 4096)
        self._told += told
        if told:
            return
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        fields, self._told = self._told.split(), b""
        rest = max(_LOOK_SECONDS, _REST * (self._loop.time() - self._began))
        self._timer = self._loop.call_later(rest, self._look)
        if len(fields) == 2:
            self._measured({"disk_bytes": int(fields[0]), "disk_files": int(fields[1])})

    def _measured(self, now: dict[str, int]) -> None:
        self.full = next((limit for limit, most in self._most.items() if now[limit] > most), None)
        before, self._last = self._last, now
        # Whoever deletes files is left to do so.
        if self.full is not None and now[self.full] > before[self.full]:
            self._exceeded(self.full)
