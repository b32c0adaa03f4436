"""The ways to a VM, behind one face: whoever asks for a verb cannot tell which of them answers.

The TypeScript surface packs arguments and unpacks results by the table below, which is written from the contract and
shares nothing with the package: a mistake that the server and the Python clients both made would show.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import re
import subprocess
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from agentos import VM, Limits, create_client
from agentos.errors import BY_CODE, AgentOSError
from agentos.sync import create_client as create_blocking_client

KINDS: dict[str, dict[str, Any]] = {
    "vm": {},
    "small": {
        "limits": Limits(
            log_bytes=64 * 1024,
            output_bytes=64 * 1024,
            live_processes=4,
            exited_processes=3,
            shells=2,
            scrollback_bytes=8 * 1024,
            stdin_bytes=128 * 1024,
            memory_bytes=96 * 2**20,
            disk_bytes=4 * 2**20,
            shm_bytes=2**20,
        )
    },
}
"""What every surface has to offer: the embedded one boots these, the server registers them."""


@dataclass(frozen=True)
class Verb:
    """One verb. `positional` are the arguments that are not options, in the wire's order."""

    wire: str
    nested: str | None
    positional: tuple[str, ...] = ()
    of_files: bool = False


def _file(wire: str, *positional: str) -> Verb:
    return Verb(wire, None, positional, of_files=True)


VERBS = {
    "exec": Verb("exec", "process.exec", ("command",)),
    "exec_file": Verb("execFile", "process.execFile", ("command", "args")),
    "spawn": Verb("spawn", "process.spawn", ("command", "args")),
    "write_process_stdin": Verb("writeProcessStdin", "process.writeStdin", ("pid", "data")),
    "close_process_stdin": Verb("closeProcessStdin", "process.closeStdin", ("pid",)),
    "wait_process": Verb("waitProcess", "process.wait", ("pid",)),
    "list_processes": Verb("listProcesses", "process.list"),
    "get_process": Verb("getProcess", "process.get", ("pid",)),
    "stop_process": Verb("stopProcess", "process.stop", ("pid",)),
    "kill_process": Verb("killProcess", "process.kill", ("pid",)),
    "signal_process": Verb("signalProcess", "process.signal", ("pid", "signal")),
    "read_process_output": Verb("readProcessOutput", "process.readOutput", ("pid",)),
    "all_processes": Verb("allProcesses", "process.all"),
    "process_tree": Verb("processTree", "process.tree"),
    "open_shell": Verb("openShell", "terminal.open"),
    "write_shell": Verb("writeShell", "terminal.write", ("shell_id", "data")),
    "resize_shell": Verb("resizeShell", "terminal.resize", ("shell_id", "cols", "rows")),
    "close_shell": Verb("closeShell", "terminal.close", ("shell_id",)),
    "wait_shell": Verb("waitShell", "terminal.wait", ("shell_id",)),
    "list_shells": Verb("listShells", "terminal.list"),
    "read_shell": Verb("readShell", "terminal.read", ("shell_id",)),
    "read_file": _file("readFile", "path"),
    "write_file": _file("writeFile", "path", "data"),
    "read_files": _file("readFiles", "paths"),
    "write_files": _file("writeFiles", "files"),
    "stat": _file("stat", "path"),
    "set_stat": _file("setStat", "path"),
    "symlink": _file("symlink", "target", "path"),
    "mkdir": _file("mkdir", "path"),
    "readdir": _file("readdir", "path"),
    "readdir_entries": _file("readdirEntries", "path"),
    "readdir_recursive": _file("readdirRecursive", "path"),
    "exists": _file("exists", "path"),
    "move": _file("move", "source", "target"),
    "delete_file": _file("deleteFile", "path"),
}
"""Every verb that all surfaces have."""

REMOTE = {
    "fetch": Verb("vmFetch", None, ("port", "url")),
    "create_preview": Verb("createPreview", "network.preview", ("port",)),
    "destroy": Verb("destroy", None),
}
"""Those that only a server's VM has: an embedded one has `connect` and `close`."""

_MILLISECONDS = {"timeout", "idle_timeout", "cpu_timeout", "wait", "kill_after", "expires_in", "mtime"}
_TIMES = {"startTime", "exitTime", "mtime", "expiresAt"}

Body = Callable[[Any], Any]


class Surface(ABC):
    """A VM, asked in one way. Its verbs are attributes: `await vm.exec("true")`."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in VERBS and verb not in REMOTE:
            raise AttributeError(verb)

        async def ask(*args: Any, **options: Any) -> Any:
            self.asked.add(verb)
            return await self.ask(verb, *args, **options)

        return ask

    @abstractmethod
    async def ask(self, verb: str, /, *args: Any, **options: Any) -> Any:
        """The verb's result: a value with the fields of the contract. Raises what `fails` looks for."""

    @abstractmethod
    def nested(self) -> Surface:
        """The same VM, by the nested names of the verbs that have one."""

    def listen(self, *events: str) -> contextlib.AbstractAsyncContextManager[Events]:
        """The VM's events of these names, as the surface's own connection brings them."""
        raise NotImplementedError("an embedded VM has handles in place of events")

    # What behaviours do over and over, in verbs.

    async def output(self, pid: int, cursor: int = 0) -> bytes:
        """Everything that a spawned process writes from `cursor` to its end."""
        return b"".join([one.data for one in await self.chunks(pid, cursor)])

    async def chunks(self, pid: int, cursor: int = 0) -> list[Any]:
        """The same in pieces."""
        found: list[Any] = []
        while True:
            page = await self.read_process_output(pid, cursor=cursor, wait=20)
            found += page.events
            cursor = page.cursor
            if page.exited:
                return found

    async def alive(self) -> list[int]:
        """Pids of what runs; one that has ended may wait to be reaped."""
        return [one.pid for one in await self.all_processes() if one.status == "running"]

    async def until(self, pid: int, pattern: bytes) -> bytes:
        """Read a process's output until it has `pattern`."""
        return await self._until(
            lambda cursor: self.read_process_output(pid, cursor=cursor, wait=20), pattern
        )

    async def screen_until(self, shell_id: str, pattern: bytes) -> bytes:
        """Read a shell's until it shows `pattern`."""
        return await self._until(lambda cursor: self.read_shell(shell_id, cursor=cursor, wait=20), pattern)

    async def _until(self, read: Callable[[int], Any], pattern: bytes) -> bytes:
        cursor, seen = 0, b""
        while not re.search(pattern, seen, re.DOTALL):
            page = await read(cursor)
            seen += b"".join(one.data for one in page.events)
            cursor = page.cursor
            ended = page.exited and not re.search(pattern, seen, re.DOTALL)
            assert not ended, f"{pattern!r} never came; {seen[-2000:]!r} did"
        return seen


class Events:
    """Events as they come: `(name, payload)`, the payload with the contract's fields in Python's spelling."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    def take(self, name: str, payload: Any) -> None:
        """One has come; from any thread."""
        self._loop.call_soon_threadsafe(self._take, name, payload)

    def _take(self, name: str, payload: Any) -> None:
        self.seen.append((name, payload))
        self._news.set()

    async def until(self, condition: Callable[[list[tuple[str, Any]]], Any]) -> Any:
        """What `condition` makes of those seen so far, once that is true."""
        async with asyncio.timeout(20):
            while not (found := condition(self.seen)):
                self._news.clear()
                await self._news.wait()
        return found


@contextlib.contextmanager
def fails(code: str, said: str = "") -> Iterator[SimpleNamespace]:
    """The body fails with an error of this code, on every surface; what it was is in the value given."""
    caught = SimpleNamespace(message="", details={})
    failure: AgentOSError | TypeScriptError | None = None
    try:
        yield caught
    except (AgentOSError, TypeScriptError) as error:
        failure = error
    assert failure is not None, f"it did not fail with {code}"
    assert failure.code == code, f"{failure.code}: {failure}"
    assert re.search(said, failure.message), failure.message
    if isinstance(failure, AgentOSError) and code in BY_CODE:
        assert type(failure) is BY_CODE[code]
    caught.message, caught.details = failure.message, failure.details


# -- Python


class Way(Protocol):
    """How a surface is opened: a VM of a kind, while the context lasts."""

    def __call__(self, kind: str) -> contextlib.AbstractAsyncContextManager[Surface]: ...


class Python(Surface):
    """An object with the verbs as methods, those of files on its `files`."""

    def __init__(self, vm: Any, *, by_nested_names: bool = False) -> None:
        super().__init__()
        self._vm = vm
        self._by_nested_names = by_nested_names

    def nested(self) -> Surface:
        return type(self)(self._vm, by_nested_names=True)

    def _method(self, verb: str) -> Callable[..., Any]:
        known = VERBS.get(verb) or REMOTE[verb]
        if self._by_nested_names and known.nested:
            group, _, name = known.nested.partition(".")
            return getattr(getattr(self._vm, group), snake(name))
        return getattr(self._vm.files if known.of_files else self._vm, verb)

    async def ask(self, verb: str, /, *args: Any, **options: Any) -> Any:
        return await self._method(verb)(*args, **options)


class Remote(Python):
    """The async client, over HTTP."""

    @contextlib.asynccontextmanager
    async def listen(self, *names: str) -> AsyncIterator[Events]:
        events = Events()
        async with self._vm.connect() as connection:
            for name in names:
                connection.on(name, lambda payload, name=name: events.take(name, payload))
            await connection.exec("true")  # on the same socket: they are subscribed to by now
            yield events


class Connected(Remote):
    """The async client, over one WebSocket."""

    @contextlib.asynccontextmanager
    async def listen(self, *names: str) -> AsyncIterator[Events]:
        events = Events()
        handlers = {name: lambda payload, name=name: events.take(name, payload) for name in names}
        for name, handler in handlers.items():
            self._vm.on(name, handler)
        await self._vm.exec("true")
        yield events
        for name, handler in handlers.items():
            self._vm.off(name, handler)


class Blocking(Remote):
    """The blocking client, each call in a thread."""

    async def ask(self, verb: str, /, *args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(self._method(verb), *args, **options)

    @contextlib.asynccontextmanager
    async def listen(self, *names: str) -> AsyncIterator[Events]:
        events = Events()
        connection = self._vm.connect()
        await asyncio.to_thread(connection.__enter__)
        try:
            for name in names:
                connection.on(name, lambda payload, name=name: events.take(name, payload))
            await asyncio.to_thread(connection.exec, "true")
            yield events
        finally:
            await asyncio.to_thread(connection.__exit__, None, None, None)


@contextlib.asynccontextmanager
async def embedded(kind: str) -> AsyncIterator[Surface]:
    """A VM in this process."""
    async with VM(**KINDS[kind]) as vm:
        yield Python(vm)


def over_http(url: str) -> Way:
    """The async client's way."""

    @contextlib.asynccontextmanager
    async def way(kind: str) -> AsyncIterator[Surface]:
        async with create_client(url) as client:
            agent = client.kind(kind).get_or_create(new_key())
            try:
                yield Remote(agent)
            finally:
                await agent.destroy()

    return way


def over_a_websocket(url: str) -> Way:
    """The async client's other way."""

    @contextlib.asynccontextmanager
    async def way(kind: str) -> AsyncIterator[Surface]:
        async with create_client(url) as client:
            agent = client.kind(kind).get_or_create(new_key())
            try:
                async with agent.connect() as connection:
                    yield Connected(connection)
            finally:
                await agent.destroy()

    return way


def blocking(url: str) -> Way:
    """The blocking client's way."""

    @contextlib.asynccontextmanager
    async def way(kind: str) -> AsyncIterator[Surface]:
        with create_blocking_client(url) as client:
            agent = client.kind(kind).get_or_create(new_key())
            try:
                yield Blocking(agent)
            finally:
                await asyncio.to_thread(agent.destroy)

    return way


def new_key() -> str:
    """The key of a VM that there is not yet."""
    return f"behaviour-{uuid.uuid4().hex[:10]}"


def snake(name: str) -> str:
    """camelCase -> snake_case."""
    return re.sub(r"(?=[A-Z])", "_", name).lower()


def camel(name: str) -> str:
    """snake_case -> camelCase."""
    first, *rest = name.split("_")
    return first + "".join(one.capitalize() for one in rest)


# -- TypeScript


class TypeScriptError(Exception):
    """What the given client threw: group and code, message and metadata."""

    def __init__(self, code: str, message: str, details: Mapping[str, Any] | None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.details = dict(details or {})


class Driver:
    """One Node process with the given client in it: JSON lines in and out, bytes and `undefined` marked."""

    def __init__(self, node: str, directory: Path, url: str) -> None:
        answers, theirs = os.pipe()
        self._process = subprocess.Popen(
            [node, "driver.mjs", url, str(theirs)], cwd=directory, pass_fds=[theirs],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        os.close(theirs)
        self._answers_from = os.fdopen(answers)
        self._ids = itertools.count(1)
        self._answers: dict[int, Future[Any]] = {}
        self._listeners: dict[int, Callable[[str, Any], None]] = {}
        self._writing = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._answers_from:
            message = json.loads(line)
            if "event" in message:
                self._listeners[message["listener"]](message["event"], unmarked(message["payload"]))
                continue
            answer = self._answers.pop(message["id"])
            if not answer.set_running_or_notify_cancel():
                continue
            if "error" in message:
                error = unmarked(message["error"])
                answer.set_exception(TypeScriptError(error["code"], error["message"], error["metadata"]))
            else:
                answer.set_result(unmarked(message["value"]))
        for answer in self._answers.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(AssertionError("the Node process has ended"))

    def ask(self, order: str, **what: Any) -> Future[Any]:
        """Give it an order."""
        assert self._process.stdin is not None
        number = next(self._ids)
        answer = self._answers[number] = Future()
        with self._writing:
            self._process.stdin.write(json.dumps({"id": number, "order": order, **marked(what)}) + "\n")
            self._process.stdin.flush()
        return answer

    def listen(self, listener: int, take: Callable[[str, Any], None]) -> None:
        """Hand the events of this listener to `take`."""
        self._listeners[listener] = take

    def next_id(self) -> int:
        """A number that nothing else has."""
        return next(self._ids)

    def close(self) -> int:
        """End it. Its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(20)
        self._reader.join(20)
        self._answers_from.close()
        return code


class TypeScript(Surface):
    """The given client in an encoding: by a handle, over HTTP, or by a connection, over its WebSocket."""

    def __init__(self, driver: Driver, place: Mapping[str, Any], *, by_nested_names: bool = False) -> None:
        super().__init__()
        self._driver = driver
        self._place = dict(place)
        self._by_nested_names = by_nested_names

    def nested(self) -> Surface:
        return TypeScript(self._driver, self._place, by_nested_names=True)

    async def ask(self, verb: str, /, *args: Any, **options: Any) -> Any:
        known = VERBS.get(verb) or REMOTE[verb]
        name = known.nested if self._by_nested_names and known.nested else known.wire
        given = [*args, *(options.pop(one) for one in known.positional[len(args) :] if one in options)]
        if known.wire == "writeFiles" and isinstance(given[0], dict):
            given[0] = [{"path": path, "content": content} for path, content in given[0].items()]
        packed = {camel(one): _to_wire(one, value) for one, value in options.items() if value is not None}
        if packed:
            given += [UNDEFINED] * (len(known.positional) - len(given)) + [packed]
        answer = self._driver.ask("call", **self._place, action=name, args=given)
        return from_wire(await asyncio.wrap_future(answer), tree=verb == "process_tree")

    @contextlib.asynccontextmanager
    async def listen(self, *names: str) -> AsyncIterator[Events]:
        events = Events()
        listener = self._driver.next_id()
        self._driver.listen(listener, lambda name, payload: events.take(name, from_wire(payload)))
        await asyncio.wrap_future(
            self._driver.ask("listen", **self._place, listener=listener, events=list(names))
        )
        yield events
        await asyncio.wrap_future(self._driver.ask("silence", listener=listener))


def typescript(driver: Driver, encoding: str, *, connected: bool = False) -> Way:
    """The way of a TypeScript program."""

    @contextlib.asynccontextmanager
    async def way(kind: str) -> AsyncIterator[Surface]:
        place = {"encoding": encoding, "kind": kind, "key": new_key(), "connected": connected}
        try:
            yield TypeScript(driver, place)
        finally:
            await asyncio.wrap_future(driver.ask("destroy", **place))

    return way


class _Undefined:
    """JavaScript's."""


UNDEFINED = _Undefined()


def _to_wire(name: str, value: Any) -> Any:
    return value * 1000 if name in _MILLISECONDS and isinstance(value, int | float) else value


def from_wire(value: Any, *, tree: bool = False) -> Any:
    """A result of the given client with the contract's names as Python spells them, and times in seconds."""
    if isinstance(value, list):
        return [from_wire(one, tree=tree) for one in value]
    if not isinstance(value, dict):
        return value
    if tree:
        children = [from_wire(one, tree=True) for one in value["children"]]
        own = {name: one for name, one in value.items() if name != "children"}
        return SimpleNamespace(process=from_wire(own), children=tuple(children))
    if set(value) >= {"status", "headers", "body"}:
        return SimpleNamespace(**{snake(name): one for name, one in value.items()})
    if "error" in value and "errorCode" in value:
        value = {**value, "error": TypeScriptError(value["errorCode"], value["error"], value["errorDetails"])}
    elif set(value) & {"content", "success"} and "path" in value:
        value = {**value, "error": None}
    fields: dict[str, Any] = {}
    for name, one in value.items():
        inner = from_wire(one)
        if name in _TIMES and inner is not None:
            inner /= 1000
        fields[snake(name)] = tuple(inner) if isinstance(inner, list) else inner
    return SimpleNamespace(**fields)


def marked(value: Any) -> Any:
    """A value as JSON: bytes and undefined by marks."""
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if value is UNDEFINED:
        return {"$undefined": True}
    if isinstance(value, list | tuple):
        return [marked(one) for one in value]
    if isinstance(value, dict):
        return {name: marked(one) for name, one in value.items()}
    return value


def unmarked(value: Any) -> Any:
    """The value that `marked`, on the other side, made this of."""
    if isinstance(value, list):
        return [unmarked(one) for one in value]
    if isinstance(value, dict):
        if set(value) == {"$bytes"}:
            return base64.b64decode(value["$bytes"])
        return {name: unmarked(one) for name, one in value.items()}
    return value
