"""What the file worker in the VM does to files and whole trees: open, copy, move, delete.

Runs inside the VM, with the rights of the VM's user, on paths that the guest may change at any moment.
A tree is never followed through a symlink, and its depth costs neither recursion nor descriptors.
`step` is called for each entry (or megabyte) done, so that the caller can show that a long operation goes on.

Part of the worker: only these few modules are imported.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

SWEEP_DIRECTORIES = 10_000
"""Subdirectories that a deletion keeps in mind for each level."""
REFILLS = 100
"""Times that a deletion finds directories filled again, before it gives up."""
COPY_BYTES = 1024 * 1024

# Never wait for a fifo's other end, never take a terminal, never leak.
QUIET = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | QUIET

Step = Callable[[], None]


class PathError(Exception):
    """An error (an errno) on a path that may be another than the one asked for."""

    def __init__(self, number: int | None, path: str) -> None:
        super().__init__(number, path)
        self.number = number
        self.path = path


def regular_only(found: os.stat_result) -> None:
    """Refuse (OSError) what is not a regular file: EISDIR for a directory, ENXIO for all else."""
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.ENXIO, "Not a regular file")


def open_regular(path: str, flags: int, mode: int = 0) -> int:
    """open(2) of a regular file only, without ever waiting."""
    # Already opening a fifo or a device can have an effect, so look first; and again, for it may be swapped.
    if not flags & os.O_CREAT or os.path.exists(path):
        regular_only(os.stat(path))
    fd = os.open(path, flags | QUIET, mode)
    try:
        regular_only(os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return fd


def temporary_name() -> str:
    """A name that nobody else uses."""
    return f".agentos-{os.urandom(8).hex()}"


def make_directories(path: str) -> None:
    """mkdir -p, without recursion: a path can have two thousand parts."""
    end = 0
    while end < len(path):
        end = path.find("/", end + 1)
        end = len(path) if end < 0 else end
        try:
            os.mkdir(path[:end])
        except FileExistsError:
            pass


def copy_data(source_fd: int, target_fd: int, step: Step) -> None:
    """Make the empty file `target_fd` hold what `source_fd` holds; holes stay holes."""
    size, position = os.fstat(source_fd).st_size, 0
    while position < size:
        try:
            position = os.lseek(source_fd, position, os.SEEK_DATA)
        except OSError as problem:
            if problem.errno != errno.ENXIO:
                raise
            break  # nothing but a hole up to the end
        end = min(size, os.lseek(source_fd, position, os.SEEK_HOLE))
        os.lseek(target_fd, position, os.SEEK_SET)
        while position < end:
            count = os.sendfile(target_fd, source_fd, position, min(COPY_BYTES, end - position))
            if not count:
                return  # it was cut short meanwhile
            position += count
            step()
    os.ftruncate(target_fd, size)


class _Level:
    """A directory that a deletion is in: `todo` are subdirectories yet to be removed."""

    __slots__ = ("ident", "name", "todo")

    def __init__(self, name: str, fd: int) -> None:
        found = os.fstat(fd)
        self.name = name
        self.ident = (found.st_dev, found.st_ino)
        self.todo: list[str] = []


class _Removal:
    """The deletion of one tree. Only the directory at hand is open; the way back is `..`, checked."""

    def __init__(self, parent_fd: int, name: str, step: Step) -> None:
        self._here = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
        self._trail = [_Level(name, self._here)]
        self._step = step
        self._refills = 0

    def run(self) -> None:
        """Empty the directory. Raises PathError at what can not be removed."""
        try:
            while True:
                level = self._trail[-1]
                if not level.todo:
                    level.todo = self._sweep()
                if level.todo:
                    self._remove_or_enter(level.todo.pop())
                elif len(self._trail) == 1:
                    return
                else:
                    self._leave()
        except OSError as problem:
            raise PathError(problem.errno, "/".join(level.name for level in self._trail)) from problem
        finally:
            os.close(self._here)

    def _sweep(self) -> list[str]:
        """Remove all that is no directory; return directories, perhaps not all."""
        found: list[str] = []
        with os.scandir(self._here) as entries:
            for entry in entries:
                try:
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=self._here)
                        self._step()
                        continue
                except FileNotFoundError:
                    continue
                except IsADirectoryError:
                    pass
                found.append(entry.name)
                if len(found) == SWEEP_DIRECTORIES:
                    break
        return found

    def _remove_or_enter(self, name: str) -> None:
        try:
            os.rmdir(name, dir_fd=self._here)
            self._step()
            return
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as problem:
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            below = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=self._here)
        except (FileNotFoundError, NotADirectoryError):
            return
        os.close(self._here)
        self._here = below
        self._trail.append(_Level(name, below))

    def _leave(self) -> None:
        """Back to the directory above, and leave the one that is empty now to be removed from there."""
        above = os.open("..", DIRECTORY, dir_fd=self._here)
        os.close(self._here)
        self._here = above
        done = self._trail.pop()
        # Someone may have moved it: what `..` is then must not be deleted.
        if _Level("", above).ident != self._trail[-1].ident:
            raise OSError(errno.EBUSY, "Moved while it was being deleted")
        try:
            os.rmdir(done.name, dir_fd=above)
            self._step()
        except FileNotFoundError:
            pass
        except OSError as problem:
            self._refills += 1
            if problem.errno != errno.ENOTEMPTY or self._refills > REFILLS:
                raise
            self._trail[-1].todo.append(done.name)


def remove_tree(path: str, step: Step) -> None:
    """Remove directory `path` and all in it. Raises PathError at the first thing that can not be removed."""
    parent, name = os.path.split(path.rstrip("/"))
    if name in ("", ".", ".."):
        raise PathError(errno.EBUSY, path)
    parent_fd = -1
    try:
        parent_fd = os.open(parent or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for _ in range(REFILLS):
            try:
                os.rmdir(name, dir_fd=parent_fd)
                return
            except OSError as problem:
                if problem.errno != errno.ENOTEMPTY:
                    raise
            _Removal(parent_fd, name, step).run()
        raise OSError(errno.ENOTEMPTY, "Filled again and again")
    except OSError as problem:
        raise PathError(problem.errno, path) from problem
    except PathError as problem:
        raise PathError(problem.number, f"{parent}/{problem.path}") from problem
    finally:
        if parent_fd >= 0:
            os.close(parent_fd)


def move(source: str, target: str, *, overwrite: bool, step: Step) -> None:
    """rename(2); from one mount to another: copy, then delete. Raises PathError."""
    try:
        _rename(source, target, overwrite)
        return
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            # Where the source is there, what is wrong is the target.
            raise PathError(problem.errno, target if os.path.lexists(source) else source) from problem
    # Under a name of its own first: the target is there as a whole, or as it was.
    copied = os.path.join(os.path.dirname(target.rstrip("/")), temporary_name())
    try:
        _copy_tree(source, copied, step)
        _rename(copied, target, overwrite)
    except BaseException as problem:
        _remove_quietly(copied)
        if isinstance(problem, OSError):
            where = problem.filename if isinstance(problem.filename, str) else target
            raise PathError(problem.errno, where) from problem
        raise
    if stat.S_ISDIR(os.lstat(source).st_mode):
        remove_tree(source, step)
    else:
        os.unlink(source)


def _rename(source: str, target: str, overwrite: bool) -> None:
    """rename(2), where nothing may be overwritten so that also a racing creation of the target fails it."""
    if overwrite:
        os.rename(source, target)
    elif stat.S_ISDIR(os.lstat(source).st_mode):
        os.mkdir(target)
        try:
            os.rename(source, target)
        except OSError:
            os.rmdir(target)
            raise
    else:
        try:
            os.link(source, target, follow_symlinks=False)
        except PermissionError:
            # A file of someone else may not get a second name: then only as good as a look beforehand.
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "File exists") from None
            os.rename(source, target)
        else:
            os.unlink(source)


def _remove_quietly(path: str) -> None:
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            remove_tree(path, _no_step)
        else:
            os.unlink(path)
    except (OSError, PathError):
        pass  # it was never made, or the guest keeps us from removing it


def _no_step() -> None:
    """Nobody is to be told."""


def _copy_tree(source: str, target: str, step: Step) -> None:
    """Copy a file, symlink or directory with modes and times. Raises PathError for anything else."""
    pending = [(source, target)]
    directories: list[tuple[str, os.stat_result]] = []
    while pending:
        here, there = pending.pop()
        found = os.lstat(here)
        if stat.S_ISDIR(found.st_mode):
            os.mkdir(there, 0o700)
            directories.append((there, found))
            pending += [(f"{here}/{name}", f"{there}/{name}") for name in os.listdir(here)]
        elif stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(here), there)
        elif stat.S_ISREG(found.st_mode):
            _copy_file(here, there, step)
        else:
            raise PathError(errno.ENXIO, here)
        step()
    # At the end, from the bottom up: a directory may be read-only, and filling it changes its time.
    for there, found in reversed(directories):
        os.utime(there, ns=(found.st_atime_ns, found.st_mtime_ns))
        os.chmod(there, stat.S_IMODE(found.st_mode))


def _copy_file(source: str, target: str, step: Step) -> None:
    source_fd, target_fd = open_regular(source, os.O_RDONLY), -1
    try:
        found = os.fstat(source_fd)
        target_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | QUIET, 0o600)
        copy_data(source_fd, target_fd, step)
        os.fchmod(target_fd, stat.S_IMODE(found.st_mode))
        os.utime(target_fd, ns=(found.st_atime_ns, found.st_mtime_ns))
    finally:
        os.close(source_fd)
        if target_fd >= 0:
            os.close(target_fd)
