"""The file actions of one VM, as the host sees them: every byte is read and written by a worker in the VM.

Paths are paths in the VM; a relative one starts at the user's home. Names that are not UTF-8 travel as
surrogate escapes, as in `os.fsdecode`. Every method raises InvalidRequest for a bad argument before anything
is changed; a FileError for the kernel's errno (FileMissing, FileDenied, NoSpace, ...); VmStopped after
`close`; VmError where the worker in the VM ended, stalled or spoke nonsense.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from errno import ENOSPC
from io import BytesIO
from typing import Any, TypeVar

from agentos.errors import FileError, InvalidRequest, LimitExceeded, VmStopped, file_error
from agentos.machine.filechunks import CHUNK_BYTES, write_chunks
from agentos.machine.fileserver import DATA, END, REPLY
from agentos.machine.filevalues import (
    PATH_BYTES,
    Data,
    Reply,
    as_bytes,
    at_most,
    checked_count,
    checked_name,
    checked_pair,
    dir_entry,
    file_stat,
    in_order,
    nanoseconds,
    nothing,
    path_of,
    understand,
)
from agentos.machine.filewire import frame, request_frame
from agentos.machine.fileworkers import OpenWorker, Workers
from agentos.model import (
    DirEntry,
    FileContent,
    FileStat,
    FileWritten,
    Limits,
    check_count,
    check_flag,
    check_moment,
    check_text,
)

MAX_CHUNK_BYTES = 1024 * 1024
MAX_ENTRIES = 10_000_000
"""The greatest max_entries."""

_SMALL_BYTES = 64 * 1024  # writes up to this size travel in one piece with their request

T = TypeVar("T")


class Files:
    """The files of one VM, over workers that `open_worker` starts in it.

    `open_worker` returns a connected socket whose other end a new worker serves; it is called whenever one is
    needed, and may raise AgentOSError, which whoever needed it gets.
    """

    def __init__(
        self,
        open_worker: OpenWorker,
        *,
        limits: Limits,
        home: str = "/home/agentos",
        no_space: Callable[[str], None] | None = None,
    ) -> None:
        self._workers = Workers(open_worker, no_space)
        self._limits = limits
        self._home = home
        self.full: Callable[[], object] = lambda: False
        """Whether nothing may be written for now, where the kernel does not say so itself."""

    def close(self, why: VmStopped | None = None) -> None:
        """Close all workers, for good. What is under way or waits ends with `why`, or that it was closed."""
        self._workers.close(why or VmStopped("the VM was closed", reason="closed"))

    async def read_file(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of a regular file from `offset` on, at most `length`; fewer at its end.

        LimitExceeded (file_bytes) where that would be more than the limit; read_file_stream has none.
        NotRegularFile for a fifo, device or socket, IsDirectory for a directory.
        """
        return await self._read(path, offset, length, self._limits.file_bytes)

    async def read_file_stream(
        self, path: str, *, offset: int = 0, length: int | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> AsyncGenerator[bytes, None]:
        """As read_file, of any size, in chunks of `chunk_bytes` (1 to 1 MiB; the last may be shorter).

        Nothing is read ahead but what the socket holds. To stop early, leave the loop, and close the
        iterator (`contextlib.aclosing`) where it is kept. Arguments are checked when the iteration starts.
        """
        check_count("chunk_bytes", chunk_bytes, least=1, most=MAX_CHUNK_BYTES)
        request = self._read_request(path, offset, length, None, chunk_bytes)
        left = length
        async with self._workers.take(stream=True) as worker:
            await worker.request(request_frame(request))
            while True:
                kind, body = await worker.receive()
                if kind == REPLY:
                    understand(worker, worker.reply(body), request["path"], nothing)
                    return
                if kind != DATA or not 0 < len(body) <= (
                    chunk_bytes if left is None else min(chunk_bytes, left)
                ):
                    raise worker.broken("sent what was not asked for")
                left = None if left is None else left - len(body)
                yield bytes(body)

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
        content = as_bytes("data", data)
        if len(content) > self._limits.file_bytes:
            raise LimitExceeded.of("file_bytes", len(content), self._limits.file_bytes)
        request = self._write_request(path, mode, append, make_parents)
        async with self._workers.take() as worker:
            if len(content) <= _SMALL_BYTES:
                await worker.request(request_frame(request), frame(DATA, content), frame(END, b""))
                reply = await worker.answer(take_page=nothing)
                understand(worker, reply, request["path"], nothing)
            else:
                await write_chunks(worker, request, [content])

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

        The next chunk is asked for once the VM has taken the one before. Where `chunks` raises, the file is
        as it was (unless it had to be overwritten, or appended to) and the exception goes on to the caller.
        """
        if isinstance(chunks, Data) or not isinstance(chunks, AsyncIterable | Iterable):
            raise InvalidRequest.argument("chunks", chunks, "an iterable of bytes, async or not")
        request = self._write_request(path, mode, append, make_parents)
        async with self._workers.take(stream=True) as worker:
            return await write_chunks(worker, request, chunks)

    async def read_files(self, paths: Iterable[str]) -> list[FileContent]:
        """The content or the error of each path, in order: one bad path does not spoil the others.

        At most 1,000 paths, and file_bytes for all contents together. InvalidRequest where one is no text.
        """
        results: list[FileContent] = []
        left = self._limits.file_bytes
        given = at_most("paths", paths)
        for path in [check_text(f"paths[{index}]", path) for index, path in enumerate(given)]:
            try:
                content = await self._read(path, 0, None, left)
            except (FileError, InvalidRequest, LimitExceeded) as error:
                results.append(FileContent(path, None, error))
            else:
                left -= len(content)
                results.append(FileContent(path, content, None))
        return results

    async def write_files(self, files: Mapping[str, Data] | Iterable[tuple[str, Data]]) -> list[FileWritten]:
        """write_file of each path with its data, in order: one that fails does not spoil the others.

        At most 1,000 files. InvalidRequest, and nothing is written, where a path is no text or data neither text
        nor bytes.
        """
        results: list[FileWritten] = []
        pairs = at_most("files", files.items() if isinstance(files, Mapping) else files)
        for path, content in [checked_pair("files", pair) for pair in pairs]:
            try:
                await self.write_file(path, content)
            except (FileError, InvalidRequest, LimitExceeded) as error:
                results.append(FileWritten(path, error))
            else:
                results.append(FileWritten(path, None))
        return results

    async def stat(self, path: str) -> FileStat:
        """What is at `path`, symlinks not followed: `target` says where it points. `mode`: permissions."""
        path = self._path("path", path)
        return await self._call({"op": "stat", "path": path}, lambda reply: file_stat(path, reply))

    async def set_stat(self, path: str, *, mode: int | None = None, mtime: float | None = None) -> None:
        """Set permission bits, and when the content changed (seconds since the epoch); None leaves it as it is.

        Symlinks are followed, as by chmod(1) and touch(1).
        """
        if mode is not None:
            check_count("mode", mode, most=0o7777)
        modified = nanoseconds(check_moment("mtime", mtime))
        request = {"op": "set_stat", "path": self._path("path", path), "mode": mode, "mtime_ns": modified}
        await self._call(request, nothing)

    async def symlink(self, target: str, path: str, *, overwrite: bool = False) -> None:
        """Make `path` a symlink to `target`, a text that is kept as it is: nothing need be there.

        FileExists where something is at `path`; with `overwrite` it takes the place of what is there, unless that
        is a directory (IsDirectory).
        """
        request: dict[str, Any] = {"op": "symlink", "to": check_text("target", target, empty=False)}
        request |= {"path": self._path("path", path), "overwrite": check_flag("overwrite", overwrite)}
        self._check_room(path)
        await self._call(request, nothing)

    async def exists(self, path: str) -> bool:
        """Whether something is at `path`, symlinks followed: False for a dangling one, as in Node."""
        request = {"op": "exists", "path": self._path("path", path)}
        return await self._call(request, lambda reply: bool(reply["exists"]))

    async def mkdir(self, path: str, *, parents: bool = True, mode: int = 0o755) -> None:
        """Make a directory. With `parents` as mkdir -p: those above it too, and one that exists is fine."""
        check_count("mode", mode, most=0o7777)
        above = check_flag("parents", parents)
        request = {"op": "mkdir", "path": self._path("path", path), "parents": above, "mode": mode}
        self._check_room(path)
        await self._call(request, nothing)

    async def readdir(self, path: str, *, max_entries: int = 1_000_000) -> list[str]:
        """The names in a directory, sorted. LimitExceeded over max_entries."""
        names: list[str] = []
        await self._list(path, lambda _, page: names.extend(map(checked_name, page)), max_entries, names=True)
        return await in_order(names, str)

    async def readdir_entries(self, path: str, *, max_entries: int = 1_000_000) -> list[DirEntry]:
        """What is in a directory, sorted by name. LimitExceeded over max_entries."""
        return await self._entries(path, max_entries, deep=False)

    async def readdir_recursive(self, path: str, *, max_entries: int = 100_000) -> list[DirEntry]:
        """All that is below a directory, sorted by path. LimitExceeded over max_entries, never just a part.

        Symlinks are listed, never followed. A directory that the user may not read is listed, without what is
        in it. Raises FileError where a path is longer than the 4095 bytes that a path may have.
        """
        return await self._entries(path, max_entries, deep=True)

    async def move(self, source: str, target: str, *, overwrite: bool = True) -> None:
        """rename(2): `target` is the new path, not a directory to move into. FileExists without `overwrite`.

        From one mount of the VM to another what is moved is copied, with modes and times, then deleted; the
        target appears as a whole.
        """
        request: dict[str, Any] = {
            "op": "move",
            "path": self._path("source", source),
            "target": self._path("target", target),
        }
        request["overwrite"] = check_flag("overwrite", overwrite)
        await self._call(request, nothing, take_page=nothing)

    async def delete_file(self, path: str, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Delete a file, symlink, fifo or socket; a directory and all in it only with `recursive`.

        IsDirectory without it. Never goes through a symlink. Stops at the first thing that can not be
        deleted, which the error names.
        """
        request = {
            "op": "delete",
            "path": self._path("path", path),
            "recursive": check_flag("recursive", recursive),
            "missing_ok": check_flag("missing_ok", missing_ok),
        }
        await self._call(request, nothing, take_page=nothing)

    def _path(self, name: str, path: object) -> str:
        path = check_text(name, path, empty=False)
        if len(path.encode("utf-8", "surrogateescape")) > PATH_BYTES:
            raise InvalidRequest.argument(name, path, f"a path of at most {PATH_BYTES} bytes")
        return path if path.startswith("/") else f"{self._home}/{path}"

    async def _call(
        self,
        request: dict[str, Any],
        parse: Callable[[Reply], T],
        take_data: Callable[[memoryview], object] | None = None,
        take_page: Callable[[list[Any]], object] | None = None,
    ) -> T:
        async with self._workers.take() as worker:
            await worker.request(request_frame(request))
            reply = await worker.answer(take_data, take_page)
            return understand(worker, reply, request["path"], parse)

    def _read_request(
        self, path: str, offset: int, length: int | None, most: int | None, chunk: int
    ) -> dict[str, Any]:
        check_count("offset", offset)
        if length is not None:
            check_count("length", length)
        return {
            "op": "read",
            "path": self._path("path", path),
            "offset": offset,
            "length": length,
            "most": most,
            "chunk": chunk,
        }

    async def _read(self, path: str, offset: int, length: int | None, most: int) -> bytes:
        request = self._read_request(path, offset, length, most, CHUNK_BYTES)
        content = BytesIO()  # hands out what it holds without another copy
        bound = most if length is None else min(most, length)

        def take(data: memoryview) -> None:
            if content.tell() + len(data) > bound:
                raise ValueError
            content.write(data)

        def finish(reply: Reply) -> bytes:
            if "limit" in reply:
                size, maximum = checked_count(reply["limit"]), self._limits.file_bytes
                raise LimitExceeded.of(
                    "file_bytes", size, maximum, f"{size} bytes are too many to read: {path}"
                )
            return content.getvalue()

        return await self._call(request, finish, take)

    def _check_room(self, path: str) -> None:
        if self.full():
            raise file_error(ENOSPC, os.strerror(ENOSPC), path)

    def _write_request(self, path: str, mode: int | None, append: bool, parents: bool) -> dict[str, Any]:
        if mode is not None:
            check_count("mode", mode, most=0o7777)
        check_flag("append", append)
        check_flag("make_parents", parents)
        path = self._path("path", path)
        self._check_room(path)
        return {"op": "write", "path": path, "mode": mode, "append": append, "parents": parents}

    async def _entries(self, path: str, most: int, *, deep: bool) -> list[DirEntry]:
        entries: list[DirEntry] = []

        def take(top: str, page: list[Any]) -> None:
            entries.extend(dir_entry(top, one) for one in page)

        await self._list(path, take, most, deep=deep)
        return await in_order(entries, path_of)

    async def _list(
        self,
        path: str,
        take: Callable[[str, list[Any]], None],
        most: int,
        *,
        names: bool = False,
        deep: bool = False,
    ) -> None:
        check_count("max_entries", most, least=1, most=MAX_ENTRIES)
        path = self._path("path", path)
        top = path.rstrip("/")
        count = held = 0

        def take_page(page: list[Any]) -> None:
            nonlocal count, held
            count += len(page)
            if count > most:
                raise ValueError
            held += sum(len(top) + len(one if names else one[0]) for one in page)
            if held > self._limits.file_bytes:
                raise LimitExceeded.of(
                    "file_bytes", held, self._limits.file_bytes, f"too much to list: {path}"
                )
            take(top, page)

        def finish(reply: Reply) -> None:
            if "limit" in reply:
                raise LimitExceeded(
                    f"more than {most} entries in {path} (raise max_entries)",
                    limit="max_entries",
                    value=checked_count(reply["limit"]),
                    maximum=most,
                )

        request = {"op": "list", "path": path, "names": names, "deep": deep, "most": most}
        await self._call(request, finish, take_page=take_page)
