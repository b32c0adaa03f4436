"""The files of a remote VM: the same names, arguments and results as those of the embedded VM."""

from __future__ import annotations

import asyncio
import posixpath
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine, Iterable, Mapping
from typing import Any, Final

from agentos.client.calls import Caller, ask
from agentos.errors import FileDenied, FileError, FileMissing, InvalidRequest
from agentos.model import DirEntry, FileContent, FileStat, FileWritten, check_count

CHUNK_BYTES: Final = 256 * 1024
_PART_BYTES: Final = 4 * 1024 * 1024
"""Bytes of one request when a file is written from a stream."""
_MOST_LINKS: Final = 40

Data = str | bytes | bytearray | memoryview


class RemoteFiles:
    """The files of one remote VM."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def _ask(self, method: str, /, **values: Any) -> Coroutine[Any, Any, Any]:
        return ask(self._caller, method, **values)

    async def read_file(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of a regular file from `offset` on, at most `length`; fewer at its end.

        LimitExceeded (file_bytes) where that would be more than the limit; read_file_stream has none.
        NotRegularFile for a fifo, device or socket, IsDirectory for a directory.
        """
        result: bytes = await self._ask("read_file", path=path, offset=offset, length=length)
        return result

    async def read_file_stream(
        self, path: str, *, offset: int = 0, length: int | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> AsyncGenerator[bytes, None]:
        """As read_file, of any size, in chunks of `chunk_bytes` (1 to 1 MiB; the last may be shorter).

        Each chunk is a request: of a file that changes meanwhile it may bring old and new parts. Arguments are
        checked when the iteration starts.
        """
        position = check_count("offset", offset)
        size = check_count("chunk_bytes", chunk_bytes, least=1, most=1024 * 1024)
        end = None if length is None else position + check_count("length", length)
        while end is None or position < end:
            wanted = size if end is None else min(size, end - position)
            chunk = await self.read_file(path, offset=position, length=wanted)
            if chunk:
                yield chunk
            position += len(chunk)
            if len(chunk) < wanted:
                return

    async def write_file(
        self,
        path: str,
        data: Data,
        *,
        mode: int | None = None,
        append: bool = False,
        make_parents: bool = True,
    ) -> None:
        """Make `data` (text: as UTF-8) the content of a file, or add it to the end with `append`.

        Missing directories above it are made, unless make_parents=False. A reader sees the old content or the
        new, never a part; when this fails (NoSpace), the old is intact. To that end a new file takes the old
        one's place; where it can not, the file itself is overwritten: one with several hard links, of another
        owner, or in a directory that the user may not write. A symlink stays, its target is written.
        `append` is not all-or-nothing. `mode`: the permission bits; None: those the file had, or 0o644.
        """
        await self._ask(
            "write_file", path=path, data=data, mode=mode, append=append, make_parents=make_parents
        )

    async def write_file_stream(
        self,
        path: str,
        chunks: AsyncIterable[bytes] | Iterable[bytes],
        *,
        mode: int | None = None,
        append: bool = False,
        make_parents: bool = True,
    ) -> int:
        """As write_file, of any size, from `chunks` as they come. Returns the bytes written.

        What is more than a few MiB is gathered in a file beside it, which then takes its place: so nobody sees a
        part, and where `chunks` raises, the file is as it was (unless it was appended to, or its directory is one
        in which the user may make no file).
        """
        parts = _parts(chunks)
        try:
            first = await anext(parts, b"")
            second = await anext(parts, None)
            if second is None or append:
                await self.write_file(path, first, mode=mode, append=append, make_parents=make_parents)
                total = len(first)
                while second is not None:
                    await self.write_file(path, second, append=True)
                    total += len(second)
                    second = await anext(parts, None)
                return total
            return await self._replace(path, first, second, parts, mode, make_parents)
        finally:
            await parts.aclose()

    async def _replace(
        self,
        path: str,
        first: bytes,
        second: bytes,
        rest: AsyncGenerator[bytes, None],
        mode: int | None,
        make_parents: bool,
    ) -> int:
        target = await self._resolved(path)
        if mode is None:
            try:
                mode = (await self.stat(target)).mode & 0o7777
            except FileMissing:
                mode = 0o644
        part = f".{uuid.uuid4().hex[:12]}.part"
        beside = target + part
        try:
            await self.write_file(beside, first, mode=mode, make_parents=make_parents)
        except FileDenied:
            # Nothing may be made there: as write_file has it, the file itself is overwritten, if it may be.
            await self.write_file(target, first, mode=mode, make_parents=make_parents)
            return len(first) + await self._append(target, second, rest)
        except FileError as error:
            raise _without(part, error) from None
        try:
            total = len(first) + await self._append(beside, second, rest)
            await self.move(beside, target)
        except BaseException as error:
            await asyncio.shield(self.delete_file(beside, missing_ok=True))
            if isinstance(error, FileError):
                raise _without(part, error) from None
            raise
        return total

    async def _append(self, path: str, first: bytes, rest: AsyncGenerator[bytes, None]) -> int:
        await self.write_file(path, first, append=True)
        total = len(first)
        async for part in rest:
            await self.write_file(path, part, append=True)
            total += len(part)
        return total

    async def _resolved(self, path: str) -> str:
        """`path`, or where the symlink there points in the end."""
        for _ in range(_MOST_LINKS):
            try:
                found = await self.stat(path)
            except FileMissing:
                return path
            if found.type != "symlink" or not found.target:
                return path
            path = posixpath.join(posixpath.dirname(path), found.target)
        return path

    async def read_files(self, paths: Iterable[str]) -> list[FileContent]:
        """The content or the error of each path, in order: one bad path does not spoil the others.

        At most 1,000 paths, and file_bytes for all contents together. InvalidRequest where one is no text.
        """
        result: list[FileContent] = await self._ask("read_files", paths=paths)
        return result

    async def write_files(self, files: Mapping[str, Data] | Iterable[tuple[str, Data]]) -> list[FileWritten]:
        """write_file of each path with its data, in order: one that fails does not spoil the others.

        At most 1,000 files. InvalidRequest, and nothing is written, where a path is no text or data neither text
        nor bytes.
        """
        result: list[FileWritten] = await self._ask("write_files", files=files)
        return result

    async def stat(self, path: str) -> FileStat:
        """What is at `path`, symlinks not followed: `target` says where it points. `mode`: permissions."""
        result: FileStat = await self._ask("stat", path=path)
        return result

    async def set_stat(self, path: str, *, mode: int | None = None, mtime: float | None = None) -> None:
        """Set permission bits, and when the content changed (seconds since the epoch); None leaves it as it is.

        Symlinks are followed, as by chmod(1) and touch(1).
        """
        await self._ask("set_stat", path=path, mode=mode, mtime=mtime)

    async def symlink(self, target: str, path: str, *, overwrite: bool = False) -> None:
        """Make `path` a symlink to `target`, a text that is kept as it is: nothing need be there.

        FileExists where something is at `path`; with `overwrite` it takes the place of what is there, unless that
        is a directory (IsDirectory).
        """
        await self._ask("symlink", target=target, path=path, overwrite=overwrite)

    async def exists(self, path: str) -> bool:
        """Whether something is at `path`, symlinks followed: False for a dangling one, as in Node."""
        result: bool = await self._ask("exists", path=path)
        return result

    async def mkdir(self, path: str, *, parents: bool = True, mode: int = 0o755) -> None:
        """Make a directory. With `parents` as mkdir -p: those above it too, and one that exists is fine."""
        await self._ask("mkdir", path=path, parents=parents, mode=mode)

    async def readdir(self, path: str, *, max_entries: int = 1_000_000) -> list[str]:
        """The names in a directory, sorted. LimitExceeded over max_entries."""
        result: list[str] = await self._ask("readdir", path=path, max_entries=max_entries)
        return result

    async def readdir_entries(self, path: str, *, max_entries: int = 1_000_000) -> list[DirEntry]:
        """What is in a directory, sorted by name. LimitExceeded over max_entries."""
        result: list[DirEntry] = await self._ask("readdir_entries", path=path, max_entries=max_entries)
        return result

    async def readdir_recursive(self, path: str, *, max_entries: int = 100_000) -> list[DirEntry]:
        """All that is below a directory, sorted by path. LimitExceeded over max_entries, never just a part.

        Symlinks are listed, never followed. A directory that the user may not read is listed, without what is
        in it. Raises FileError where a path is longer than the 4095 bytes that a path may have.
        """
        result: list[DirEntry] = await self._ask("readdir_recursive", path=path, max_entries=max_entries)
        return result

    async def move(self, source: str, target: str, *, overwrite: bool = True) -> None:
        """rename(2): `target` is the new path, not a directory to move into. FileExists without `overwrite`.

        From one mount of the VM to another what is moved is copied, with modes and times, then deleted; the
        target appears as a whole.
        """
        await self._ask("move", source=source, target=target, overwrite=overwrite)

    async def delete_file(self, path: str, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Delete a file, symlink, fifo or socket; a directory and all in it only with `recursive`.

        IsDirectory without it. Never goes through a symlink. Stops at the first thing that can not be
        deleted, which the error names.
        """
        await self._ask("delete_file", path=path, recursive=recursive, missing_ok=missing_ok)


def _without(part: str, error: FileError) -> FileError:
    """`error` as one of the file that is to be written: nobody knows of the one beside it."""
    path = str(error.details.get("path", ""))
    if not path.endswith(part):
        return error
    return type(error)(error.message.replace(part, ""), **{**error.details, "path": path.removesuffix(part)})


async def _parts(chunks: AsyncIterable[bytes] | Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """`chunks` put together to parts of one request's size."""
    if isinstance(chunks, str | bytes | bytearray | memoryview) or not isinstance(
        chunks, AsyncIterable | Iterable
    ):
        raise InvalidRequest.argument("chunks", chunks, "an iterable of bytes")
    part = bytearray()
    async for chunk in _each(chunks):
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise InvalidRequest.argument("chunks", chunk, "bytes")
        part += chunk
        while len(part) >= _PART_BYTES:
            yield bytes(part[:_PART_BYTES])
            del part[:_PART_BYTES]
    if part:
        yield bytes(part)


async def _each(chunks: AsyncIterable[bytes] | Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            yield chunk
    else:
        for chunk in chunks:
            yield chunk
