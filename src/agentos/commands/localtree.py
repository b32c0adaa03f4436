"""Writing into a directory of this machine what comes out of a VM, and nothing outside of it.

The names are a stranger's, and what lies in the directory may be too, from an earlier copy: so no symbolic link
below it is followed. Every component is opened by itself, below the one before.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence

from agentos.errors import FileError


class LocalTree:
    """The directory `root`, which the user has named: that path may lead over links."""

    def __init__(self, root: str) -> None:
        self._root = root

    def mkdir(self, parts: Sequence[str]) -> None:
        """Make the directory `parts` below it, with those above. No effect on those that are there."""
        with self._directory(parts):
            pass

    def open(self, parts: Sequence[str]) -> int:
        """A descriptor of the file `parts` below it, made or emptied; the directories above are made. Caller closes."""
        with self._directory(parts[:-1]) as parent:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                return os.open(parts[-1], flags, 0o666, dir_fd=parent)
            except OSError as error:
                raise self._told(error, parent, parts) from None

    def symlink(self, parts: Sequence[str], target: str, modified: float) -> None:
        """A symbolic link `parts` below it to `target`, in the place of what is there, unless that is a directory."""
        with self._directory(parts[:-1]) as parent:
            try:
                try:
                    os.symlink(target, parts[-1], dir_fd=parent)
                except FileExistsError:
                    os.unlink(parts[-1], dir_fd=parent)
                    os.symlink(target, parts[-1], dir_fd=parent)
                os.utime(parts[-1], (time.time(), modified), dir_fd=parent, follow_symlinks=False)
            except OSError as error:
                raise self._told(error, parent, parts) from None

    def finish(self, parts: Sequence[str], mode: int, modified: float) -> None:
        """Give the directory `parts` below it its permissions and time, when all in it is there."""
        with self._directory(parts) as directory:
            os.fchmod(directory, mode)
            os.utime(directory, (time.time(), modified))

    @contextlib.contextmanager
    def _directory(self, parts: Sequence[str]) -> Iterator[int]:
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for index, name in enumerate(parts):
                below = self._enter(fd, name, parts[: index + 1])
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _enter(self, parent: int, name: str, parts: Sequence[str]) -> int:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=parent)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(name, flags, dir_fd=parent)
        except OSError as error:
            raise self._told(error, parent, parts) from None

    def _told(self, error: OSError, parent: int, parts: Sequence[str]) -> OSError:
        path = os.path.join(self._root, *parts)
        with contextlib.suppress(OSError):
            if stat.S_ISLNK(os.lstat(parts[-1], dir_fd=parent).st_mode):
                said = (
                    f"{path} is a symbolic link: nothing out of a VM is written through one (remove it first)"
                )
                return FileError(said, path=path)
        return OSError(error.errno, error.strerror, path)
