"""The table of actions: every wire name with its arguments and its result, for both sides of the wire.

`ACTIONS` is data: the server calls VMs by it, the Python clients pack their calls by it, and documentation
is written from it. Nothing here knows a VM or a socket. On the wire names are camelCase and times are
milliseconds; in Python names are snake_case and times are seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from agentos import arguments as kinds
from agentos import conversions as results
from agentos.arguments import NOT_GIVEN, Kind
from agentos.conversions import Result, camel
from agentos.errors import ActionNotFound, InvalidRequest

Target = Literal["vm", "files", "actor"]


@dataclass(frozen=True, slots=True)
class Param:
    """One argument. `aliases` are names that older clients use for the same option."""

    name: str
    """In Python."""
    kind: Kind
    required: bool = False
    aliases: tuple[str, ...] = ()
    wire: str = field(init=False)
    """Its name on the wire."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "wire", camel(self.name))


@dataclass(frozen=True, slots=True)
class Action:
    """One verb: its names on the wire, the method that does it, what it takes and what it gives."""

    name: str
    aliases: tuple[str, ...]
    target: Target
    """Whose method it is: the VM's, its file actions', or the actor's, which outlives the VM."""
    method: str
    params: tuple[Param, ...]
    """Positional on the wire, in this order."""
    options: tuple[Param, ...]
    """Members of the object that may follow them."""
    result: Result

    def read_arguments(self, args: Sequence[Any]) -> dict[str, Any]:
        """The keyword arguments of the method that `args`, from the wire, stand for.

        Raises InvalidRequest naming the argument and what it should be.
        """
        most = len(self.params) + bool(self.options)
        if len(args) > most:
            raise InvalidRequest.argument(f"arguments of {self.name}", f"{len(args)}", f"at most {most}")
        values: dict[str, Any] = {}
        for index, param in enumerate(self.params):
            value = args[index] if index < len(args) else None
            if value not in NOT_GIVEN:
                values[param.name] = param.kind.read(param.wire, value)
            elif param.required:
                raise InvalidRequest.argument(param.wire, None, param.kind.wanted)
        if len(args) == most and self.options and args[-1] not in NOT_GIVEN:
            values |= self._read_options(args[-1])
        return values

    def _read_options(self, options: Any) -> dict[str, Any]:
        if not isinstance(options, dict):
            raise InvalidRequest.argument("options", options, "an object")
        known = _OPTIONS_BY_NAME[self.name]
        values: dict[str, Any] = {}
        for key, value in options.items():
            param = known.get(key) if isinstance(key, str) else None
            if param is None:
                names = ", ".join(one.wire for one in self.options)
                raise InvalidRequest.argument(f"options of {self.name}", key, f"one of {names}")
            if value not in NOT_GIVEN:
                values[param.name] = param.kind.read(param.wire, value)
        return values

    def write_arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """The arguments for the wire from Python ones by name: what `read_arguments` reads as just them.

        None stands for an argument that was not given; a word that is meant without being given is left out.
        Raises InvalidRequest for an unknown or missing one.
        """
        known = _NAMES[self.name]
        for name in values:
            if name not in known:
                raise InvalidRequest.argument(f"arguments of {self.name}", name, "a known argument")
        args: list[Any] = []
        for param in self.params:
            value = values.get(param.name)
            if value is not None:
                args.append(param.kind.write(param.name, value))
            elif param.required:
                raise InvalidRequest.argument(param.name, None, param.kind.wanted)
            else:
                args.append(None)
        options = {}
        for param in self.options:
            value = values.get(param.name)
            if value is not None and value != param.kind.meant:
                options[param.wire] = param.kind.write(param.name, value)
        if options:
            args.append(options)
        while args and args[-1] is None:
            args.pop()
        return args

    def on_the_wire(self, error: InvalidRequest) -> InvalidRequest:
        """`error` of the method, naming its argument as who called over the wire wrote it."""
        return _renamed(error, _WIRE_NAMES[self.name])

    def in_python(self, error: InvalidRequest) -> InvalidRequest:
        """`error` from the wire, naming its argument as who called in Python wrote it."""
        return _renamed(error, _PYTHON_NAMES[self.name])


def _need(name: str, kind: Kind) -> Param:
    return Param(name, kind, required=True)


BOOT: Final = Param("boot_id", kinds.TEXT)
"""An option of what is asked of a process or shell that a client knows: the boot of the VM in which it started.

After another boot the same pid is another process. The server looks at it; the VM's methods know nothing of it.
"""
_SAME = (BOOT,)
_PID = _need("pid", kinds.COUNT)
_SHELL = _need("shell_id", kinds.TEXT)
_PATH = _need("path", kinds.PATH)
_COMMAND = _need("command", kinds.TEXT)
_ARGS = Param("args", kinds.TEXTS)
_TIMEOUT = Param("timeout", kinds.MILLISECONDS)
_PLACE = (Param("cwd", kinds.TEXT), Param("env", kinds.ENV), Param("user", kinds.TEXT))
_EXEC = (
    *_PLACE,
    Param("stdin", kinds.DATA),
    _TIMEOUT,
    Param("idle_timeout", kinds.MILLISECONDS),
    Param("cpu_timeout", kinds.MILLISECONDS),
    Param("max_output_bytes", kinds.COUNT),
    Param("encoding", kinds.choice("utf8", "bytes")),
    Param("on_leader_exit", kinds.choice("drain", "wait", "kill")),
)
_ONCE = Param("idempotency_key", kinds.TEXT)
_SPAWN = (*_PLACE, _TIMEOUT, _ONCE, Param("lossless", kinds.FLAG))
_PAGE = (
    Param("cursor", kinds.COUNT),
    Param("max_bytes", kinds.POSITIVE),
    Param("wait", kinds.MILLISECONDS),
    BOOT,
)
_TERMINAL = (
    Param("command", kinds.TEXT),
    _ARGS,
    Param("env", kinds.ENV),
    Param("cwd", kinds.TEXT),
    Param("user", kinds.TEXT),
    Param("cols", kinds.CELLS),
    Param("rows", kinds.CELLS),
    _ONCE,
)
_SIZE = (_need("cols", kinds.CELLS), _need("rows", kinds.CELLS))
_MOST = (Param("max_entries", kinds.POSITIVE),)
_MODE = Param("mode", kinds.MODE)


def _action(
    name: str,
    alias: str | None,
    method: str,
    params: Iterable[Param],
    options: Iterable[Param],
    result: Result,
    target: Target = "vm",
) -> Action:
    return Action(name, (alias,) if alias else (), target, method, tuple(params), tuple(options), result)


def _file(
    name: str, method: str, params: Iterable[Param], options: Iterable[Param], result: Result
) -> Action:
    return _action(name, None, method, params, options, result, "files")


_DATA = _need("data", kinds.DATA)
_PARENTS = Param("make_parents", kinds.FLAG)

ACTIONS: Final[tuple[Action, ...]] = (
    _action("exec", "process.exec", "exec", [_COMMAND], _EXEC, results.EXEC_RESULT),
    _action("execFile", "process.execFile", "exec_file", [_COMMAND, _ARGS], _EXEC, results.EXEC_RESULT),
    _action("spawn", "process.spawn", "spawn", [_COMMAND, _ARGS], _SPAWN, results.PID),
    _action(
        "writeProcessStdin",
        "process.writeStdin",
        "write_process_stdin",
        [_PID, _DATA],
        [_ONCE, BOOT],
        results.NONE,
    ),
    _action("closeProcessStdin", "process.closeStdin", "close_process_stdin", [_PID], _SAME, results.NONE),
    _action("waitProcess", "process.wait", "wait_process", [_PID], [_TIMEOUT, BOOT], results.INTEGER),
    _action("listProcesses", "process.list", "list_processes", (), (), results.SPAWNED_LIST),
    _action("getProcess", "process.get", "get_process", [_PID], _SAME, results.SPAWNED),
    _action(
        "stopProcess",
        "process.stop",
        "stop_process",
        [_PID],
        [Param("kill_after", kinds.MILLISECONDS), BOOT],
        results.NONE,
    ),
    _action("killProcess", "process.kill", "kill_process", [_PID], _SAME, results.NONE),
    _action(
        "signalProcess",
        "process.signal",
        "signal_process",
        [_PID, _need("signal", kinds.SIGNAL)],
        _SAME,
        results.NONE,
    ),
    _action(
        "readProcessOutput",
        "process.readOutput",
        "read_process_output",
        [_PID],
        [*_PAGE, Param("since", kinds.MOMENT)],
        results.PAGE,
    ),
    _action("allProcesses", "process.all", "all_processes", (), (), results.PROCESS_LIST),
    _action("processTree", "process.tree", "process_tree", (), (), results.FOREST),
    _action("openShell", "terminal.open", "open_shell", (), _TERMINAL, results.SHELL_ID),
    _action("writeShell", "terminal.write", "write_shell", [_SHELL, _DATA], [_ONCE, BOOT], results.NONE),
    _action("resizeShell", "terminal.resize", "resize_shell", [_SHELL, *_SIZE], _SAME, results.NONE),
    _action("closeShell", "terminal.close", "close_shell", [_SHELL], _SAME, results.NONE),
    _action("waitShell", "terminal.wait", "wait_shell", [_SHELL], [_TIMEOUT, BOOT], results.INTEGER),
    _action("listShells", "terminal.list", "list_shells", (), (), results.SHELL_LIST),
    _action("readShell", "terminal.read", "read_shell", [_SHELL], _PAGE, results.PAGE),
    _file(
        "readFile",
        "read_file",
        [_PATH],
        [Param("offset", kinds.COUNT), Param("length", kinds.COUNT)],
        results.BYTES,
    ),
    _file(
        "writeFile",
        "write_file",
        [_PATH, _DATA],
        [_MODE, Param("append", kinds.FLAG), _PARENTS],
        results.NONE,
    ),
    _file("readFiles", "read_files", [_need("paths", kinds.PATHS)], (), results.CONTENTS),
    _file("writeFiles", "write_files", [_need("files", kinds.FILES)], (), results.WRITTEN),
    _file("stat", "stat", [_PATH], (), results.STAT),
    _file("setStat", "set_stat", [_PATH], [_MODE, Param("mtime", kinds.MOMENT)], results.NONE),
    _file(
        "symlink",
        "symlink",
        [_need("target", kinds.PATH), _PATH],
        [Param("overwrite", kinds.FLAG)],
        results.NONE,
    ),
    _file(
        "mkdir",
        "mkdir",
        [_PATH],
        [Param("parents", kinds.FLAG, aliases=("recursive",)), _MODE],
        results.NONE,
    ),
    _file("readdir", "readdir", [_PATH], _MOST, results.NAMES),
    _file("readdirEntries", "readdir_entries", [_PATH], _MOST, results.ENTRIES),
    _file("readdirRecursive", "readdir_recursive", [_PATH], _MOST, results.ENTRIES),
    _file("exists", "exists", [_PATH], (), results.BOOLEAN),
    _file(
        "move",
        "move",
        [_need("source", kinds.PATH), _need("target", kinds.PATH)],
        [Param("overwrite", kinds.FLAG)],
        results.NONE,
    ),
    _file(
        "deleteFile",
        "delete_file",
        [_PATH],
        [Param("recursive", kinds.FLAG), Param("missing_ok", kinds.FLAG)],
        results.NONE,
    ),
    _action(
        "vmFetch",
        None,
        "fetch",
        [_need("port", kinds.COUNT), _need("url", kinds.TEXT)],
        [Param("method", kinds.TEXT), Param("headers", kinds.HEADERS), Param("body", kinds.DATA)],
        results.FETCHED,
        "actor",
    ),
    _action(
        "createPreview",
        "network.preview",
        "create_preview",
        [_need("port", kinds.COUNT)],
        [Param("expires_in", kinds.MILLISECONDS), Param("path", kinds.TEXT)],
        results.PREVIEW,
        "actor",
    ),
    _action("destroy", None, "destroy", (), (), results.NONE, "actor"),
)
"""Every action."""

BY_NAME: Final[dict[str, Action]] = {
    name: action for action in ACTIONS for name in (action.name, *action.aliases)
}
"""By wire name and by alias."""

BY_METHOD: Final[dict[str, Action]] = {action.method: action for action in ACTIONS}
"""By the name of the Python method."""

_NAMES: Final[dict[str, frozenset[str]]] = {
    action.name: frozenset(one.name for one in (*action.params, *action.options)) for action in ACTIONS
}
"""What each action takes, in Python."""

_OPTIONS_BY_NAME: Final[dict[str, dict[str, Param]]] = {
    action.name: {name: one for one in action.options for name in (one.wire, *one.aliases)}
    for action in ACTIONS
}


_WIRE_NAMES: Final[dict[str, dict[str, str]]] = {
    action.name: {one.name: one.wire for one in (*action.params, *action.options)} for action in ACTIONS
}
_PYTHON_NAMES: Final[dict[str, dict[str, str]]] = {
    action: {wire: name for name, wire in names.items()} for action, names in _WIRE_NAMES.items()
}


def _renamed(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    argument = error.details.get("argument")
    if not isinstance(argument, str):
        return error
    name, bracket, rest = argument.partition("[")
    other = names.get(name, name)
    if other == name or not error.message.startswith(name):
        return error
    details = {**error.details, "argument": f"{other}{bracket}{rest}"}
    return InvalidRequest(f"{other}{error.message[len(name) :]}", **details)


def find(name: str) -> Action:
    """The action of this wire name or alias. Raises ActionNotFound."""
    action = BY_NAME.get(name)
    if action is None:
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise ActionNotFound(f"Action `{shown}` was not found.", action=shown)
    return action
