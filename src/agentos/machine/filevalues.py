"""What goes into the file actions and what comes out of a worker: checked, or refused.

A worker's answers are a hostile guest's, perhaps: whatever is not exactly what it should be raises
ValueError, KeyError or TypeError, which end the worker.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from errno import ENXIO
from itertools import islice
from typing import Any, TypeVar

from agentos.errors import InvalidRequest, LimitExceeded, file_error
from agentos.machine.fileserver import TYPES
from agentos.machine.filewire import NONSENSE, Worker
from agentos.model import DirEntry, FileStat, check_text

FILES_PER_CALL = 1000
"""Files of one read_files or write_files."""
PATH_BYTES = 4096
SORTED_AT_ONCE = 5_000
"""Entries sorted in one go: a few milliseconds."""

_TYPES = frozenset(TYPES.values())

Reply = dict[str, Any]
Data = str | bytes | bytearray | memoryview
T = TypeVar("T")


def understand(worker: Worker, reply: Reply, path: str, parse: Callable[[Reply], T]) -> T:
    """What `reply` says, or the FileError that it is. A reply that makes no sense ends the worker."""
    try:
        if "error" not in reply:
            return parse(reply)
        number, where = (
            checked_count(reply["error"], least=1, most=4095),
            checked_text(reply.get("path", path)),
        )
    except (KeyError, TypeError, ValueError):
        raise worker.broken(NONSENSE) from None
    error = file_error(number, "Not a regular file" if number == ENXIO else os.strerror(number), where)
    if reply.get("full") in ("disk_bytes", "disk_files"):
        error.details["limit"] = reply["full"]
    raise error


def nothing(_: object) -> None:
    """Take what tells nothing."""


def at_most(name: str, items: Iterable[T]) -> list[T]:
    """The items of argument `name`, a bounded number."""
    if isinstance(items, Data | Mapping) or not isinstance(items, Iterable):
        raise InvalidRequest.argument(name, items, "a list")
    found = list(islice(items, FILES_PER_CALL + 1))
    if len(found) > FILES_PER_CALL:
        raise LimitExceeded(
            f"{name}: at most {FILES_PER_CALL} files in one call",
            limit="files_per_call",
            value=len(found),
            maximum=FILES_PER_CALL,
        )
    return found


def checked_pair(name: str, pair: object) -> tuple[str, bytes]:
    """A path and its data, of argument `name`."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InvalidRequest.argument(name, pair, "pairs of a path and its data")
    path = check_text(f"{name} path", pair[0])
    return path, as_bytes(f"{name}[{path!r}]", pair[1])


def as_bytes(name: str, data: object, *, text: bool = True) -> bytes:
    """The bytes of argument `name`, text as UTF-8."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, bytearray | memoryview):
        return bytes(data)
    if not (text and isinstance(data, str)):
        raise InvalidRequest.argument(name, data, "text or bytes" if text else "bytes")
    try:
        return data.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidRequest.argument(name, data, "text that UTF-8 can hold") from None


def nanoseconds(moment: float | None) -> int | None:
    """`moment`, in seconds. Second and fraction apart: both together in nanoseconds are more than a float holds."""
    return None if moment is None else int(moment) * 10**9 + round(moment % 1 * 10**9)


def checked_count(value: object, least: int = 0, most: int = 2**63 - 1) -> int:
    """A whole number within bounds, from a worker."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError
    return value


def checked_text(value: object) -> str:
    """Text that can be a path, from a worker."""
    if not isinstance(value, str) or not 0 < len(value) <= PATH_BYTES * 2:
        raise ValueError
    if not value.isascii():
        value.encode("utf-8", "surrogateescape")
    return value


def checked_name(value: object) -> str:
    """A name that can be nothing but a name, whatever the worker says."""
    name = checked_text(value)
    if "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError
    return name


def _checked_type(value: object) -> Any:
    if value not in _TYPES:
        raise ValueError
    return value


def file_stat(path: str, reply: Reply) -> FileStat:
    """The stat of `path` that a worker answered."""
    ids = 2**32 - 1
    seconds, nanoseconds = divmod(checked_count(reply["mtime_ns"], least=-(2**63)), 10**9)
    return FileStat(
        path=path,
        type=_checked_type(reply["type"]),
        size=checked_count(reply["size"]),
        mode=checked_count(reply["mode"], most=0o7777),
        uid=checked_count(reply["uid"], most=ids),
        gid=checked_count(reply["gid"], most=ids),
        mtime=seconds + nanoseconds * 1e-9,
        target=checked_text(reply["target"]) if reply["type"] == "symlink" else None,
    )


def dir_entry(top: str, item: object) -> DirEntry:
    """One entry below directory `top` that a worker answered."""
    if not isinstance(item, list) or len(item) != 3:
        raise ValueError
    below, kind, size = item
    parts = list(map(checked_name, checked_text(below).split("/")))
    return DirEntry(name=parts[-1], path=f"{top}/{below}", type=_checked_type(kind), size=checked_count(size))


def path_of(entry: DirEntry) -> str:
    """What entries are sorted by."""
    return entry.path


async def in_order(items: list[T], key: Callable[[T], str]) -> list[T]:
    """`items` sorted by `key`, a bucket at a time: a million in one go would hold up everyone."""
    if len(items) <= SORTED_AT_ONCE:
        return sorted(items, key=key)
    pivots = sorted(map(key, items[:: SORTED_AT_ONCE // 2]))
    buckets: list[list[T]] = [[] for _ in range(len(pivots) + 1)]
    for start in range(0, len(items), SORTED_AT_ONCE):
        for item in items[start : start + SORTED_AT_ONCE]:
            buckets[bisect(pivots, key(item))].append(item)
        await asyncio.sleep(0)
    ordered: list[T] = []
    for bucket in buckets:
        bucket.sort(key=key)
        ordered += bucket
        await asyncio.sleep(0)
    return ordered
