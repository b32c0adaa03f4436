"""`agentos cp`: files and directories into a VM and out of it."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import posixpath
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, Final

from agentos.commands.archive import keep_stat, left_out, pack, unpack
from agentos.commands.localtree import LocalTree
from agentos.commands.moments import settable
from agentos.commands.remote import add_vm_options, import_client
from agentos.errors import AgentOSError, FileError, InvalidRequest
from agentos.printing import printable
from agentos.wire.keys import deserialize_key

if TYPE_CHECKING:
    from agentos.client.sync import RemoteFiles
    from agentos.model import FileStat

_PIECE: Final = 1024 * 1024
_MOST_LINKS: Final = 40
"""As many as the kernel follows."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "cp", help="copy files into a VM and out of it",
        description="Copy a file, or a directory with all in it. One of the two is KEY:PATH; the other a path here, "
        "or - for stdin or stdout: a file's bytes, or of a directory a tar archive. DIR/. is what is in a directory. "
        "Modes and times go with it. Symbolic links stay links, but SRC itself is what it leads to. A path here that "
        "has a colon is written ./a:b.",
    )  # fmt: skip
    add_vm_options(parser)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DEST")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Copy."""
    source, target = _place(arguments.source), _place(arguments.target)
    if (source is None) == (target is None):
        raise InvalidRequest(
            "one of SRC and DEST is to be KEY:PATH", remedy="agentos cp notes.txt my-agent:notes.txt"
        )

    create_client = import_client("sync").create_client
    with create_client(arguments.endpoint, arguments.token, arguments.namespace) as client:
        kind = client.kind(arguments.name)
        try:
            if target is not None:
                key, path = target
                files = kind.get_or_create(deserialize_key(key)).files
                _copy_in(files, arguments.source, path or ".")
            elif source is not None:
                key, path = source
                _copy_out(kind.get(deserialize_key(key)).files, path or ".", arguments.target)
        except OSError as error:
            if isinstance(error, AgentOSError) or error.filename is None:
                raise
            print(f"agentos: {error.strerror}: {printable(str(error.filename))}", file=sys.stderr)
            return 1
    return 0


def _place(text: str) -> tuple[str, str] | None:
    """Key and path of KEY:PATH; None where it is a path here."""
    key, colon, path = text.partition(":")
    return (key, path) if colon and key and not text.startswith((".", "/")) else None


# -- in


def _copy_in(files: RemoteFiles, source: str, target: str) -> None:
    if source == "-":
        if target.endswith("/") or _is_directory(files, target):
            unpack(files, sys.stdin.buffer, target)
        else:
            files.write_file_stream(target, _pieces(sys.stdin.buffer))
        return
    name = os.path.basename(source.rstrip("/"))
    # What is in a directory goes into the target, not the directory itself: cp and docker have it so.
    if name not in (".", "..") and (target.endswith("/") or _is_directory(files, target)):
        target = posixpath.join(target, name)
    if not os.path.isdir(source):
        _file_in(files, source, target)
        return
    made: list[tuple[str, os.stat_result]] = []
    # A directory that was there before, and into which others are copied, stays as it was.
    if not (name in (".", "..") and _is_directory(files, target)):
        made.append((target, os.stat(source)))
    files.mkdir(target)
    for directory, names, contents in os.walk(source):
        inside = os.path.relpath(directory, source)
        base = target if inside == "." else posixpath.join(target, *inside.split(os.sep))
        for name in sorted([*names, *contents]):
            path, there = os.path.join(directory, name), posixpath.join(base, name)
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                files.symlink(os.readlink(path), there, overwrite=True)
            elif stat.S_ISDIR(found.st_mode):
                files.mkdir(there)
                made.append((there, found))
            elif stat.S_ISREG(found.st_mode):
                _file_in(files, path, there, os.O_NOFOLLOW)
            else:
                left_out(path)
    for there, found in reversed(
        made
    ):  # when all in it is there, as that changes its time, and its mode may forbid it
        keep_stat(files, there, found.st_mtime, found.st_mode)


def _file_in(files: RemoteFiles, source: str, target: str, flags: int = 0) -> None:
    with open(source, "rb", opener=lambda path, given: os.open(path, given | flags)) as file:
        found = os.fstat(file.fileno())
        files.write_file_stream(target, _pieces(file), mode=found.st_mode & 0o777)
        keep_stat(files, target, found.st_mtime)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(_PIECE):
        yield data


def _is_directory(files: RemoteFiles, path: str) -> bool:
    try:
        return (files.stat(path.rstrip("/") + "/.")).type == "directory"
    except FileError:
        return False


# -- out


def _copy_out(files: RemoteFiles, source: str, target: str) -> None:
    if target == "-" and _is_directory(files, source):
        pack(files, source, sys.stdout.buffer)
        return
    if target == "-":
        for piece in files.read_file_stream(source):
            sys.stdout.buffer.write(piece)
        return
    # Of what is copied into a directory, the user has named the directory alone.
    into = os.path.isdir(target)
    # What has no name of its own (.. and the like) goes into that directory itself, as with cp(1).
    name = posixpath.basename(source.rstrip("/")) or "root"
    below = [name] if into and name not in (".", "..") else []
    tree = LocalTree(target)
    if not _is_directory(files, source):
        create = functools.partial(tree.open, below) if below else functools.partial(_create, target)
        _file_out(files, source, create)
        return
    made: list[tuple[list[str], FileStat]] = []
    if below or not into:
        made.append((below, files.stat(source.rstrip("/") + "/.")))
    os.makedirs(target, exist_ok=True)
    tree.mkdir(below)
    entries = files.readdir_recursive(source)
    top = (files.stat(source)).path
    for entry in entries:
        parts = [*below, *_parts_below(top, entry.path)]
        if entry.type == "file":
            _file_out(files, entry.path, functools.partial(tree.open, parts))
            continue
        found = files.stat(entry.path)
        if found.type == "directory":
            tree.mkdir(parts)
            made.append((parts, found))
        elif found.type == "symlink" and found.target:
            tree.symlink(parts, found.target, settable(found.mtime))
        else:
            left_out(entry.path)
    for parts, found in reversed(made):
        tree.finish(parts, found.mode & 0o777, settable(found.mtime))


def _create(path: str) -> int:
    if path.endswith("/"):  # open(2) would say that it is a directory, which is what it is not
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def _parts_below(top: str, path: str) -> list[str]:
    """The names on the way from `top` to `path`. What is not below it would be written elsewhere than was asked."""
    parts = path.removeprefix(top.rstrip("/") + "/").split("/")
    if path == "/".join(parts) or any(one in ("", ".", "..") or "\0" in one for one in parts):
        raise FileError(f"the server lists what is not below {top}: {path}", path=path)
    return parts


def _file_out(files: RemoteFiles, source: str, create: Callable[[], int]) -> None:
    found = _followed(files, source)
    pieces = files.read_file_stream(source)
    first = next(pieces, b"")  # before anything here is touched
    with open(create(), "wb") as file:
        file.write(first)
        for piece in pieces:
            file.write(piece)
        file.flush()  # what is written later would change the time
        os.fchmod(file.fileno(), found.mode & 0o777)
        os.utime(file.fileno(), (time.time(), settable(found.mtime)))


def _followed(files: RemoteFiles, path: str) -> FileStat:
    """What is at `path`, or where the symbolic link there leads to in the end."""
    for _ in range(_MOST_LINKS):
        found = files.stat(path)
        if found.type != "symlink" or not found.target:
            break
        path = posixpath.join(posixpath.dirname(path), found.target)
    return found
