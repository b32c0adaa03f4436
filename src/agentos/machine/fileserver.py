"""The guest side of the file actions: a worker inside the VM that does file I/O for the host.

Whatever a guest makes of a path (a symlink, a fifo, a device, a race, a file without end), it happens in
the VM, with the rights of the VM's user, and blocks nobody but this process. One request at a time
arrives as a frame: a byte for its kind, four for its length (little-endian), and JSON or bytes.

    host -> worker   REQUEST, and after a write's request DATA..., then END (keep it) or ABORT (forget it)
    worker -> host   one REPLY when it is ready, then for each request DATA or PAGE frames and one REPLY

A write that fails is answered at once; what the host had already sent of it is read and dropped. A PAGE
carries names, or nothing: it then says that a long deletion or move goes on. A REPLY holds `error` (an
errno, with `path` where it is not the request's), or `limit` (what went over the request's `most`), or
the values.

Every VM carries this code: it and its two helpers import nothing but a few light modules of the
standard library. The file system encoding has to be UTF-8.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
from collections.abc import Callable
from typing import Any

from agentos.machine.filetarget import Target
from agentos.machine.filetree import (
    DIRECTORY,
    PathError,
    make_directories,
    move,
    open_regular,
    remove_tree,
    temporary_name,
)

REQUEST, DATA, END, ABORT, PAGE, REPLY = b"QDEXPR"
HEADER = struct.Struct("<BI")
FRAME_BYTES = 1024 * 1024
"""Greatest body of a frame, in either direction."""
PAGE_CHARS = 32 * 1024
"""Characters of names after which a page is full; one is at most six bytes of JSON."""
STEPS_PER_SIGN = 500
"""Entries or megabytes after which a long deletion or move shows that it goes on."""
PATH_CHARS = 4096
"""Characters of a path in an error."""

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "block",
    stat.S_IFCHR: "char",
}

_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

Request = dict[str, Any]
Reply = dict[str, Any]


class _Gone(Exception):
    """The host closed its end."""


class _Link:
    """The worker's end of the socket. `body` is the frame last received, or the one to be sent."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(True)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FRAME_BYTES)
        self._frame = memoryview(bytearray(HEADER.size + FRAME_BYTES))
        self.body = self._frame[HEADER.size :]
        self._steps = 0

    def close(self) -> None:
        self._sock.close()

    def receive(self) -> tuple[int, memoryview]:
        kind, length = HEADER.unpack(self._receive(self._frame[: HEADER.size]))
        if length > FRAME_BYTES:
            raise _Gone
        return kind, self._receive(self.body[:length])

    def _receive(self, into: memoryview) -> memoryview:
        try:
            if into and self._sock.recv_into(into, len(into), socket.MSG_WAITALL) < len(into):
                raise _Gone
        except OSError as problem:
            raise _Gone from problem
        return into

    def send(self, kind: int, content: object) -> None:
        """Send `content` as JSON."""
        encoded = json.dumps(content, separators=(",", ":")).encode("ascii")
        self._send(HEADER.pack(kind, len(encoded)) + encoded)

    def send_body(self, length: int) -> None:
        """Send the first `length` bytes of `body` as DATA."""
        HEADER.pack_into(self._frame, 0, DATA, length)
        self._send(self._frame[: HEADER.size + length])

    def _send(self, frame: bytes | memoryview) -> None:
        try:
            self._sock.sendall(frame, socket.MSG_NOSIGNAL)
        except OSError as problem:
            raise _Gone from problem

    def step(self) -> None:
        """Count one step of a long operation, and let the host know every so often."""
        self._steps += 1
        if self._steps % STEPS_PER_SIGN == 0:
            self.send(PAGE, [])


def _read(link: _Link, request: Request) -> Reply:
    """Send a file's bytes from `offset`, at most `length`. Only the last DATA is shorter than `chunk`."""
    offset, length, most = request["offset"], request["length"], request["most"]
    fd = open_regular(request["path"], os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        expected = max(0, size - offset if length is None else min(size - offset, length))
        if most is not None and expected > most:
            return {"limit": expected}
        if offset >= size > 0:
            return {}
        os.lseek(fd, offset, os.SEEK_SET)
        sent = 0
        while length is None or sent < length:
            wanted = request["chunk"] if length is None else min(request["chunk"], length - sent)
            filled = _fill(fd, link.body[:wanted])
            sent += filled
            # The file can grow meanwhile, and those of /proc say nothing of their size.
            if most is not None and sent > most:
                return {"limit": sent}
            if filled:
                link.send_body(filled)
            if filled < wanted:
                break
        return {}
    finally:
        os.close(fd)


def _fill(fd: int, into: memoryview) -> int:
    filled = 0
    try:
        while filled < len(into) and (count := os.readv(fd, [into[filled:]])):
            filled += count
    except BlockingIOError:
        raise OSError(errno.ENXIO, "Not a regular file: it has to be waited for") from None
    return filled


def _write(link: _Link, request: Request) -> Reply | None:
    """Take DATA until END or ABORT. None where an error was answered before that."""
    target: Target | None = None
    try:
        try:
            target = Target(
                request["path"], request["mode"], append=request["append"], parents=request["parents"]
            )
        except OSError as problem:
            link.send(REPLY, _error(problem, request))
        while (received := link.receive())[0] == DATA:
            if target is None:
                continue
            try:
                target.write(received[1])
            except OSError as problem:
                target.discard()
                target = None
                link.send(REPLY, _error(problem, request))
        if target is None:
            return None
        if received[0] == END:
            target.commit(link.step)
        return {}
    finally:
        if target is not None:
            target.discard()


def _mkdir(link: _Link, request: Request) -> Reply:
    path, mode = request["path"].rstrip("/") or "/", request["mode"]
    if request["parents"]:
        if os.path.isdir(path):
            return {}
        make_directories(os.path.dirname(path))
    os.mkdir(path, mode)
    os.chmod(path, mode)  # whatever the umask took away
    return {}


def _symlink(link: _Link, request: Request) -> Reply:
    path = request["path"].rstrip("/") or "/"
    if not request["overwrite"]:
        os.symlink(request["to"], path)
        return {}
    beside = f"{os.path.dirname(path)}/{temporary_name()}"
    os.symlink(request["to"], beside)
    try:
        os.rename(beside, path)
    except OSError:
        os.unlink(beside)
        raise
    return {}


def _set_stat(link: _Link, request: Request) -> Reply:
    path, mode, modified = request["path"], request["mode"], request["mtime_ns"]
    if mode is not None:
        os.chmod(path, mode)
    if modified is not None:
        os.utime(path, ns=(os.stat(path).st_atime_ns, modified))
    return {}


def _stat(link: _Link, request: Request) -> Reply:
    found = os.lstat(request["path"])
    reply = {name: getattr(found, f"st_{name}") for name in ("size", "uid", "gid", "mtime_ns")}
    reply["mode"] = stat.S_IMODE(found.st_mode)
    reply["type"] = TYPES[stat.S_IFMT(found.st_mode)]
    if stat.S_ISLNK(found.st_mode):
        reply["target"] = os.readlink(request["path"])
    return reply


def _exists(link: _Link, request: Request) -> Reply:
    return {"exists": os.path.exists(request["path"])}


def _list(link: _Link, request: Request) -> Reply:
    """Send what is in a directory, or with `deep` below it, as PAGEs of [path below it, type, size].

    With `names` only, as PAGEs of names. Never through a symlink, but for the directory itself. What can
    not be read below it is listed without what is in it.
    """
    top, count = request["path"].rstrip("/"), 0
    page: list[object] = []
    chars = 0
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            fd = os.open(f"{top}/{below}", DIRECTORY | (os.O_NOFOLLOW if below else 0))
        except OSError as problem:
            if not below or problem.errno not in _UNREADABLE:
                raise
            continue
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = f"{below}/{entry.name}" if below else entry.name
                    item = name if request["names"] else _entry(name, entry)
                    if item is None:
                        continue
                    count += 1
                    if count > request["most"]:
                        return {"limit": count}
                    page.append(item)
                    chars += len(name) + 32
                    if chars >= PAGE_CHARS:
                        link.send(PAGE, page)
                        page, chars = [], 0
                    if request["deep"] and entry.is_dir(follow_symlinks=False):
                        pending.append(name)
        finally:
            os.close(fd)
    link.send(PAGE, page)
    return {}


def _entry(name: str, entry: os.DirEntry[str]) -> list[object] | None:
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return [name, TYPES[stat.S_IFMT(found.st_mode)], found.st_size]


def _move(link: _Link, request: Request) -> Reply:
    move(request["path"], request["target"], overwrite=request["overwrite"], step=link.step)
    return {}


def _delete(link: _Link, request: Request) -> Reply:
    path = request["path"]
    try:
        # A slash at the end would follow a symlink.
        if request["recursive"] and stat.S_ISDIR(os.lstat(path.rstrip("/") or "/").st_mode):
            remove_tree(path, link.step)
        else:
            os.unlink(path)
    except FileNotFoundError:
        if not request["missing_ok"]:
            raise
    return {}


_OPERATIONS: dict[str, Callable[[_Link, Request], Reply | None]] = {
    "read": _read,
    "write": _write,
    "symlink": _symlink,
    "stat": _stat,
    "set_stat": _set_stat,
    "exists": _exists,
    "mkdir": _mkdir,
    "list": _list,
    "move": _move,
    "delete": _delete,
}


def _full(path: str) -> Reply:
    """Which limit a path has met that has no room; nothing where it leads to another file system than the VM's own."""
    while path not in ("", "/"):
        path = os.path.dirname(path)
        try:
            if os.stat(path).st_dev != os.stat("/").st_dev:
                return {}
            counts = os.statvfs("/")
            return {"full": "disk_files" if counts.f_files and counts.f_favail == 0 else "disk_bytes"}
        except OSError:
            pass
    return {}


def _error(problem: OSError, request: Request) -> Reply:
    reply: Reply = {"error": problem.errno or errno.EIO}
    if problem.errno == errno.ENOSPC:
        reply |= _full(str(request["target"] if "target" in request else request["path"]))
    return reply


def _answer(link: _Link, request: Request) -> Reply | None:
    try:
        return _OPERATIONS[request["op"]](link, request)
    except PathError as problem:
        return {"error": problem.number or errno.EIO, "path": problem.path[:PATH_CHARS]}
    except OSError as problem:
        return _error(problem, request)
    except MemoryError:
        return {"error": errno.ENOMEM}


def serve(fd: int) -> None:
    """Answer the requests that come over the connected Unix stream socket `fd`, until its end. Closes it.

    Ahead of the first request it says that it is ready: until then the host sends nothing, so that whoever
    had the socket before can not have read a part of a request.
    """
    link = _Link(fd)
    try:
        link.send(REPLY, {})
        while True:
            _, body = link.receive()
            reply = _answer(link, json.loads(bytes(body)))
            if reply is not None:
                link.send(REPLY, reply)
    except _Gone:
        pass
    finally:
        link.close()
