"""A registry of one's own: kinds, hooks, limits, and being part of another application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from agentos.actor import Booted, Connecting
from agentos.errors import InvalidRequest, Unauthorized
from agentos.model import Limits
from agentos.registry import Registry, agent_os, setup
from agentos.server.serve import make_server
from agentos.wire.address import Action, ByKey, Connect, gateway_path

Scene = Callable[[httpx.AsyncClient], Awaitable[None]]


@contextlib.asynccontextmanager
async def running(server: uvicorn.Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `server`, which runs in this event loop until this ends."""
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            assert not task.done(), "it did not start"
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        await task


def play(registry: Registry, data_dir: Path, scene: Scene) -> None:
    """Run `scene` against a server of this registry."""

    async def main() -> None:
        async with running(make_server(registry, port=0, data_dir=data_dir)) as client:
            await scene(client)

    asyncio.run(main())


async def run(client: httpx.AsyncClient, command: str, **target: Any) -> httpx.Response:
    """`command` in the VM that is made for it."""
    more = {"name": "vm", "key": ("k",), "create": True} | target
    headers = more.pop("headers", {})
    return await client.post(
        gateway_path(ByKey(**more), Action("exec")), json={"args": [command]}, headers=headers
    )


@pytest.mark.parametrize("decided", ["while calls are awaited", "never"])
def test_a_hook_that_decides_as_the_server_ends(tmp_path: Path, decided: str) -> None:
    """The connection that it is about is told to come back, with the reason on which clients do."""
    asked, decide = asyncio.Event(), asyncio.Event()

    async def hook(who: Connecting) -> None:
        if who.key == ("late",):
            asked.set()
            await decide.wait()

    async def main() -> None:
        server = make_server(setup(use={"vm": agent_os(on_before_connect=hook)}), port=0, data_dir=tmp_path)
        async with running(server) as client, asyncio.timeout(20):
            url = f"ws://127.0.0.1:{client.base_url.port}"
            late, early = (
                url + gateway_path(ByKey("vm", (key,), create=True), Connect()) for key in ("late", "early")
            )
            async with (
                connect(late, subprotocols=["rivet"], proxy=None) as websocket,
                connect(early, subprotocols=["rivet"], proxy=None) as other,
            ):
                await other.recv()
                await asked.wait()
                if decided != "never":
                    slow = asyncio.create_task(run(client, "echo begun; sleep 1"))
                    await begun(client)
                server.should_exit = True
                with pytest.raises(ConnectionClosed):
                    await other.recv()
                if decided != "never":
                    decide.set()
                with pytest.raises(ConnectionClosed) as closed:
                    await websocket.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.reason == "ws.going_away"
                if decided != "never":
                    assert not slow.done()
                    assert (await slow).status_code == 200
                decide.set()

    asyncio.run(main())


async def begun(client: httpx.AsyncClient) -> None:
    """Until the command of a call in flight runs."""
    target = gateway_path(ByKey("vm", ("k",), create=True), Action("allProcesses"))
    while True:
        running = (await client.post(target, json={"args": []})).json()["output"]
        if any(one["command"] == "sleep" for one in running):
            return


def test_kinds_and_hooks(tmp_path: Path) -> None:
    """Each kind has its own environment, limits and files; hooks see who comes and what boots."""
    told: list[Any] = []

    def guard(who: Connecting) -> None:
        told.append(("connect", who.key, who.params))
        if who.params != {"pass": "word"}:
            raise Unauthorized("no")

    async def booted(what: Booted) -> None:
        told.append(("boot", what.key, what.input))
        await what.vm.exec("echo from the hook > hook")

    registry = setup(
        use={
            "plain": agent_os(env={"KIND": "plain"}, files={"/home/agentos/seed": "seeded\n"}),
            "guarded": agent_os(
                env={"KIND": "guarded"},
                limits=Limits(live_processes=3),
                on_before_connect=guard,
                on_boot=booted,
                on_shutdown=lambda what, reason: told.append(("shutdown", what.key, reason)),
            ),
        }
    )

    async def scene(client: httpx.AsyncClient) -> None:
        plain = await run(client, "echo $KIND; cat seed", name="plain")
        assert plain.json()["output"]["stdout"] == "plain\nseeded\n"
        refused = await run(client, "true", name="guarded")
        assert (refused.status_code, refused.json()["code"]) == (401, "denied")
        headers = {"x-rivet-conn-params": '{"pass":"word"}'}
        welcome = await run(client, "echo $KIND; cat hook", name="guarded", input={"a": 1}, headers=headers)
        assert welcome.json()["output"]["stdout"] == "guarded\nfrom the hook\n"
        url = str(client.base_url).replace("http", "ws").rstrip("/")
        path = gateway_path(ByKey("guarded", ("k",)), Connect())
        offered: Any = ["rivet", "rivet_encoding.json"]
        async with connect(url + path, subprotocols=offered, proxy=None) as websocket:
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.reason == "auth.denied"
        offered.append("rivet_conn_params.%7B%22pass%22%3A%22word%22%7D")
        async with connect(url + path, subprotocols=offered, proxy=None) as websocket:
            assert "Init" in str(await websocket.recv())

    play(registry, tmp_path, scene)
    assert [one[0] for one in told] == ["connect", "connect", "boot", "connect", "connect", "shutdown"]
    # The input belongs to the creation, which the refused call was.
    assert told[2] == ("boot", ("k",), None)
    assert told[-1] == ("shutdown", ("k",), "sleep")


def test_creation_input_reaches_the_hook(tmp_path: Path) -> None:
    """As CBOR, whichever way the actor was made."""
    seen: list[bytes | None] = []
    registry = setup(use={"vm": agent_os(on_boot=lambda what: seen.append(what.input))})

    async def scene(client: httpx.AsyncClient) -> None:
        await run(client, "true", input={"a": 1})

    play(registry, tmp_path, scene)
    assert seen == [b"\xa1aa\x01"]


def test_a_full_host_makes_no_new_vms(tmp_path: Path) -> None:
    """The caller is told which limit it is; a VM that there is goes on."""

    async def first(client: httpx.AsyncClient) -> None:
        assert (await run(client, "true")).status_code == 200

    async def then(client: httpx.AsyncClient) -> None:
        assert (await run(client, "true")).status_code == 200
        refused = await run(client, "true", key=("another",))
        assert refused.status_code == 429
        assert refused.json()["metadata"]["limit"] == "reserve_disk_bytes"

    play(setup(use={"vm": agent_os()}), tmp_path, first)
    play(setup(use={"vm": agent_os()}, reserve_disk_bytes=2**62), tmp_path, then)


def test_an_image_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Is told of when the server starts, and keeps no other kind of VM from being served."""

    async def scene(client: httpx.AsyncClient) -> None:
        (record,) = (one for one in caplog.records if one.levelname == "WARNING")
        assert record.__dict__["image"] == "/no/such/image"
        assert (await run(client, "true")).status_code == 200

    play(setup(use={"odd": agent_os(image="/no/such/image"), "vm": agent_os()}), tmp_path, scene)


def test_a_failing_boot_hook_fails_the_call(tmp_path: Path) -> None:
    """The VM is ended again, and nothing of the failure's text leaves the server."""

    def fail(what: Booted) -> None:
        raise RuntimeError("a secret")

    async def scene(client: httpx.AsyncClient) -> None:
        answer = await run(client, "true")
        assert answer.status_code == 500
        assert answer.json()["code"] == "error"
        assert "secret" not in answer.text
        assert (await client.get("/health")).json()["vms"] == 0

    play(setup(use={"vm": agent_os(on_boot=fail)}), tmp_path, scene)


def test_part_of_another_application(tmp_path: Path) -> None:
    """Mounted under a path, without a lifespan of its own; keys with slashes stay whole. It ends before the other."""
    registry = setup(use={"vm": agent_os()}, data_dir=tmp_path)
    outer = Starlette(routes=[Mount("/agents", app=registry.app)])

    async def main() -> None:
        config = uvicorn.Config(outer, port=0, log_level="error")
        async with running(uvicorn.Server(config)) as client:
            try:
                assert (await client.get("/agents/metadata")).json()["runtime"] == "agentos"
                path = "/agents" + gateway_path(ByKey("vm", ("a/b",), create=True), Action("exec"))
                answer = await client.post(path, json={"args": ["echo mounted"]})
                assert answer.json()["output"]["stdout"] == "mounted\n"
                listed = (await client.get("/agents/actors", params={"name": "vm"})).json()["actors"]
                assert [one["key"] for one in listed] == ["a\\/b"]
                slow = asyncio.create_task(client.delete(f"/agents/actors/{listed[0]['actor_id']}"))
                while (await client.get("/agents/actors", params={"name": "vm"})).json()["actors"]:
                    pass  # its destruction has not begun yet
            finally:
                await registry.app.close()
            # What was asked before is done; who comes now is told to come back.
            assert (await slow).status_code == 200
            asked: list[tuple[str, str, Any]] = [
                ("GET", "/agents/actors", None),
                ("GET", "/agents/actors/x", None),
                ("DELETE", "/agents/actors/x", None),
                ("PUT", "/agents/actors", {"name": "vm", "key": "b"}),
                ("GET", "/agents/metrics", None),
                ("POST", path, {"args": []}),
            ]
            for method, where, body in asked:
                answer = await client.request(method, where, json=body)
                assert (answer.status_code, answer.json()["code"]) == (503, "stopping"), where
            assert (await client.get("/agents/health")).json()["vms"] == 0

    asyncio.run(main())


def test_slow_senders_are_cut_off(tmp_path: Path) -> None:
    """Headers that do not come, and bodies that stop, each with an answer; others are served meanwhile."""
    registry = setup(use={"vm": agent_os()}, header_seconds=0.3, body_idle_seconds=0.3)

    async def scene(client: httpx.AsyncClient) -> None:
        port = client.base_url.port
        begun = "POST /gateway/vm/action/exec?rvt-method=getOrCreate HTTP/1.1\r\nhost: localhost\r\n"
        for sent in ("", "GET /heal", begun, begun + "content-length: 100\r\n\r\n{"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent.encode())
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer.startswith(b"HTTP/1.1 408"), (sent, answer)
            writer.close()
            await writer.wait_closed()
        assert (await client.get("/health")).status_code == 200

    play(registry, tmp_path, scene)


def test_connections_have_a_limit(tmp_path: Path) -> None:
    """The one too many is told so; when one goes, there is room again."""
    registry = setup(use={"vm": agent_os()}, max_connections=1)

    async def scene(client: httpx.AsyncClient) -> None:
        url = str(client.base_url).replace("http", "ws").rstrip("/")
        url += gateway_path(ByKey("vm", create=True), Connect())
        async with connect(url, proxy=None) as first:
            await first.recv()
            async with connect(url, proxy=None) as second:
                with pytest.raises(ConnectionClosed) as closed:
                    await second.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.reason == "limit.exceeded"
        async with asyncio.timeout(5), connect(url, proxy=None) as third:
            await third.recv()

    play(registry, tmp_path, scene)


@pytest.mark.parametrize(
    "make",
    [
        lambda: setup(use={}),
        lambda: setup(use={"vm": object()}),  # type: ignore[dict-item]
        lambda: setup(use={"vm": agent_os()}, token="short").settings(),
        lambda: setup(use={"vm": agent_os()}, nonsense=1).settings(),
        lambda: agent_os(nonsense=1),
        lambda: agent_os(files={"/a": 1}),  # type: ignore[dict-item]
        lambda: agent_os(sleep_after=-1),
        lambda: make_server(setup(use={"vm": agent_os()}), host="0.0.0.0"),
    ],
)
def test_wrong_settings_are_refused_at_once(
    make: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them: an address that others can reach, without a token."""
    monkeypatch.delenv("AGENTOS_TOKEN", raising=False)
    with pytest.raises(InvalidRequest):
        make()
