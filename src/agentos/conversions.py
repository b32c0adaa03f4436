"""How results of actions look on the wire, and back: one object for each type, both ways.

`read` is for the client, which trusts its server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from agentos.errors import AgentOSError, error_from_code
from agentos.model import (
    DirEntry,
    ExecResult,
    FileContent,
    FileStat,
    FileWritten,
    Orphan,
    OutputChunk,
    OutputPage,
    ProcessInfo,
    ProcessTreeNode,
    ShellInfo,
    SpawnedProcess,
    Usage,
)

DEEPEST_TREE: Final = 100
"""Levels of a process tree on the wire; what is below hangs, flat, from the last one."""

_TIMES: Final = frozenset(("start_time", "exit_time", "mtime", "expires_at"))
"""Fields that are seconds in Python and milliseconds on the wire."""


@cache
def camel(name: str) -> str:
    """A snake_case name in camelCase."""
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


@dataclass(frozen=True, slots=True)
class FetchResponse:
    """What a server that listens inside the VM answered. Header names are in lower case."""

    status: int
    status_text: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Preview:
    """A link to a port inside a VM, for whoever has it. `expires_at` is in seconds since the epoch."""

    url: str
    token: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class Result:
    """A type of result."""

    python: str
    """The annotation in Python."""
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


@cache
def _fields(kind: type) -> tuple[tuple[str, str, bool], ...] | None:
    """Of a class of the model: each field, its name on the wire, and whether it is a time. None for any other class."""
    if not dataclasses.is_dataclass(kind):
        return None
    return tuple((one.name, camel(one.name), one.name in _TIMES) for one in dataclasses.fields(kind))


_PLAIN: Final = frozenset((type(None), str, bytes, bool, int, float))


def write_value(value: Any) -> Any:
    """A frozen value of the model as an object of the wire."""
    if isinstance(value, tuple | list):
        return [write_value(one) for one in value] if value else []
    kind: type = type(value)
    fields = _fields(kind)
    if fields is None:
        return value
    tree: dict[str, Any] = {}
    for name, wire, is_time in fields:
        one = getattr(value, name)
        if is_time:
            tree[wire] = None if one is None else round(one * 1000, 3)
        else:
            tree[wire] = one if type(one) in _PLAIN else write_value(one)
    return tree


def read_value(kind: type, tree: Mapping[str, Any], **more: Any) -> Any:
    """The value of class `kind` that `tree` stands for; `more` are fields that were read already."""
    values = dict(more)
    for name, wire, is_time in _fields(kind) or ():
        if name in values or wire not in tree:
            continue
        one = tree[wire]
        if is_time and one is not None:
            one /= 1000
        values[name] = tuple(one) if type(one) is list else one
    return kind(**values)


def _of(kind: type) -> Result:
    return Result(kind.__name__, write_value, lambda tree: read_value(kind, tree))


def _list_of(kind: type) -> Result:
    return Result(f"list[{kind.__name__}]", write_value, lambda tree: [read_value(kind, one) for one in tree])


def _read_exec(tree: Mapping[str, Any]) -> ExecResult:
    orphans = tuple(read_value(Orphan, one) for one in tree.get("orphans", ()))
    usage = read_value(Usage, tree.get("usage") or {})
    result: ExecResult = read_value(ExecResult, tree, orphans=orphans, usage=usage)
    return result


def _read_spawned(tree: Mapping[str, Any]) -> SpawnedProcess:
    used = tree.get("usage")
    usage = None if used is None else read_value(Usage, used)
    process: SpawnedProcess = read_value(SpawnedProcess, tree, usage=usage)
    return process


def _read_page(tree: Mapping[str, Any]) -> OutputPage:
    events = tuple(read_value(OutputChunk, one) for one in tree["events"])
    page: OutputPage = read_value(OutputPage, tree, events=events)
    return page


def _write_forest(nodes: Iterable[ProcessTreeNode], level: int = 1) -> list[dict[str, Any]]:
    written = []
    for node in nodes:
        tree = write_value(node.process)
        below: Iterable[ProcessTreeNode] = node.children
        if level == DEEPEST_TREE - 1:
            below = _flat(below)
        tree["children"] = _write_forest(below, level + 1) if level < DEEPEST_TREE else []
        written.append(tree)
    return written


def _flat(nodes: Iterable[ProcessTreeNode]) -> list[ProcessTreeNode]:
    pending, found = list(nodes), []
    while pending:
        node = pending.pop()
        found.append(ProcessTreeNode(node.process))
        pending += node.children
    return sorted(found, key=lambda one: one.process.pid)


def _read_forest(trees: Iterable[Mapping[str, Any]]) -> list[ProcessTreeNode]:
    return [
        ProcessTreeNode(read_value(ProcessInfo, tree), tuple(_read_forest(tree["children"])))
        for tree in trees
    ]


def _write_entry(entry: DirEntry | FileStat) -> dict[str, Any]:
    tree: dict[str, Any] = write_value(entry)
    tree["isDirectory"] = entry.type == "directory"
    tree["isSymbolicLink"] = entry.type == "symlink"
    return tree


def _write_error(error: AgentOSError | None) -> dict[str, Any]:
    if error is None:
        return {}
    return {"error": error.message, "errorCode": error.code, "errorDetails": error.details}


def _read_error(tree: Mapping[str, Any]) -> AgentOSError | None:
    if "error" not in tree:
        return None
    return error_from_code(tree.get("errorCode", "file.failed"), tree["error"], tree.get("errorDetails"))


def _write_content(one: FileContent) -> dict[str, Any]:
    return {"path": one.path, "content": one.content, **_write_error(one.error)}


def _write_written(one: FileWritten) -> dict[str, Any]:
    return {"path": one.path, "success": one.error is None, **_write_error(one.error)}


def _same(value: Any) -> Any:
    return value


NONE: Final = Result("None", lambda value: None, lambda tree: None)
INTEGER: Final = Result("int", _same, _same)
BOOLEAN: Final = Result("bool", _same, _same)
BYTES: Final = Result("bytes", _same, _same)
NAMES: Final = Result("list[str]", _same, _same)
PID: Final = Result(
    "Process",
    lambda process: {"pid": process.pid, "bootId": process.boot_id},
    lambda tree: (tree["pid"], tree.get("bootId")),
)
SHELL_ID: Final = Result(
    "Shell",
    lambda shell: {"shellId": shell.shell_id, "bootId": shell.boot_id},
    lambda tree: (tree["shellId"], tree.get("bootId")),
)
EXEC_RESULT: Final = Result("ExecResult", write_value, _read_exec)
SPAWNED: Final = Result("SpawnedProcess", write_value, _read_spawned)
SPAWNED_LIST: Final = Result(
    "list[SpawnedProcess]", write_value, lambda trees: [_read_spawned(one) for one in trees]
)
PROCESS_LIST: Final = _list_of(ProcessInfo)
FOREST: Final = Result("list[ProcessTreeNode]", _write_forest, _read_forest)
SHELL_LIST: Final = _list_of(ShellInfo)
PAGE: Final = Result("OutputPage", write_value, _read_page)
STAT: Final = Result("FileStat", _write_entry, lambda tree: read_value(FileStat, tree))
ENTRIES: Final = Result(
    "list[DirEntry]",
    lambda entries: [_write_entry(one) for one in entries],
    lambda trees: [read_value(DirEntry, one) for one in trees],
)
CONTENTS: Final = Result(
    "list[FileContent]",
    lambda contents: [_write_content(one) for one in contents],
    lambda trees: [FileContent(one["path"], one.get("content"), _read_error(one)) for one in trees],
)
WRITTEN: Final = Result(
    "list[FileWritten]",
    lambda results: [_write_written(one) for one in results],
    lambda trees: [FileWritten(one["path"], _read_error(one)) for one in trees],
)
FETCHED: Final = _of(FetchResponse)
PREVIEW: Final = _of(Preview)
