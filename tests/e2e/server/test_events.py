"""Events: nothing lost, each connection at its own pace, the end after the last output."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from agentos.wire.encodings import BARE
from agentos.wire.messages import (
    ActionRequest,
    ActionResponse,
    Error,
    Event,
    Init,
    SubscriptionRequest,
    ToClient,
)

MIB = 1024 * 1024


class Caller:
    """The client's side of one connection, bare-handed."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self._next_id = 0

    async def send(self, name: str, *args: Any) -> int:
        """Call an action, and do not wait for it."""
        self._next_id += 1
        await self.websocket.send(BARE.encode_frame(ActionRequest(self._next_id, name, args)))
        return self._next_id

    async def subscribe(self, *names: str) -> None:
        """Ask for events; when this returns, the server has heard it."""
        for name in names:
            await self.websocket.send(BARE.encode_frame(SubscriptionRequest(name, True)))
        await self.call("exists", "/")

    async def receive(self) -> ToClient:
        """The next message."""
        return BARE.decode_to_client(await asyncio.wait_for(self.websocket.recv(), 30))

    async def call(self, name: str, *args: Any) -> Any:
        """Call an action; events that come meanwhile are dropped."""
        wanted = await self.send(name, *args)
        while True:
            message = await self.receive()
            if isinstance(message, ActionResponse) and message.id == wanted:
                return message.output
            assert isinstance(message, Event), message

    async def event(self, *names: str) -> tuple[str, dict[str, Any]]:
        """The next event of one of these names."""
        while True:
            message = await self.receive()
            if isinstance(message, Event) and message.name in names:
                return message.name, message.args[0]


@contextlib.asynccontextmanager
async def connected(server: Any, key: str, **more: Any) -> AsyncIterator[Caller]:
    """An open connection."""
    protocols: Any = ["rivet", "rivet_encoding.bare"]
    async with connect(
        server.socket_url(key), subprotocols=protocols, max_size=None, compression=None, proxy=None, **more
    ) as websocket:
        caller = Caller(websocket)
        assert isinstance(await caller.receive(), Init)
        yield caller


async def post(server: Any, key: str, action: str, *args: Any) -> Any:
    """An action over HTTP, while the loop goes on."""
    return await asyncio.to_thread(server.call, key, action, *args)


async def collect(caller: Caller, pid: int) -> tuple[bytes, int, int]:
    """Output of a process to its end, bytes passed over, exit code. Offsets are checked."""
    data, skipped = bytearray(), 0
    while True:
        name, payload = await caller.event("processOutput", "processExit", "streamError")
        if name == "streamError":
            assert (payload["scope"], payload["id"], payload["code"]) == ("process", pid, "stream.gap")
            skipped += payload["skipped"]
        elif payload["pid"] == pid and name == "processOutput":
            assert payload["offset"] == len(data) + skipped
            data += payload["data"]
        elif payload["pid"] == pid:
            return bytes(data), skipped, payload["exitCode"]


def test_a_late_subscriber_gets_the_first_byte(server: Any) -> None:
    """Even of a process that has ended: the order connect, on, spawn over HTTP is never a race."""

    async def scene() -> None:
        pid = (await post(server, "late", "spawn", "echo", ["first"]))["pid"]
        await post(server, "late", "waitProcess", pid)
        async with connected(server, "late") as caller:
            for name in ("processExit", "processOutput"):
                await caller.websocket.send(BARE.encode_frame(SubscriptionRequest(name, True)))
            assert await collect(caller, pid) == (b"first\n", 0, 0)

    asyncio.run(scene())


def test_only_what_was_asked_for_comes(server: Any) -> None:
    """No events without a subscription, and none after its end."""

    async def scene() -> None:
        async with connected(server, "asked") as caller:
            await caller.send("exec", "true")
            assert isinstance(await caller.receive(), ActionResponse)
            pid = (await caller.call("spawn", "echo", ["x"]))["pid"]
            await caller.send("waitProcess", pid)
            assert isinstance(await caller.receive(), ActionResponse)
            await caller.subscribe("processExit")
            await caller.send("spawn", "echo", ["x"])
            messages = [await caller.receive() for _ in range(2)]
            assert {type(one) for one in messages} <= {ActionResponse, Event}
            assert [one.name for one in messages if isinstance(one, Event)] in (
                [],
                ["processExit"],
                ["processExit"] * 2,
            )

    asyncio.run(scene())


def test_many_connections_get_every_byte(server: Any) -> None:
    """Twenty subscribers of one process that writes more than its log holds: all have the same bytes."""

    async def scene() -> None:
        async with contextlib.AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(connected(server, "many")) for _ in range(20)]
            for caller in callers:
                await caller.subscribe("processOutput", "processExit", "streamError")
            pid = (await post(server, "many", "spawn", "head", ["-c", str(3 * MIB), "/dev/urandom"]))["pid"]
            results = await asyncio.gather(*(collect(one, pid) for one in callers))
        assert {(len(data), skipped, code) for data, skipped, code in results} == {(3 * MIB, 0, 0)}
        assert len({hashlib.sha256(data).digest() for data, _, _ in results}) == 1

    asyncio.run(scene())


def test_a_stalled_subscriber_delays_nobody_and_is_told(server: Any) -> None:
    """It reads nothing while 64 MiB pass; the process ends, others read on, and it gets the newest and the gap."""

    async def scene() -> None:
        async with (
            connected(server, "stalled", max_queue=1) as stalled,
            connected(server, "stalled") as quick,
        ):
            for caller in (stalled, quick):
                await caller.subscribe("processOutput", "processExit", "streamError")
            began = time.monotonic()
            pid = (await quick.call("spawn", "head", ["-c", str(64 * MIB), "/dev/zero"]))["pid"]
            data, skipped, code = await collect(quick, pid)
            assert (len(data) + skipped, code) == (64 * MIB, 0)
            assert time.monotonic() - began < 20
            late, missed, code = await collect(stalled, pid)
            assert (len(late) + missed, code) == (64 * MIB, 0)
            assert missed > 32 * MIB

    asyncio.run(scene())


def test_a_lossless_process_waits_for_its_slowest_subscriber(server: Any) -> None:
    """Every byte to both, though one reads nothing for a while; when that one goes, nobody waits for it."""

    async def scene() -> None:
        size = 24 * MIB
        async with connected(server, "waits", max_queue=1) as slow, connected(server, "waits") as quick:
            for caller in (slow, quick):
                await caller.subscribe("processOutput", "processExit", "streamError")
            options = {"lossless": True}
            pid = (await post(server, "waits", "spawn", "head", ["-c", str(size), "/dev/zero"], options))[
                "pid"
            ]
            data, reading = bytearray(), asyncio.create_task(collect(quick, pid))
            done, _ = await asyncio.wait({reading}, timeout=0.5)
            assert not done
            data, skipped, code = await collect(slow, pid)
            assert (len(data), skipped, code) == (size, 0, 0)
            data, skipped, code = await reading
            assert (len(data), skipped, code) == (size, 0, 0)
            pid = (await post(server, "waits", "spawn", "head", ["-c", str(size), "/dev/zero"], options))[
                "pid"
            ]
            reading = asyncio.create_task(collect(quick, pid))
            slow.websocket.transport.abort()
            data, skipped, code = await reading
            assert (len(data), skipped, code) == (size, 0, 0)

    asyncio.run(scene())


def test_positions_are_for_those_who_ask(server: Any) -> None:
    """Every other client gets the fields it always got."""

    async def scene() -> None:
        async with connected(server, "fields") as plain, connected(server, "fields") as asking:
            answer = await asking.call("resumeEvents", {})
            assert (answer["after"], answer["positions"]) == (0, [])
            for caller in (plain, asking):
                for name in ("processOutput", "processExit"):
                    await caller.websocket.send(BARE.encode_frame(SubscriptionRequest(name, True)))
                await asyncio.sleep(0)
            pid = (await post(server, "fields", "spawn", "echo", ["x"]))["pid"]
            names = ("processOutput", "processExit")
            output = {"pid": pid, "stream": "stdout", "data": b"x\n", "offset": 0}
            exit = {"pid": pid, "exitCode": 0, "signal": None, "reason": "exited"}
            assert [(await plain.event(*names))[1] for _ in range(2)] == [output, exit]
            assert [(await asking.event(*names))[1] for _ in range(2)] == [
                {**output, "serial": 1, "cursor": 2},
                {**exit, "serial": 1},
            ]
            wrong = await asking.send("resumeEvents", {"epoch": 1})
            refused = await asking.receive()
            assert isinstance(refused, Error)
            assert (refused.action_id, refused.group, refused.code) == (wrong, "request", "invalid")
            assert (await asking.call("exec", "echo on"))["stdout"] == "on\n"

    asyncio.run(scene())


def test_dead_subscribers_hurt_nobody(server: Any) -> None:
    """Connections that are cut in the middle of a stream."""

    async def scene() -> None:
        for _ in range(10):
            async with connected(server, "cut") as caller:
                await caller.subscribe("processOutput")
                await caller.send("spawn", "timeout", ["5", "yes"])
                await caller.event("processOutput")
                caller.websocket.transport.abort()
        assert (await post(server, "cut", "exec", "echo alive"))["stdout"] == "alive\n"

    asyncio.run(scene())


def test_life_of_the_vm(server: Any) -> None:
    """vmBooted with the first action, vmShutdown at the end, and the connection is closed."""

    async def scene() -> None:
        async with connected(server, "life") as caller:
            for name in ("vmBooted", "vmShutdown"):
                await caller.websocket.send(BARE.encode_frame(SubscriptionRequest(name, True)))
            await caller.send("exec", "true")
            assert (await caller.event("vmBooted"))[1] == {}
            await post(server, "life", "destroy")
            assert (await caller.event("vmShutdown"))[1] == {"reason": "destroy"}
            await asyncio.wait_for(caller.websocket.wait_closed(), 10)
            assert caller.websocket.close_code == 1000

    asyncio.run(scene())


def test_shell_events(server: Any) -> None:
    """All that the terminal showed, then its end."""

    async def scene() -> None:
        async with connected(server, "shell") as caller:
            await caller.subscribe("shellData", "shellExit")
            shell_id = (await caller.call("openShell", {"command": "echo", "args": ["on a terminal"]}))[
                "shellId"
            ]
            async with connected(server, "shell") as second:
                for name in ("shellData", "shellExit"):
                    await second.websocket.send(BARE.encode_frame(SubscriptionRequest(name, True)))
                screen = b""
                while True:
                    name, payload = await second.event("shellData", "shellExit")
                    assert payload["shellId"] == shell_id
                    if name == "shellExit":
                        break
                    assert payload["offset"] == len(screen)
                    screen += payload["data"]
                assert screen == b"on a terminal\r\n"

    asyncio.run(scene())


def test_an_action_that_is_cancelled(server: Any) -> None:
    """It fails with a code that says so, its command ends; an unknown id and nonsense change nothing."""

    async def scene() -> None:
        async with connected(server, "cancel") as caller:
            sleeping = await caller.send("exec", "sleep 1000")
            await asyncio.sleep(0.1)
            cancelling = await caller.send("cancelAction", sleeping)
            answers = [await caller.receive(), await caller.receive()]
            assert ActionResponse(cancelling, None) in answers
            (failed,) = [one for one in answers if isinstance(one, Error)]
            assert (failed.action_id, failed.group, failed.code) == (sleeping, "request", "cancelled")
            while await caller.call("allProcesses"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert await caller.call("cancelAction", 12345) is None
            assert await caller.call("cancelAction", sleeping) is None
            for args in ((), ("1",), (True,), (1, 2)):
                number = await caller.send("cancelAction", *args)
                refused = await caller.receive()
                assert isinstance(refused, Error)
                assert (refused.action_id, refused.code) == (number, "invalid")

    asyncio.run(scene())


def test_destroy_over_a_connection_is_answered(server: Any) -> None:
    """Before the connection is closed, as is all that was told of its processes."""

    async def scene() -> None:
        async with connected(server, "self") as caller:
            await caller.subscribe("processExit", "vmShutdown")
            pid = (await caller.call("spawn", "sleep", ["1000"]))["pid"]
            wanted = await caller.send("destroy")
            seen = []
            while True:
                message = await caller.receive()
                seen.append(message.name if isinstance(message, Event) else message)
                if message == ActionResponse(wanted, None):
                    break
            await asyncio.wait_for(caller.websocket.wait_closed(), 10)
            assert pid
            assert caller.websocket.close_code == 1000
            assert {"vmShutdown"} <= {one for one in seen if isinstance(one, str)}

    asyncio.run(scene())
