"""The client has the verbs of the embedded VM, its blocking twin those of the async one; imports stay light."""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from agentos.actions import ACTIONS
from agentos.client import aio, calls, patience
from agentos.client import sync as blocking
from agentos.client.reasons import never_began
from agentos.client.transport import proxy_for
from agentos.errors import ConnectionLost, InvalidRequest
from agentos.machine import files, process, shell, vm

EMBEDDED = [
    (vm.VM, aio.Agent),
    (vm.VM, aio.Connection),
    (process.Process, aio.RemoteProcess),
    (shell.Shell, aio.RemoteShell),
    (files.Files, aio.RemoteFiles),
]
ONLY_HERE = {
    vm.VM: {
        "start", "close", "link", "keep_draining", "process_ended", "shell_ended", "connect",
        "on_process", "on_process_end", "on_shell", "on_shell_end", "on_stopped", "on_limit",
    },
    process.Process: {"start", "end", "signal_leader", "kill_lineage"},
    shell.Shell: {"start", "hang_up"},
    files.Files: {"close"},
}  # fmt: skip
"""What a VM in this process has and a remote one can not, or calls otherwise."""
TWINS = [
    (aio.Agent, blocking.Agent),
    (aio.Client, blocking.Client),
    (aio.Connection, blocking.Connection),
    (aio.Kind, blocking.Kind),
    (aio.RemoteFiles, blocking.RemoteFiles),
    (aio.RemoteProcess, blocking.RemoteProcess),
    (aio.RemoteShell, blocking.RemoteShell),
]


def methods(kind: type) -> dict[str, Callable[..., Any]]:
    """Public methods, inherited ones too."""
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: value for name, value in found if not name.startswith("_")}


@pytest.mark.parametrize(("embedded", "remote"), EMBEDDED, ids=lambda kind: kind.__name__)
def test_code_moves_by_changing_one_line(embedded: type, remote: type) -> None:
    """Every verb, with the same arguments and defaults."""
    theirs = methods(remote)
    for name, method in methods(embedded).items():
        if name in ONLY_HERE[embedded]:
            continue
        assert name in theirs, f"{remote.__name__} lacks {name}"
        ours = inspect.signature(method).parameters
        assert {n: (p.kind, p.default) for n, p in ours.items()} == {
            n: (p.kind, p.default) for n, p in inspect.signature(theirs[name]).parameters.items()
        }, name
        assert (
            inspect.iscoroutinefunction(method) == inspect.iscoroutinefunction(theirs[name]) or name == "info"
        )


def test_every_action_has_its_verb() -> None:
    """Whatever a server can be asked, the client can ask."""
    for action in ACTIONS:
        assert hasattr(aio.RemoteFiles if action.target == "files" else aio.Agent, action.method), action.name


@pytest.mark.parametrize(("asynchronous", "twin"), TWINS, ids=lambda kind: kind.__name__)
def test_the_blocking_twin_has_the_same(asynchronous: type, twin: type) -> None:
    """Members, arguments and defaults."""
    theirs = methods(twin)
    assert set(methods(asynchronous)) == set(theirs)
    for name, method in methods(asynchronous).items():
        ours = inspect.signature(method).parameters
        assert {n: (p.kind, p.default) for n, p in ours.items()} == {
            n: (p.kind, p.default) for n, p in inspect.signature(theirs[name]).parameters.items()
        }, name
        assert not inspect.iscoroutinefunction(theirs[name])
    assert ("__aenter__" in vars(asynchronous)) == ("__enter__" in vars(twin))


def test_create_client_is_the_same_on_both_sides() -> None:
    """So that code moves from one to the other by changing its import."""
    signatures = [inspect.signature(module.create_client).parameters for module in (aio, blocking)]
    assert signatures[0] == signatures[1]


def test_importing_agentos_needs_only_the_standard_library() -> None:
    """The client and the server are imported when they are asked for."""
    script = (
        "import sys, agentos, agentos.sync, agentos.cli\n"
        "assert not {'aiohttp', 'websockets', 'uvicorn', 'starlette'} & set(sys.modules), sys.modules\n"
        "agentos.create_client, agentos.agent_os, agentos.setup\n"
        "assert agentos.sync.create_client().vm.name == 'vm'\n"
        "from agentos import create_client, setup, agent_os\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    ("environment", "endpoint", "wanted"),
    [
        ({}, "https://vms.example", None),
        ({"https_proxy": "http://p:3128"}, "https://vms.example", "http://p:3128"),
        ({"https_proxy": "http://p:3128"}, "http://vms.example", None),
        ({"all_proxy": "p:3128"}, "http://vms.example:6420/base", "http://p:3128"),
        ({"http_proxy": "http://p:3128", "no_proxy": "example"}, "http://vms.example:6420", None),
        ({"http_proxy": "http://p:3128", "no_proxy": "localhost"}, "http://localhost:6420", None),
    ],
)
def test_the_proxy_of_the_environment(
    environment: dict[str, str], endpoint: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used for the endpoints that it is meant for."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(endpoint) == wanted


async def _asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, str]:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set_result(await reader.readuntil(b"\r\n"))
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 2\r\n\r\nno")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
        async with aio.create_client("http://vms.example:6420") as client:
            with pytest.raises(ConnectionLost) as lost:
                await client.vm.get_or_create("a").exec("true")
        return await heard, lost.value.message


@pytest.mark.usefixtures("no_proxy")
def test_requests_go_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answers by itself is told."""
    line, said = asyncio.run(_asked_through_a_proxy(monkeypatch))
    assert line.startswith(b"POST http://vms.example:6420/gateway/vm/action/exec?")
    assert said == "http://vms.example:6420 is no agentos server: it answered 502"


@pytest.mark.usefixtures("no_proxy")
def test_a_proxy_of_a_kind_that_is_not_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused: going past it could be what it is there to prevent."""
    monkeypatch.setenv("all_proxy", "socks5://p:1080")
    with pytest.raises(InvalidRequest, match="socks5"):
        proxy_for("http://vms.example")


class CutOff:
    """A way to a server on which connections break before the answers of all but small pages are through."""

    reached = True
    closed = False

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def call(self, name: str, args: tuple[Any, ...], wait: float | None) -> Any:
        page = args[1]["maxBytes"]
        self.asked.append(page)
        if page > 100_000:
            raise ConnectionLost("cut off")
        return {"events": [], "cursor": 0, "truncated": False, "skipped": 0, "exited": True}


def test_a_page_that_is_cut_off_is_asked_for_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one might never come through."""
    monkeypatch.setattr(patience, "_DELAYS", (0.0,))
    way = CutOff()
    page = asyncio.run(calls.ask(way, "read_process_output", pid=1, cursor=0, max_bytes=2**20, wait=0.0))
    assert page.exited
    assert way.asked == [2**20, 2**19, 2**18, 2**17, 2**16]


class Hours:
    """A clock that a try moves on by so many seconds, and a way to a server that is never through."""

    reached = True
    closed = False

    def __init__(self, failure: ConnectionLost, each: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failure = failure
        self.each = each
        self.now = 0.0
        self.tries = 0
        monkeypatch.setattr(patience, "_DELAYS", (0.0,))
        monkeypatch.setattr("agentos.client.patience.time.monotonic", lambda: self.now)

    async def call(self, name: str, args: tuple[Any, ...], wait: float | None) -> Any:
        self.now += self.each
        self.tries += 1
        raise self.failure


@pytest.mark.parametrize(
    ("failure", "least", "most"),
    [
        (ConnectionLost("broke"), patience.PATIENCE_SECONDS, patience.PATIENCE_SECONDS + 1),
        (ConnectionLost("nobody", reason="connection refused"), patience.AWAY_SECONDS, patience.AWAY_SECONDS + 1),
    ],
)  # fmt: skip
def test_patience_is_a_time_not_a_number_of_tries(
    failure: ConnectionLost, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer where the server takes connections than where nobody does."""
    way = Hours(failure, 0.1, monkeypatch)
    with pytest.raises(ConnectionLost):
        asyncio.run(calls.ask(way, "list_processes"))
    assert least <= way.now - 0.1 <= most
    assert way.tries > 100


def test_who_was_closed_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much patience there would be."""
    way = Hours(ConnectionLost("the client was closed"), 0.1, monkeypatch)
    way.closed = True
    with pytest.raises(ConnectionLost):
        asyncio.run(calls.ask(way, "list_processes"))
    assert way.tries == 1


def _lost(endpoint: str) -> ConnectionLost:
    async def ask() -> None:
        async with aio.create_client(endpoint) as client:
            await client.list()

    with pytest.raises(ConnectionLost) as caught:
        asyncio.run(ask())
    return caught.value


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:9", "connection refused"),
        ("http://localhost:9", "connection refused"),
        ("http://nobody.invalid:6420", "there is no host of this name"),
    ],
)
def test_why_nobody_answers_is_said_in_words(endpoint: str, reason: str) -> None:
    """One sentence, with the address."""
    lost = _lost(endpoint)
    assert lost.message == f"nobody answers at {endpoint}: {reason}"
    assert lost.details["reason"] == reason


def test_who_resets_a_connection_at_once_is_there() -> None:
    """So it is tried again for longer, also by who never had an answer."""
    for number, never in ((errno.ECONNREFUSED, True), (errno.ETIMEDOUT, True), (errno.ECONNRESET, False)):
        cause = OSError(number, os.strerror(number))
        assert never_began(aiohttp.ClientConnectorError(None, cause)) is never  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "closed before an answer came"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf", "closed in the middle of an answer"),
    ],
)
def test_why_a_connection_broke_is_said_in_words(answer: bytes, reason: str) -> None:
    """Likewise; there is somebody at the address, so no `reason` is among the details."""

    async def ask() -> ConnectionLost:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with aio.create_client(endpoint) as client:
                with pytest.raises(ConnectionLost) as caught:
                    await client.list()
        assert caught.value.message == f"the connection to {endpoint} broke: {reason}"
        return caught.value

    assert "reason" not in asyncio.run(ask()).details


def test_what_is_shown_of_each_names_it() -> None:
    """Which VM it is, and nothing that is secret."""

    async def body() -> None:
        async with aio.create_client("http://localhost:6420", "a secret token") as client:
            agent = client.vm.get_or_create(["a", "b"])
            assert repr(client.vm) == "<Kind vm of http://localhost:6420>"
            assert repr(agent) == "<Agent vm 'a/b'>"
            assert repr(agent.connect()) == "<Connection to vm 'a/b'>"

    asyncio.run(body())
