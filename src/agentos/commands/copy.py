"""`agentos cp`: files and directories into a VM and out of it."""

from __future__ import annotations

import argparse
import os
import posixpath
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, Final

from agentos.commands.remote import add_vm_options, agent, with_client
from agentos.errors import FileMissing, InvalidRequest

if TYPE_CHECKING:
    from agentos.client.aio import Client, RemoteFiles

_PIECE: Final = 1024 * 1024


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "cp", help="copy files into a VM and out of it",
        description="Copy a file, or a directory with all in it. One of the two is KEY:PATH; the other a path here, "
        "or - for stdin or stdout. A path here that has a colon is written ./a:b.",
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

    async def work(client: Client) -> int:
        try:
            if target is not None:
                key, path = target
                await _copy_in(
                    agent(client, arguments.name, key, create=True).files, arguments.source, path or "."
                )
            else:
                assert source is not None
                key, path = source
                await _copy_out(agent(client, arguments.name, key).files, path or ".", arguments.target)
        except OSError as error:
            if error.filename is None:
                raise
            print(f"agentos: {error.strerror}: {error.filename}", file=sys.stderr)
            return 1
        return 0

    return with_client(arguments, work)


def _place(text: str) -> tuple[str, str] | None:
    """Key and path of KEY:PATH; None where it is a path here."""
    key, colon, path = text.partition(":")
    return (key, path) if colon and key and not text.startswith((".", "/")) else None


# -- in


async def _copy_in(files: RemoteFiles, source: str, target: str) -> None:
    if source == "-":
        await files.write_file_stream(target, _pieces(sys.stdin.buffer))
        return
    if target.endswith("/") or await _is_directory(files, target):
        target = posixpath.join(target, os.path.basename(os.path.abspath(source)))
    if not os.path.isdir(source):
        await _file_in(files, source, target)
        return
    await files.mkdir(target)
    for directory, names, contents in os.walk(source):
        inside = os.path.relpath(directory, source)
        base = target if inside == "." else posixpath.join(target, *inside.split(os.sep))
        for name in sorted(names):
            await files.mkdir(posixpath.join(base, name))
        for name in sorted(contents):
            path = os.path.join(directory, name)
            if os.path.isfile(path):
                await _file_in(files, path, posixpath.join(base, name))
            else:
                print(f"agentos: not a regular file, left out: {path}", file=sys.stderr)


async def _file_in(files: RemoteFiles, source: str, target: str) -> None:
    with open(source, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o777
        await files.write_file_stream(target, _pieces(file), mode=mode)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(_PIECE):
        yield data


async def _is_directory(files: RemoteFiles, path: str) -> bool:
    try:
        return (await files.stat(path.rstrip("/") + "/.")).type == "directory"
    except (FileMissing, OSError):
        return False


# -- out


async def _copy_out(files: RemoteFiles, source: str, target: str) -> None:
    if target == "-":
        async for piece in files.read_file_stream(source):
            sys.stdout.buffer.write(piece)
        return
    if os.path.isdir(target):
        target = os.path.join(target, posixpath.basename(source.rstrip("/")) or "root")
    if not await _is_directory(files, source):
        await _file_out(files, source, target)
        return
    os.makedirs(target, exist_ok=True)
    entries = await files.readdir_recursive(source)
    top = (await files.stat(source)).path
    for entry in entries:
        path = os.path.join(target, *posixpath.relpath(entry.path, top).split("/"))
        if entry.type == "directory":
            os.makedirs(path, exist_ok=True)
        elif entry.type == "file":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            await _file_out(files, entry.path, path)
        else:
            print(f"agentos: not a regular file, left out: {entry.path}", file=sys.stderr)


async def _file_out(files: RemoteFiles, source: str, target: str) -> None:
    mode = (await files.stat(source)).mode & 0o777
    pieces = files.read_file_stream(source)
    first = await anext(pieces, b"")  # before anything here is touched
    with open(target, "wb") as file:
        file.write(first)
        async for piece in pieces:
            file.write(piece)
    os.chmod(target, mode)
