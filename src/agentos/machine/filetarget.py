"""Where a write of the file worker in the VM goes: so that no reader ever sees half a file.

Part of the worker, as `filetree` is.
"""

from __future__ import annotations

import errno
import os
import stat

from agentos.machine.filetree import (
    QUIET,
    Step,
    copy_data,
    make_directories,
    open_regular,
    regular_only,
    temporary_name,
)

# The new file has no place here, or may not take the old one's: a read-only or sticky directory, /proc, a
# mount point.
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EOPNOTSUPP)


class Target:
    """What a write goes to: a new file that takes the old one's place at the end, or else the file itself."""

    def __init__(self, path: str, mode: int | None, *, append: bool, parents: bool) -> None:
        self._old = self._new = self._parent = -1
        self._temporary: str | None = None
        self._mode = mode
        try:
            self._open(path, append, parents)
        except BaseException:
            self.discard()
            raise

    def _open(self, path: str, append: bool, parents: bool) -> None:
        try:
            found: os.stat_result | None = os.stat(path)
        except FileNotFoundError:
            found = None
            if parents and not os.path.isdir(os.path.dirname(path)):
                make_directories(os.path.dirname(path))
        if found:
            regular_only(found)
        if os.path.islink(path):
            path = os.path.realpath(path)
        parent, self._name = os.path.split(path)
        if self._name in ("", ".", ".."):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if found or append:
            self._open_old(path, append)
        if not append:
            self._open_new(parent, found)

    def _open_old(self, path: str, append: bool) -> None:
        """Open the file itself: who may not write it may not replace it either."""
        flags = os.O_APPEND | os.O_CREAT if append else 0
        try:
            self._old = open_regular(path, os.O_WRONLY | flags, 0o666)
        except OSError as problem:
            # A program that runs can be replaced, though not be written.
            if append or problem.errno != errno.ETXTBSY:
                raise
        if append and self._mode is not None:
            os.fchmod(self._old, self._mode)

    def _open_new(self, parent: str, found: os.stat_result | None) -> None:
        try:
            self._parent = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._new = self._open_temporary()
        except OSError as problem:
            if self._old < 0 or problem.errno not in _NO_PLACE:
                raise
            if self._mode is not None:
                os.fchmod(self._old, self._mode)
            os.ftruncate(self._old, 0)
            return
        made = os.fstat(self._new)
        # A file of several names, or of an owner that a new one could not have, keeps its identity.
        self._keep = found is not None and (
            found.st_nlink > 1 or (found.st_uid, found.st_gid) != (made.st_uid, made.st_gid)
        )
        mask = os.umask(0o022)
        os.umask(mask)
        self._new_mode = stat.S_IMODE(found.st_mode) & 0o777 if found else 0o666 & ~mask
        if self._mode is not None:
            self._new_mode = self._mode

    def _open_temporary(self) -> int:
        """A nameless file, which leaves nothing behind whatever happens; a named one where there is none."""
        fd = -1
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._parent)
            os.stat(f"/proc/self/fd/{fd}")  # it will be given its name through this path
            return fd
        except OSError:
            if fd >= 0:
                os.close(fd)
        name = temporary_name()
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | QUIET, 0o600, dir_fd=self._parent)
        self._temporary = name
        return fd

    def write(self, data: memoryview) -> None:
        """Write all of `data` after what was written before."""
        fd = self._new if self._new >= 0 else self._old
        while data:
            data = data[os.write(fd, data) :]

    def commit(self, step: Step) -> None:
        """Make what was written the content of the file."""
        if self._new < 0:
            return
        if not self._keep:
            try:
                self._replace()
                return
            except OSError as problem:
                if self._old < 0 or problem.errno not in _NO_PLACE:
                    raise
        if self._old < 0:
            raise OSError(errno.ETXTBSY, "Text file busy")
        if self._mode is not None:
            os.fchmod(self._old, self._mode)
        os.ftruncate(self._old, 0)
        copy_data(self._new, self._old, step)

    def _replace(self) -> None:
        os.fchmod(self._new, self._new_mode)
        if self._temporary is None:
            name = temporary_name()
            os.link(f"/proc/self/fd/{self._new}", name, dst_dir_fd=self._parent, follow_symlinks=True)
            self._temporary = name
        os.rename(self._temporary, self._name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        self._temporary = None

    def discard(self) -> None:
        """Close everything and remove what is not committed."""
        if self._temporary is not None:
            try:
                os.unlink(self._temporary, dir_fd=self._parent)
            except OSError:
                pass  # the guest was faster, or took away the right
        for fd in (self._old, self._new, self._parent):
            if fd >= 0:
                os.close(fd)
        self._old = self._new = self._parent = -1
        self._temporary = None
