"""How arguments and results of actions look on the wire, and back: one object for each type, both ways.

What `read` gets was decoded from a client's message and may be anything: it answers a value that the VM's
method takes, or raises InvalidRequest. The results' `read` is for the client, which trusts its server.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from agentos.errors import AgentOSError, InvalidRequest, error_from_code
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
    check_count,
    check_env,
    check_text,
)
from agentos.wire.values import UNDEFINED

DEEPEST_TREE: Final = 100
"""Levels of a process tree on the wire; what is below hangs, flat, from the last one."""

_TIMES: Final = frozenset(("start_time", "exit_time", "mtime", "expires_at"))
"""Fields that are seconds in Python and milliseconds on the wire."""


@cache
def camel(name: str) -> str:
    """A snake_case name in camelCase."""
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def given(value: Any) -> bool:
    """Whether an argument was given: null and undefined both say that it was not."""
    return value is not None and value is not UNDEFINED


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


# -- arguments


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of argument. `read` takes the wire's name, for its error, and the wire's value."""

    python: str
    """The annotation in Python."""
    wanted: str
    """What an error says was wanted."""
    read: Callable[[str, Any], Any]
    write: Callable[[Any], Any] = lambda value: value


def _read_count(name: str, value: Any, least: int = 0, most: int = 2**53 - 1) -> int:
    return check_count(name, value, least=least, most=most)


def _read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest.argument(name, value, "true or false")
    return value


def _read_milliseconds(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value < 1e12:
        raise InvalidRequest.argument(name, value, "milliseconds, 0 or more")
    return float(value / 1000)


def _read_moment(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value < 1e15:
        raise InvalidRequest.argument(name, value, "milliseconds since the epoch")
    return float(value / 1000)


def _read_texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise InvalidRequest.argument(name, value, "a list of text")
    return [check_text(f"{name}[{index}]", one) for index, one in enumerate(value)]


def _write_texts(value: Any) -> Any:
    # What is wrong goes as it is: the answer names the argument and what it should be.
    return (
        list(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else value
    )


def _write_env(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _read_data(name: str, value: Any) -> str | bytes:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, dict) and value.get("type") == "Buffer":
        # What Node's JSON makes of a Buffer.
        try:
            return bytes(value["data"])
        except (KeyError, TypeError, ValueError):
            pass
    raise InvalidRequest.argument(name, value, "text or bytes")


def _write_data(value: Any) -> Any:
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def _read_signal(name: str, value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidRequest.argument(name, value, "a signal's name, such as SIGINT, or its number")
    return value


def _read_files(name: str, value: Any) -> list[tuple[str, str | bytes]]:
    if isinstance(value, dict):
        return [(check_text("path", path), _read_data(str(path), data)) for path, data in value.items()]
    if not isinstance(value, list):
        raise InvalidRequest.argument(name, value, "a list of {path, content}")
    pairs = []
    for index, one in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(one, dict) or set(one) - {"path", "content"} or "path" not in one:
            raise InvalidRequest.argument(where, one, "{path, content}")
        path = check_text(f"{where}.path", one["path"])
        pairs.append((path, _read_data(f"{where}.content", one.get("content"))))
    return pairs


def _write_files(value: Any) -> list[dict[str, Any]]:
    pairs: Iterable[tuple[str, Any]] = value.items() if isinstance(value, Mapping) else value
    return [{"path": path, "content": _write_data(data)} for path, data in pairs]


def choice(*names: str) -> Kind:
    """One of a few words."""
    wanted = " or ".join(names)

    def read(name: str, value: Any) -> str:
        if value not in names:
            raise InvalidRequest.argument(name, value, wanted)
        return str(value)

    return Kind("str", wanted, read)


def _counted(wanted: str, least: int = 0, most: int = 2**53 - 1) -> Kind:
    return Kind("int", wanted, lambda name, value: _read_count(name, value, least, most))


TEXT: Final = Kind("str", "text", check_text)
PATH: Final = Kind("str", "a path", lambda name, value: check_text(name, value, empty=False))
TEXTS: Final = Kind("Sequence[str]", "a list of text", _read_texts, _write_texts)
PATHS: Final = Kind("Iterable[str]", "a list of paths", _read_texts, _write_texts)
DATA: Final = Kind("str | bytes", "text or bytes", _read_data, _write_data)
ENV: Final = Kind(
    "Mapping[str, str]", "an object of text", lambda name, value: check_env(value, name), _write_env
)
HEADERS: Final = ENV
COUNT: Final = _counted("a whole number, 0 or more")
POSITIVE: Final = _counted("a whole number above 0", 1)
CELLS: Final = _counted("a whole number from 1 to 4096", 1, 4096)
MODE: Final = _counted("permission bits, 0 to 0o7777", 0, 0o7777)
FLAG: Final = Kind("bool", "true or false", _read_flag)
MILLISECONDS: Final = Kind("float", "milliseconds, 0 or more", _read_milliseconds, lambda value: value * 1000)
MOMENT: Final = Kind("float", "milliseconds since the epoch", _read_moment, lambda value: value * 1000)
SIGNAL: Final = Kind("str | int", "a signal's name or number", _read_signal)
FILES: Final = Kind(
    "Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]",
    "a list of {path, content}",
    _read_files,
    _write_files,
)


# -- results


@dataclass(frozen=True, slots=True)
class Result:
    """A type of result."""

    python: str
    """The annotation in Python."""
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


@cache
def _fields(kind: type) -> tuple[tuple[str, str, bool], ...]:
    return tuple((one.name, camel(one.name), one.name in _TIMES) for one in dataclasses.fields(kind))


def write_value(value: Any) -> Any:
    """A frozen value of the model as an object of the wire."""
    if isinstance(value, tuple | list):
        return [write_value(one) for one in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    tree: dict[str, Any] = {}
    for name, wire, is_time in _fields(type(value)):
        one = getattr(value, name)
        if is_time:
            tree[wire] = None if one is None else round(one * 1000, 3)
        else:
            tree[wire] = (
                one if one is None or isinstance(one, str | bytes | int | float) else write_value(one)
            )
    return tree


def read_value(kind: type, tree: Mapping[str, Any], **more: Any) -> Any:
    """The value of class `kind` that `tree` stands for; `more` are fields that were read already."""
    values = dict(more)
    for name, wire, is_time in _fields(kind):
        if name in values or wire not in tree:
            continue
        one = tree[wire]
        if is_time and one is not None:
            one /= 1000
        values[name] = tuple(one) if isinstance(one, list) else one
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
SPAWNED: Final = _of(SpawnedProcess)
SPAWNED_LIST: Final = _list_of(SpawnedProcess)
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
