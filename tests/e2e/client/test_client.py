"""The async client: the verbs of a VM over a network that is allowed to break."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import aiohttp
import pytest

from agentos import create_client
from agentos.client.aio import Agent
from agentos.client.events import ProcessExit, ProcessOutput, ShellData, ShellExit
from agentos.errors import (
    ConnectionLost,
    FileDenied,
    FileMissing,
    InvalidRequest,
    ProcessNotFound,
    ShellNotFound,
    SpawnFailed,
    Unauthorized,
    VmExists,
    VmNotFound,
    WaitTimeout,
)
from agentos.model import ExecResult
from agentos.sync import create_client as create_blocking_client  # type: ignore[attr-defined]


def new_key() -> str:
    """The key of a VM that there is not yet."""
    return f"test-{uuid.uuid4().hex[:8]}"


def with_agent(url: str, work: Callable[[Agent], Any]) -> None:
    """Run `work` with a new VM, which is destroyed after it."""

    async def main() -> None:
        async with create_client(url) as client:
            agent = client.vm.get_or_create(new_key())
            try:
                await work(agent)
            finally:
                await agent.destroy()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_verbs_answer_as_the_embedded_vm_does(url: str) -> None:
    """Same names, same values."""

    async def work(agent: Agent) -> None:
        result = await agent.exec("echo out; echo err >&2; exit 3", env={"A": "b"}, timeout=5)
        assert isinstance(result, ExecResult)
        assert (result.stdout, result.stderr, result.exit_code, result.reason) == (
            "out\n",
            "err\n",
            3,
            "exited",
        )
        assert (await agent.exec("cat", stdin=b"\xff", encoding="bytes")).stdout == b"\xff"
        assert (await agent.exec_file("printf", ["%s", "a b"])).stdout == "a b"
        process = await agent.spawn("sh", ["-c", "cat; echo end >&2; exit 5"])
        await process.write_stdin("hello\n")
        await process.close_stdin()
        chunks = [(chunk.stream, chunk.data) async for chunk in process.output()]
        assert chunks == [("stdout", b"hello\n"), ("stderr", b"end\n")]
        assert (await process.wait(), process.exit_code) == (5, 5)
        assert [one.pid for one in await agent.list_processes()] == [process.pid]
        assert (await agent.get_process(process.pid)).exit_code == 5
        other = await agent.spawn("sleep", ["1000"])
        tree = await agent.process_tree()
        assert [one.process.pid for one in tree] == [other.pid]
        assert [one.command for one in await agent.all_processes()] == ["sleep"]
        await other.kill()
        assert (await other.wait_status()).signal == "SIGKILL"
        shell = await agent.open_shell(cols=101, rows=33)
        await shell.write("stty size; exit 4\n")
        shown = b"".join([chunk.data async for chunk in shell.output()])
        assert b"33 101" in shown
        assert await shell.wait() == 4
        assert (await shell.info()).exit_code == 4

    with_agent(url, work)


def test_files(url: str) -> None:
    """One by one, many at once, and as streams of any size."""

    async def work(agent: Agent) -> None:
        files = agent.files
        await files.write_file("dir/one", "1")
        assert await files.read_file("dir/one") == b"1"
        results = await files.read_files(["dir/one", "no"])
        assert results[0].content == b"1"
        assert isinstance(results[1].error, FileMissing)
        assert [one.name for one in await files.readdir_entries("dir")] == ["one"]
        pieces = [bytes([number]) * 1_000_000 for number in range(10)]
        assert await files.write_file_stream("big", pieces, mode=0o640) == 10_000_000
        assert ((await files.stat("big")).size, (await files.stat("big")).mode) == (10_000_000, 0o640)
        read = b"".join([chunk async for chunk in files.read_file_stream("big", chunk_bytes=1024 * 1024)])
        assert read == b"".join(pieces)
        await agent.exec("ln -s big link")
        assert await files.write_file_stream("link", iter(pieces[:6])) == 6_000_000
        assert (await files.stat("link")).type == "symlink"
        assert ((await files.stat("big")).size, (await files.stat("big")).mode) == (6_000_000, 0o640)

        def broken() -> Any:
            yield from pieces
            raise ValueError("no more")

        with pytest.raises(ValueError, match="no more"):
            await files.write_file_stream("big", broken())
        assert (await files.stat("big")).size == 6_000_000
        left = [one for one in await files.readdir(".") if not one.startswith(".")]
        assert sorted(left) == ["big", "dir", "link"]

    with_agent(url, work)


def test_a_large_file_where_no_other_can_be_made(url: str) -> None:
    """It is overwritten, as a small one is; errors are of the path that was given."""

    async def work(agent: Agent) -> None:
        files, pieces = agent.files, [b"x" * 1_000_000] * 6
        await agent.exec("mkdir d; touch d/f; chmod 555 d")
        assert await files.write_file_stream("d/f", pieces) == 6_000_000
        assert (await files.stat("d/f")).size == 6_000_000
        assert await files.readdir("d") == ["f"]
        for path, wrong, make_parents in (("d/g", FileDenied, True), ("none/g", FileMissing, False)):
            with pytest.raises(wrong) as caught:
                await files.write_file_stream(path, pieces, make_parents=make_parents)
            whole = path if path.startswith("/") else f"/home/agentos/{path}"
            assert caught.value.details["path"] == whole
            assert caught.value.message.endswith(f": {whole}")

    with_agent(url, work)


def test_errors_are_the_same_classes(url: str) -> None:
    """With their details."""

    async def work(agent: Agent) -> None:
        with pytest.raises(ProcessNotFound, match="Process not found: 99"):
            await agent.wait_process(99)
        with pytest.raises(SpawnFailed) as caught:
            await agent.spawn("no-such-program")
        assert caught.value.details["errno"] == 2
        with pytest.raises(InvalidRequest):
            await agent.exec("true", timeout="soon")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest):
            await agent.exec_file("true", 5)  # type: ignore[arg-type]
        process = await agent.spawn("sleep", ["1000"])
        with pytest.raises(WaitTimeout, match=r"process \d+ still runs after 0.05 s"):
            await process.wait(timeout=0.05)

    with_agent(url, work)


def test_keys_and_kinds(url: str) -> None:
    """By key, by parts of a key, with what a query can not carry; made, found and not found."""

    async def main() -> None:
        async with create_client(url) as client:
            key = ["a,b", new_key()]
            agent = client.vm.get_or_create(key)
            await agent.files.write_file("mine", "x")
            assert await client.vm.get(key).files.read_file("mine") == b"x"
            assert await agent.resolve() in [
                one.id for one in await client.list("vm") if one.key == tuple(key)
            ]
            await agent.destroy()
            with pytest.raises(VmNotFound):
                await client.vm.get(key).exec("true")
            made = await client.vm.create(key, input={"seed": 1})
            assert (await made.exec("echo made")).stdout == "made\n"
            with pytest.raises(VmExists):
                await client.vm.create(key)
            await made.destroy()
            with pytest.raises(InvalidRequest):
                create_client("localhost")
        with pytest.raises(ConnectionLost):
            await client.list()

    asyncio.run(main())


def test_output_survives_connections_that_break(url: str, breaking: Any) -> None:
    """Every byte once, in order, however often the connection is cut."""
    lines = 40_000

    async def main() -> None:
        async with breaking.serving(), create_client(breaking.url) as client:
            agent = client.vm.get_or_create(new_key())
            script = f"for i in $(seq {lines}); do echo line $i; (( i % 2000 )) || sleep 0.05; done"
            process = await agent.spawn("bash", ["-c", script])
            got, cuts = hashlib.sha256(), 0

            async def cut() -> None:
                nonlocal cuts
                while True:
                    await asyncio.sleep(0.07)
                    breaking.cut()
                    cuts += 1

            cutting = asyncio.create_task(cut())
            async for chunk in process.output():
                assert not chunk.skipped
                got.update(chunk.data)
            cutting.cancel()
            expected = "".join(f"line {number}\n" for number in range(1, lines + 1))
            assert got.hexdigest() == hashlib.sha256(expected.encode()).hexdigest()
            assert cuts >= 3
            await agent.destroy()

    asyncio.run(main())


def test_a_lossless_stream_that_was_followed_to_its_end_is_let_go(url: str) -> None:
    """The server need not keep it for a reader that might not have got the last answer."""

    async def main() -> None:
        async with create_client(url) as client, aiohttp.ClientSession() as session:

            async def kept() -> float:
                async with session.get(f"{url}/metrics") as answer:
                    text = await answer.text()
                return float(
                    next(
                        one for one in text.splitlines() if one.startswith("agentos_lossless_bytes ")
                    ).split()[1]
                )

            agent = client.vm.get_or_create(new_key())
            size = 1_000_000
            process = await agent.spawn("head", ["-c", str(size), "/dev/zero"], lossless=True)
            await process.wait()
            before = await kept()
            assert before >= size
            assert sum([len(one.data) async for one in process.output()]) == size
            assert await kept() <= before - size
            await agent.destroy()

    asyncio.run(main())


def test_events_survive_connections_that_break(url: str, breaking: Any) -> None:
    """Each byte and each end once, also of processes that began and ended while nobody was connected."""
    lines = 20_000

    async def main() -> None:
        async with breaking.serving(), create_client(breaking.url) as client, create_client(url) as direct:
            key = new_key()
            agent = direct.vm.get_or_create(key)
            await agent.exec("true")
            got: dict[int, bytearray] = {}
            ends: list[int] = []
            gaps: list[Any] = []

            def on_output(event: ProcessOutput) -> None:
                data = got.setdefault(event.pid, bytearray())
                assert event.offset == len(data)
                data += event.data

            async with client.vm.get_or_create(key).connect() as connection:
                connection.on("processOutput", on_output)
                connection.on("processExit", lambda event: ends.append(event.pid))
                connection.on("streamError", gaps.append)
                await connection.exec("true")
                script = f"for i in $(seq {lines}); do echo line $i; (( i % 1000 )) || sleep 0.05; done"
                pids = [(await agent.spawn("bash", ["-c", script])).pid for _ in range(2)]
                for number in range(12):
                    await asyncio.sleep(0.07)
                    breaking.cut()
                    short = await agent.spawn("echo", [str(number)])
                    await short.wait()
                    pids.append(short.pid)
                await until(lambda: set(ends) == set(pids))
                # Anything that came twice would have come by now, as what was asked last is answered last.
                await connection.exec("true")
                expected = "".join(f"line {number}\n" for number in range(1, lines + 1)).encode()
                assert [bytes(got[pid]) for pid in pids[:2]] == [expected] * 2
                assert [bytes(got[pid]) for pid in pids[2:]] == [
                    f"{number}\n".encode() for number in range(12)
                ]
                assert sorted(ends) == sorted(pids)
                assert not gaps
            await agent.destroy()

    asyncio.run(main())


def test_events_of_a_process_that_was_silent_before_a_cut(url: str, breaking: Any) -> None:
    """It began before one that was heard of, and is told of when it speaks."""

    async def main() -> None:
        async with breaking.serving(), create_client(breaking.url) as client, create_client(url) as direct:
            key = new_key()
            agent = direct.vm.get_or_create(key)
            await agent.exec("true")
            got: dict[int, bytes] = {}
            ends: list[int] = []
            async with client.vm.get_or_create(key).connect() as connection:
                connection.on(
                    "processOutput", lambda one: got.update({one.pid: got.get(one.pid, b"") + one.data})
                )
                connection.on("processExit", lambda event: ends.append(event.pid))
                await connection.exec("true")
                silent = await agent.spawn("sh", ["-c", "read line; echo $line"])
                short = await agent.spawn("echo", ["short"])
                await until(lambda: ends == [short.pid])
                breaking.cut()
                assert len(await connection.list_processes()) == 2
                await silent.write_stdin("late\n")
                await until(lambda: ends == [short.pid, silent.pid])
                assert got == {short.pid: b"short\n", silent.pid: b"late\n"}
            await agent.destroy()

    asyncio.run(main())


def test_what_a_restarted_server_has_lost_is_told(start: Callable[..., AbstractContextManager[str]]) -> None:
    """A streamError for each process whose end will never be told."""

    async def follow(url: str, stop: Callable[[], None], restart: Callable[[], str]) -> None:
        async with create_client(url) as client:
            agent = client.vm.get_or_create("one")
            gaps: list[Any] = []
            outputs: list[bytes] = []
            async with agent.connect() as connection:
                connection.on("streamError", gaps.append)
                connection.on("processOutput", lambda event: outputs.append(event.data))
                process = await connection.spawn("sh", ["-c", "echo begun; exec sleep 1000"])
                await until(lambda: outputs == [b"begun\n"])
                await asyncio.to_thread(stop)
                assert await asyncio.to_thread(restart) == url
                await until(lambda: bool(gaps))
                assert [(one.scope, one.id, one.code) for one in gaps] == [
                    ("process", process.pid, "stream.lost")
                ]
                assert (await connection.exec("echo on")).stdout == "on\n"

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        url = first.enter_context(start("agentos.server"))
        port = url.rpartition(":")[2]

        def restart() -> str:
            return stack.enter_context(start("agentos.server", "--port", port))

        asyncio.run(follow(url, first.close, restart))


def test_a_pid_of_another_boot_is_another_process(start: Callable[..., AbstractContextManager[str]]) -> None:
    """A handle from before the VM booted again reaches nothing, though its pid is in use again."""

    async def before(url: str) -> tuple[Any, Any]:
        async with create_client(url) as client:
            agent = client.vm.get_or_create("boots")
            processes = [await agent.spawn("sleep", ["1000"]) for _ in range(8)]
            shell = await agent.open_shell()
            assert (await processes[0].info()).running
            await shell.write("x")
            return {one.pid: one for one in processes}, shell

    async def after(url: str, before: dict[int, Any], old_shell: Any) -> None:
        async with create_client(url) as client:
            agent = client.vm.get_or_create("boots")
            processes = [await agent.spawn("sleep", ["1000"]) for _ in range(8)]
            shell = await agent.open_shell()
            process = next(one for one in processes if one.pid in before)
            old = before[process.pid]
            assert shell.shell_id == old_shell.shell_id
            for handle in (type(old)(agent, **old._same), type(old_shell)(agent, **old_shell._same)):
                known = vars(handle)["_same"]
                missing = ProcessNotFound if "pid" in known else ShellNotFound
                calls = (
                    [handle.info, handle.kill, handle.stop, handle.wait, handle.close_stdin, handle.read_output,
                     lambda one=handle: one.write_stdin("x"), lambda one=handle: one.signal("SIGKILL")]
                    if "pid" in known
                    else [handle.read, handle.wait, handle.close, lambda one=handle: one.write("exit\n"),
                          lambda one=handle: one.resize(10, 10)]
                )  # fmt: skip
                for call in calls:
                    with pytest.raises(missing):
                        await call()
            assert (await process.info()).running
            assert (await shell.info()).running
            # Whoever names a pid alone means the one that has it now.
            assert (await agent.process(old.pid).info()).running

    with start("agentos.server") as url:
        processes, shell = asyncio.run(before(url))
    with start("agentos.server") as url:
        asyncio.run(after(url, processes, shell))


def test_what_is_asked_again(url: str, breaking: Any) -> None:
    """Reads; a spawn or shell, which starts once; input, which comes once. Never an exec: nobody knows if it ran."""

    async def main() -> None:
        async with breaking.serving(), create_client(breaking.url) as client:
            agent = client.vm.get_or_create(new_key())
            await agent.exec("true")
            breaking.lose_answers = 1
            process = await agent.spawn("sh", ["-c", "echo x >> spawned"])
            await process.wait()
            breaking.lose_answers = 2
            assert await agent.files.read_file("spawned") == b"x\n"
            breaking.lose_answers = 1
            with pytest.raises(ConnectionLost):
                await agent.exec("echo x >> executed")
            assert await agent.files.read_file("executed") == b"x\n"
            breaking.lose_answers = 2
            shell = await agent.open_shell("sh", ["-c", "echo x >> opened; exec cat"])
            assert [one.shell_id for one in await agent.list_shells()] == [shell.shell_id]
            await shell.write("\x04")
            assert await shell.wait() == 0
            assert await agent.files.read_file("opened") == b"x\n"
            reader = await agent.spawn("cat")
            for word in ("one ", "two ", "three"):
                breaking.lose_answers = 2
                await reader.write_stdin(word)
            breaking.lose_answers = 1
            await agent.write_process_stdin(reader.pid, "\n")
            await reader.close_stdin()
            assert b"".join([chunk.data async for chunk in reader.output()]) == b"one two three\n"
            await agent.destroy()

    asyncio.run(main())


def test_a_spawn_whose_first_caller_has_gone(url: str) -> None:
    """Who asks again with the same key gets the process, not the first caller's end."""

    async def work(agent: Agent) -> None:
        for number in range(20):
            key = f"again-{number}"
            first = asyncio.create_task(agent.spawn("sleep", ["1000"], idempotency_key=key))
            await asyncio.sleep(0.0005 * number)
            second = asyncio.create_task(agent.spawn("sleep", ["1000"], idempotency_key=key))
            await asyncio.sleep(0.0005 * (number % 3))
            first.cancel()
            process = await second
            assert (await process.info()).running
            assert (await agent.spawn("sleep", ["1000"], idempotency_key=key)).pid == process.pid
        assert len(await agent.list_processes()) == 20

    with_agent(url, work)


@pytest.mark.parametrize("way", ["HTTP", "WebSocket"])
def test_cancelling_ends_what_was_asked(url: str, way: str) -> None:
    """A command whose caller has gone is gone too, with its descendants; the connection goes on."""

    async def work(agent: Agent) -> None:
        async with agent.connect() as connection:
            vm = agent if way == "HTTP" else connection
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await vm.exec("setsid sleep 1000 & sleep 1000")
            async with asyncio.timeout(5):
                while await agent.all_processes():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert (await vm.exec("echo on")).stdout == "on\n"
            process = await vm.spawn("sleep", ["1000"])
            for call in (process.wait(), process.read_output(0, wait=20)):
                task = asyncio.ensure_future(call)
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.wait({task})
            assert (await process.info()).running
            await process.kill()

    with_agent(url, work)


def test_messages_of_every_length(url: str) -> None:
    """On both sides of where a frame's head becomes longer (126 and 65536 bytes), and well beyond."""
    blob = bytes(range(256)) * 300

    async def work(agent: Agent) -> None:
        await agent.files.write_file("blob", blob)
        async with agent.connect() as connection:
            for size in (*range(100, 130), *range(65_510, 65_540), len(blob)):
                assert await connection.files.read_file("blob", length=size) == blob[:size]

    with_agent(url, work)


def test_events(url: str) -> None:
    """Of processes that somebody else starts, to handlers of both kinds, until they are taken off."""

    async def work(agent: Agent) -> None:
        outputs: list[ProcessOutput] = []
        ends: list[ProcessExit] = []
        shells: list[Any] = []

        async def on_exit(event: ProcessExit) -> None:
            await asyncio.sleep(0)
            ends.append(event)
            assert (await connection.exec("echo from a handler")).ok

        async with agent.connect() as connection:
            connection.on("processOutput", outputs.append)
            connection.on("processExit", on_exit)
            connection.on("shellData", shells.append)
            connection.on("shellExit", shells.append)
            process = await agent.spawn("sh", ["-c", "echo event; exit 2"])
            await until(lambda: bool(ends))
            assert [(one.pid, one.stream, one.data) for one in outputs] == [
                (process.pid, "stdout", b"event\n")
            ]
            assert (ends[0].pid, ends[0].exit_code) == (process.pid, 2)
            connection.off("processExit", on_exit)
            connection.off("processOutput")
            shell = await connection.open_shell("/bin/echo", ["in a shell"])
            await until(lambda: any(isinstance(one, ShellExit) for one in shells))
            data = b"".join(one.data for one in shells if isinstance(one, ShellData))
            assert (data, shells[-1].shell_id) == (b"in a shell\r\n", shell.shell_id)
            assert (await connection.exec("echo over a WebSocket")).stdout == "over a WebSocket\n"
            with pytest.raises(ProcessNotFound):
                await connection.get_process(99)
            assert (len(ends), len(outputs)) == (1, 1)
        with pytest.raises(ConnectionLost):
            await connection.exec("true")

    with_agent(url, work)


def test_a_connection_comes_back(url: str, breaking: Any) -> None:
    """With what it had subscribed to; what was in flight fails, a read is asked again."""

    async def main() -> None:
        async with breaking.serving(), create_client(breaking.url) as client, create_client(url) as direct:
            key = new_key()
            agent = direct.vm.get_or_create(key)
            ends: list[int] = []
            async with client.vm.get_or_create(key).connect() as connection:
                connection.on("processExit", lambda event: ends.append(event.exit_code))
                sleeping = await connection.spawn("sleep", ["1000"])
                waiting = asyncio.create_task(sleeping.wait())
                executing = asyncio.create_task(connection.exec("sleep 1000"))
                await asyncio.sleep(0.1)
                breaking.cut()
                with pytest.raises(ConnectionLost):
                    await executing
                assert (await connection.exec("echo again")).stdout == "again\n"
                await sleeping.kill()
                assert await waiting == 137
                await agent.spawn("sh", ["-c", "exit 9"])
                await until(lambda: 9 in ends)
                await agent.destroy()
                await until(lambda: connection.error is not None)
                assert isinstance(connection.error, VmNotFound)

    asyncio.run(main())


def test_tokens(start: Callable[..., AbstractContextManager[str]]) -> None:
    """On HTTP and on the WebSocket."""

    async def main(url: str) -> None:
        async with create_client(url) as nobody:
            with pytest.raises(Unauthorized):
                await nobody.vm.get_or_create("one").exec("true")
            with pytest.raises(Unauthorized):
                async with nobody.vm.get_or_create("one").connect():
                    pass
            with pytest.raises(Unauthorized):
                await nobody.list()
        async with create_client(url, token="a-long-token") as client:
            agent = client.vm.get_or_create("one")
            async with agent.connect() as connection:
                assert (await connection.exec("echo in")).stdout == "in\n"
            assert [one.key for one in await client.list()] == [("one",)]

    with start("agentos.server", "--token", "a-long-token") as url:
        asyncio.run(main(url))


def test_through_a_proxy(url: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests and WebSockets go through the proxy that the environment names; one that refuses is said to."""

    async def main() -> None:
        async with proxy.serving():
            for name in ("https_proxy", "all_proxy", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
                monkeypatch.delenv(name.upper(), raising=False)
            monkeypatch.setenv("http_proxy", proxy.url)
            async with create_client(url) as client:
                agent = client.vm.get_or_create(new_key())
                assert (await agent.exec("echo asked")).stdout == "asked\n"
                outputs: list[Any] = []
                async with agent.connect() as connection:
                    connection.on("processOutput", outputs.append)
                    assert (await connection.exec("echo in a tunnel")).stdout == "in a tunnel\n"
                    await connection.spawn("echo", ["told"])
                    await until(lambda: bool(outputs))
                target = url.removeprefix("http://")
                assert proxy.asked[0].startswith(f"POST http://{target}/gateway/")
                assert proxy.asked[-1] == f"CONNECT {target} HTTP/1.1"
                assert proxy.credentials == {"basic dxnlcjpzzwnyzxq="}
                await agent.destroy()
                proxy.refuses = True
                with pytest.raises(ConnectionLost, match="403 Forbidden"):
                    async with agent.connect():
                        pass
        async with create_client(url) as client:
            with pytest.raises(ConnectionLost, match=r"the proxy .*: connection refused"):
                async with client.vm.get_or_create(new_key()).connect():
                    pass

    asyncio.run(main())


def test_nobody_there() -> None:
    """Said at once: a server that never answered is not waited for."""

    async def main() -> None:
        async with create_client("http://127.0.0.1:9") as client:
            async with asyncio.timeout(2):
                with pytest.raises(ConnectionLost, match="nobody answers at") as caught:
                    await client.vm.get("x").list_processes()
                assert "agentos serve" in caught.value.details["remedy"]
                with pytest.raises(ConnectionLost):
                    async with client.vm.get("x").connect():
                        pass

    asyncio.run(main())


def test_the_blocking_client(url: str) -> None:
    """The same without an event loop."""
    with create_blocking_client(url) as client:
        agent = client.vm.get_or_create(new_key())
        assert agent.exec("echo hi").stdout == "hi\n"
        process = agent.spawn("sh", ["-c", "cat; exit 3"])
        process.write_stdin("in")
        process.close_stdin()
        assert [chunk.data for chunk in process.output()] == [b"in"]
        assert process.wait() == 3
        assert agent.files.write_file_stream("f", (b"x" for _ in range(5))) == 5
        assert b"".join(agent.files.read_file_stream("f")) == b"xxxxx"
        events: list[Any] = []
        with agent.connect() as connection:
            connection.on("processExit", events.append)
            other = connection.spawn("true")
            assert other.wait() == 0
            asyncio.run(until(lambda: other.pid in [one.pid for one in events]))
        with pytest.raises(ProcessNotFound):
            agent.wait_process(99)
        agent.destroy()
