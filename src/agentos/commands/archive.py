"""Directories of a VM as tar streams on stdin and stdout, as `docker cp` has them."""

from __future__ import annotations

import io
import posixpath
import sys
import tarfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, BinaryIO, Final, NamedTuple, cast

from agentos.commands.moments import settable
from agentos.errors import FileDenied, FileError, InvalidRequest
from agentos.printing import printable

if TYPE_CHECKING:
    from agentos.client.sync import RemoteFiles

_PIECE: Final = 1024 * 1024


def unpack(files: RemoteFiles, source: BinaryIO, target: str) -> None:
    """What the tar stream `source` holds, into the directory `target` of the VM. Compressed ones are understood."""
    last = _Last([], [])
    try:
        with tarfile.open(fileobj=source, mode="r|*") as archive:
            for member in archive:
                _member_in(files, archive, member, target, last)
    except tarfile.TarError as error:
        raise InvalidRequest(
            f"stdin is no whole tar archive: {error}", remedy="name a file to write"
        ) from None
    for path, member in last.links:
        files.symlink(member.linkname, path, overwrite=True)
    for path, member in reversed(last.directories):
        keep_stat(files, path, member.mtime, member.mode)


class _Last(NamedTuple):
    """What is done when all else is there: so nothing is written through a link, and a mode forbids nothing."""

    links: list[tuple[str, tarfile.TarInfo]]
    directories: list[tuple[str, tarfile.TarInfo]]


def _member_in(
    files: RemoteFiles,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    target: str,
    last: _Last,
) -> None:
    parts = [one for one in member.name.split("/") if one not in ("", ".")]
    if ".." in parts:
        raise FileError(f"the archive has what is not below its directory: {member.name}", path=member.name)
    path = posixpath.join(target, *parts)
    if member.isdir():
        files.mkdir(path)
        if parts:  # the target itself was there before
            last.directories.append((path, member))
        return
    if member.issym():
        last.links.append((path, member))
        return
    content = archive.extractfile(member) if member.isfile() else None
    if content is None:
        left_out(member.name)
        return
    files.write_file_stream(path, _pieces(content), mode=member.mode & 0o777)
    keep_stat(files, path, member.mtime)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while data := file.read(_PIECE):
        yield data


def pack(files: RemoteFiles, source: str, target: BinaryIO) -> None:
    """The directory `source` of the VM as a tar stream, its own name first, as docker packs it."""
    top = files.stat(source)
    root = posixpath.basename(top.path) or "root"
    with tarfile.open(fileobj=target, mode="w|") as archive:
        archive.addfile(_info(root, top.mode, top.mtime, tarfile.DIRTYPE))
        for entry in files.readdir_recursive(source):
            name = root + entry.path.removeprefix(top.path.rstrip("/"))
            found = files.stat(entry.path)
            if found.type == "directory":
                archive.addfile(_info(name, found.mode, found.mtime, tarfile.DIRTYPE))
            elif found.type == "symlink" and found.target:
                info = _info(name, found.mode, found.mtime, tarfile.SYMTYPE)
                info.linkname = found.target
                archive.addfile(info)
            elif found.type != "file":
                left_out(entry.path)
            else:
                info = _info(name, found.mode, found.mtime, tarfile.REGTYPE)
                info.size = found.size
                content = _Exactly(files.read_file_stream(entry.path), found.size)
                archive.addfile(info, cast(IO[bytes], io.BufferedReader(content, _PIECE)))


def _info(name: str, mode: int, modified: float, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.mtime, info.type = mode & 0o777, settable(modified), kind
    return info


class _Exactly(io.RawIOBase):
    """The first `size` bytes of a file, of which the archive has said that they come."""

    def __init__(self, pieces: Iterator[bytes], size: int) -> None:
        self._pieces = pieces
        self._left = size
        self._held = b""

    def readable(self) -> bool:
        """It is there to be read."""
        return True

    def readinto(self, buffer: object) -> int:
        """The next bytes; those that the file does not have any more are zeros, as tar writes them."""
        view = memoryview(cast(bytearray, buffer))
        if not self._held and self._left:
            self._held = next(self._pieces, b"") or bytes(min(self._left, _PIECE))
        count = min(len(view), len(self._held), self._left)
        view[:count] = self._held[:count]
        self._held = self._held[count:]
        self._left -= count
        return count


def keep_stat(files: RemoteFiles, path: str, modified: float, mode: int | None = None) -> None:
    """Give what was copied to `path` in the VM its time, and its mode; say so where it is another user's."""
    try:
        files.set_stat(path, mtime=settable(modified), mode=None if mode is None else mode & 0o777)
    except FileDenied:
        print(f"agentos: another user's, mode and time are left: {printable(path)}", file=sys.stderr)


def left_out(path: str) -> None:
    """Say that something of the kind that is not copied was met."""
    print(f"agentos: not a regular file, left out: {printable(path)}", file=sys.stderr)
