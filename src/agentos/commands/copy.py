"""`agentos cp`: files and directories into a VM and out of it."""

from __future__ import annotations

import argparse
import functools
import os
import posixpath
import stat
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, Final

from agentos.commands.archive import left_out, pack, unpack
from agentos.commands.localtree import LocalTree
from agentos.commands.remote import add_vm_options, import_client
from agentos.errors import AgentOSError, FileError, InvalidRequest
from agentos.printing import printable
from agentos.wire.keys import deserialize_key

if TYPE_CHECKING:
    from agentos.client.sync import RemoteFiles

_PIECE: Final = 1024 * 1024


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "cp", help="copy files into a VM and out of it",
        description="Copy a file, or a directory with all in it. One of the two is KEY:PATH; the other a path here, "
        "or - for stdin or stdout: a file's bytes, or of a directory a tar archive. DIR/. is what is in a directory. "
        "Links to files are copied as files. A path here that has a colon is written ./a:b.",
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
    files.mkdir(target)
    for directory, names, contents in os.walk(source):
        inside = os.path.relpath(directory, source)
        base = target if inside == "." else posixpath.join(target, *inside.split(os.sep))
        for name in sorted(names):
            if os.path.islink(os.path.join(directory, name)):
                left_out(os.path.join(directory, name))
            else:
                files.mkdir(posixpath.join(base, name))
        for name in sorted(contents):
            path = os.path.join(directory, name)
            if os.path.isfile(path):
                _file_in(files, path, posixpath.join(base, name))
            else:
                left_out(path)


def _file_in(files: RemoteFiles, source: str, target: str) -> None:
    with open(source, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o777
        files.write_file_stream(target, _pieces(file), mode=mode)


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
    os.makedirs(target, exist_ok=True)
    tree.mkdir(below)
    entries = files.readdir_recursive(source)
    top = (files.stat(source)).path
    for entry in entries:
        parts = [*below, *_parts_below(top, entry.path)]
        if entry.type == "directory":
            tree.mkdir(parts)
        elif entry.type == "file":
            _file_out(files, entry.path, functools.partial(tree.open, parts))
        else:
            left_out(entry.path)


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def _parts_below(top: str, path: str) -> list[str]:
    """The names on the way from `top` to `path`. What is not below it would be written elsewhere than was asked."""
    parts = path.removeprefix(top.rstrip("/") + "/").split("/")
    if path == "/".join(parts) or any(one in ("", ".", "..") or "\0" in one for one in parts):
        raise FileError(f"the server lists what is not below {top}: {path}", path=path)
    return parts


def _file_out(files: RemoteFiles, source: str, create: Callable[[], int]) -> None:
    mode = (files.stat(source)).mode & 0o777
    pieces = files.read_file_stream(source)
    first = next(pieces, b"")  # before anything here is touched
    with open(create(), "wb") as file:
        file.write(first)
        for piece in pieces:
            file.write(piece)
        os.fchmod(file.fileno(), mode)
