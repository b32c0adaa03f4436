"""Disks: a file in a VM's storage directory that holds an ext4 file system, so that what a VM writes has a bound.

The file is sparse: it takes up what the VM has written, and gives back what the VM deletes. It is mounted over a
loop device that the kernel lets go of with the mount, and the mount is in no mount namespace but the VM's: so
nothing is left to clean up, however the host ends. A journal keeps the file system whole if the machine stops.
Only root can do this, on hosts with loop devices and mkfs.ext4; whether it works is found out by doing it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass

from agentos.linux import loop, mounts
from agentos.model import Limits

NAME = "disk.ext4"
"""The file in the storage directory."""
_BLOCK = 4096
_INODE = 256
_OWN_FILES = 64
"""Inodes beyond disk_files, for the directories that the layers need."""
_OPTIONS = {"noinit_itable": "", "discard": "", "errors": "remount-ro"}
_JOURNAL_MIB = 4
_MKFS_TRIES = 5
_IN_USE_SECONDS = 20.0
"""How long a disk may still be in use by a VM that is ending: what it wrote last is written out."""
_PROGRAM_PATH = {"PATH": "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"}


@dataclass(frozen=True, slots=True)
class _Template:
    """A fresh file system: its size, and those of its bytes that are not zero."""

    size: int
    parts: tuple[tuple[int, bytes], ...]


class Disks:
    """Makes and mounts disks. Everything here blocks, and may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._templates: dict[tuple[int, int], _Template] = {}
        self._trouble: dict[int, str] = {}
        """Device number of a host's file system -> why there can be no disks on it, empty where there can."""

    def trouble(self, directory: str) -> str:
        """Why there can be no disks in `directory`; empty where one could be made and mounted."""
        device = os.stat(directory).st_dev
        with self._lock:
            if device not in self._trouble:
                self._trouble[device] = self._try(directory)
            return self._trouble[device]

    def _try(self, directory: str) -> str:
        try:
            with tempfile.TemporaryDirectory(prefix=".disk-", dir=directory) as probe:
                self._make(f"{probe}/{NAME}", Limits())
                os.close(_mount(f"{probe}/{NAME}"))
        except OSError as error:
            return "; ".join([str(error), *getattr(error, "__notes__", [])])
        return ""

    def open(self, directory: str, limits: Limits) -> int | None:
        """A detached mount of the directory's disk, which is made for `limits` if the directory is empty.

        None where the files of the VM are to lie in the directory itself, because they do already or because there
        can be no disk. Raises OSError when its disk cannot be mounted.
        """
        path = f"{directory}/{NAME}"
        if not os.path.lexists(path):
            if os.listdir(directory) or self.trouble(os.path.dirname(directory)):
                return None
            with self._lock:
                self._make(path, limits)
        return _mount(path)

    def _make(self, path: str, limits: Limits) -> None:
        key = (limits.disk_bytes, limits.disk_files)
        template = self._templates.get(key)
        if template is None:
            template = self._templates[key] = _new_template(os.path.dirname(path), *key)
        unfinished = f"{path}.new"
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, template.size)
            for offset, data in template.parts:
                os.pwrite(fd, data, offset)
        finally:
            os.close(fd)
        os.rename(unfinished, path)


def _new_template(directory: str, disk_bytes: int, disk_files: int) -> _Template:
    wanted = -(-disk_bytes // _BLOCK)
    files = disk_files + _OWN_FILES
    blocks = wanted + files * _INODE // _BLOCK + 2048  # and what the bitmaps take, seen when it is there
    with tempfile.NamedTemporaryFile(prefix=".mkfs-", dir=directory) as file:
        for _ in range(_MKFS_TRIES):
            os.ftruncate(file.fileno(), 0)
            os.ftruncate(file.fileno(), blocks * _BLOCK)
            _mkfs(file.name, files)
            surplus = _usable_blocks(file.fileno()) - wanted
            if 0 <= surplus <= wanted // 1000 + 16:
                break
            blocks -= surplus
        return _Template(blocks * _BLOCK, tuple(_parts(file.fileno())))


def _mkfs(path: str, files: int) -> None:
    command = [
        "mkfs.ext4", "-q", "-F", "-b", str(_BLOCK), "-I", str(_INODE), "-N", str(files), "-m", "0",
        "-J", f"size={_JOURNAL_MIB}", "-O", "^resize_inode", "-E",
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", path,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_PROGRAM_PATH, check=False)
    except FileNotFoundError:
        raise OSError(errno.ENOENT, "mkfs.ext4 is not installed (package e2fsprogs)") from None
    if done.returncode != 0:
        raise OSError(errno.EINVAL, f"mkfs.ext4 failed: {done.stderr.strip()[:500]}")


def _usable_blocks(fd: int) -> int:
    """Free blocks of a fresh file system, without those that the kernel keeps to itself: a 50th, at most 4096."""
    superblock = os.pread(fd, 1024, 1024)
    (all_blocks, _, free) = struct.unpack_from("<III", superblock, 4)
    all_high, _, free_high = struct.unpack_from("<III", superblock, 0x150)
    all_blocks |= all_high << 32
    return int((free | free_high << 32) - min(all_blocks // 50, 4096))


def _parts(fd: int) -> list[tuple[int, bytes]]:
    """(offset, data) of every run of blocks that are not zero."""
    parts: list[tuple[int, bytes]] = []
    offset = 0
    while True:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:
            return parts  # ENXIO: no data follows
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        for at in range(start - start % _BLOCK, offset, _BLOCK):
            block = os.pread(fd, _BLOCK, at)
            if not block.strip(b"\0"):
                continue
            if parts and parts[-1][0] + len(parts[-1][1]) == at:
                parts[-1] = (parts[-1][0], parts[-1][1] + block)
            else:
                parts.append((at, block))


def _mount(path: str) -> int:
    """A detached mount of the disk. It holds the disk alone: twice mounted, it would be destroyed."""
    file_fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _lock(file_fd, path)
        device, device_path = loop.attach(file_fd, _BLOCK)
        try:
            bits = mounts.attribute_bits(["nosuid", "nodev"])
            return mounts.make_filesystem("ext4", {"source": device_path, **_OPTIONS}, bits)
        finally:
            os.close(device)
    finally:
        os.close(file_fd)


def _lock(file_fd: int, path: str) -> None:
    # The kernel lets go of a disk shortly after its last VM has ended, and flock(2) knows no time limit.
    deadline = time.monotonic() + _IN_USE_SECONDS
    while True:
        try:
            fcntl.flock(file_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "the disk is in use by another VM", path) from None
            time.sleep(0.002)
