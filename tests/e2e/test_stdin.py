"""stdin of spawned processes: accepted in order, back-pressured, closed when asked, a clear error when nobody reads."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from e2e_support import Transcript, still_works

from agentos import VM, Limits, Process
from agentos.errors import StdinClosed

MIB = 1024 * 1024


def test_text_and_bytes_arrive_in_order(in_vm: Any) -> None:
    """Writes of either kind, from several tasks too, arrive whole; end of file comes after the last byte."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("cat")
        await process.write_stdin("grüße ")
        await process.write_stdin(b"\x00\xff")
        await vm.write_process_stdin(process.pid, b" end")
        await vm.close_process_stdin(process.pid)
        assert await Transcript(process).to_end() == "grüße ".encode() + b"\x00\xff end"
        assert await process.wait() == 0
        process = await vm.spawn("cat")
        await asyncio.gather(*(process.write_stdin(f"{n}\n" * 1000) for n in range(20)))
        await process.close_stdin()
        lines = (await Transcript(process).to_end()).split()
        assert lines == [b"%d" % n for n in range(20) for _ in range(1000)]

    in_vm(body)


def test_stdin_stays_open_until_it_is_closed(in_vm: Any) -> None:
    """A program that waits for input goes on waiting, and gets it as soon as it is written."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "while read x; do echo got $x; done; echo over"])
        transcript = Transcript(process)
        for word in ("one", "two", "three"):
            await process.write_stdin(word + "\n")
            await transcript.until(b"got " + word.encode() + b"\n")
        await process.close_stdin()
        await transcript.until(b"over\n")

    in_vm(body)


def test_much_more_than_a_pipe_holds(in_vm: Any) -> None:
    """100 MB through stdin arrive unchanged."""

    async def body(vm: VM) -> None:
        block = bytes(range(256)) * 4096
        process = await vm.spawn("sha256sum")
        digest = hashlib.sha256()
        for _ in range(100):
            await process.write_stdin(block)
            digest.update(block)
        await process.close_stdin()
        assert (await Transcript(process).to_end()).split()[0] == digest.hexdigest().encode()

    in_vm(body)


def test_a_process_that_does_not_read_makes_the_writer_wait(in_vm: Any) -> None:
    """What is accepted and not taken is bounded; the writer goes on when the process reads."""

    async def body(vm: VM) -> None:
        await vm.exec("mkfifo /tmp/go")
        process = await vm.spawn("sh", ["-c", "head -c 1; read nothing_more < /tmp/go; cat | wc -c"])
        accepted = 0

        async def write_much() -> None:
            nonlocal accepted
            for _ in range(64):
                await process.write_stdin(b"x" * 65536)
                accepted += 65536

        writing = asyncio.create_task(write_much())
        await Transcript(process).until(b"x")
        await vm.exec("true")
        assert not writing.done()
        assert accepted <= 256 * 1024 + 3 * 65536
        await vm.exec("echo go > /tmp/go")
        await writing
        await process.close_stdin()
        total = (await Transcript(process, cursor=1).to_end()).split()[-1]
        assert 64 * 65536 - 65536 <= int(total) < 64 * 65536  # head may have read ahead

    in_vm(body, limits=Limits(stdin_bytes=256 * 1024))


async def write_on(process: Process) -> None:
    """Write until nobody can read it."""
    while True:
        await process.write_stdin("x")


def test_writing_to_closed_stdin_is_a_clear_error(in_vm: Any) -> None:
    """StdinClosed, which is a BrokenPipeError, names the pid, whoever closed: the caller, the process, its end."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sleep", ["1000"])
        await process.close_stdin()
        await process.close_stdin()
        with pytest.raises(StdinClosed) as caught:
            await process.write_stdin("x")
        assert caught.value.details == {"pid": process.pid}
        await process.kill()

        process = await vm.spawn("sh", ["-c", "exec 0<&-; echo closed; sleep 1000"])
        await Transcript(process).until(b"closed\n")
        with pytest.raises(BrokenPipeError):
            await write_on(process)  # whoever started it may hold the pipe for a moment longer
        with pytest.raises(StdinClosed):
            await process.write_stdin("x")
        await process.close_stdin()
        await process.kill()

        process = await vm.spawn("true")
        await process.wait()
        with pytest.raises(StdinClosed) as caught:
            await vm.write_process_stdin(process.pid, "x")
        assert caught.value.code == "process.stdin_closed"
        await process.close_stdin()
        await still_works(vm)

    in_vm(body)


def test_writers_that_wait_are_told_when_the_process_ends(in_vm: Any) -> None:
    """A kill releases every waiting writer with StdinClosed."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sleep", ["1000"])
        writes = [asyncio.create_task(process.write_stdin(b"x" * 300_000)) for _ in range(5)]
        await vm.exec("true")
        assert not writes[-1].done()
        await process.kill()
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
        assert isinstance(outcomes[-1], StdinClosed)
        assert all(one is None or isinstance(one, StdinClosed) for one in outcomes)

    in_vm(body, limits=Limits(stdin_bytes=256 * 1024))


def test_a_cancelled_writer_leaves_the_others_in_order(in_vm: Any) -> None:
    """Cancelling one that waits neither writes its bytes nor keeps those behind it from theirs."""

    async def body(vm: VM) -> None:
        await vm.exec("mkfifo /tmp/go")
        process = await vm.spawn("sh", ["-c", "read go < /tmp/go; tr -d a"])
        await process.write_stdin(b"a" * 300_000)
        waiting = [asyncio.create_task(process.write_stdin(one * 200_000)) for one in (b"b", b"c")]
        await vm.exec("true")
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        await vm.exec("echo > /tmp/go")
        await waiting[1]
        await process.close_stdin()
        assert await Transcript(process).to_end() == b"c" * 200_000

    in_vm(body, limits=Limits(stdin_bytes=256 * 1024))


def test_a_write_with_a_key_is_written_once(in_vm: Any) -> None:
    """Also when it is repeated while the first waits, after the first was cancelled, and after the end."""

    async def body(vm: VM) -> None:
        await vm.exec("mkfifo /tmp/go")
        process = await vm.spawn("sh", ["-c", "read go </tmp/go; tr -d x"])
        await process.write_stdin(b"x" * 300_000)
        first = asyncio.create_task(process.write_stdin(b"1" * 300_000, idempotency_key="one"))
        second = asyncio.create_task(process.write_stdin(b"2" * 300_000, idempotency_key="two"))
        await asyncio.sleep(0)
        assert not first.done()
        first.cancel()
        again = [
            asyncio.create_task(process.write_stdin(b"2" * 300_000, idempotency_key="two")),
            asyncio.create_task(vm.write_process_stdin(process.pid, b"1" * 300_000, idempotency_key="one")),
        ]
        await asyncio.sleep(0)
        await vm.exec("echo go >/tmp/go")
        await asyncio.gather(second, *again)
        assert first.cancelled()
        await process.close_stdin()
        written = b"".join([chunk.data async for chunk in process.output()])
        assert written == b"2" * 300_000 + b"1" * 300_000

        reader = await vm.spawn("cat")
        for key in ("a", "a", "b", "a", "b"):
            await reader.write_stdin(key, idempotency_key=key)
        await reader.close_stdin()
        assert await reader.wait() == 0
        await reader.write_stdin("a", idempotency_key="a")
        with pytest.raises(StdinClosed):
            await reader.write_stdin("c", idempotency_key="c")
        assert (await reader.read_output()).events[0].data == b"ab"

    in_vm(body, limits=Limits(stdin_bytes=256 * 1024))
