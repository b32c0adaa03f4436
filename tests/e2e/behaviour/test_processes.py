"""Spawned processes: stdin, output by cursors, waiting, stopping, and the table of all that runs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from typing import Any

from surfaces import Surface, fails


def test_stdin_arrives_in_order_and_ends(on: Any) -> None:
    """Text and bytes, more than a pipe holds; after the end, writing is an error and closing is none."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("sha256sum", [])
        block, digest = os.urandom(500_000), hashlib.sha256()
        for piece in (b"\x00\xff", "größe\n".encode(), block, block):
            await vm.write_process_stdin(process.pid, piece)
            digest.update(piece)
        await vm.close_process_stdin(process.pid)
        assert (await vm.output(process.pid)).split()[0] == digest.hexdigest().encode()
        assert await vm.wait_process(process.pid) == 0
        await vm.close_process_stdin(process.pid)
        with fails("process.stdin_closed") as error:
            await vm.write_process_stdin(process.pid, "x")
        assert error.details["pid"] == process.pid

    on(body)


def test_a_writer_waits_for_a_process_that_does_not_read(on: Any) -> None:
    """What is accepted is bounded by stdin_bytes; a kill tells whoever waits."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("sleep", ["1000"])
        writes = [
            asyncio.ensure_future(vm.write_process_stdin(process.pid, b"x" * 100_000)) for _ in range(4)
        ]
        await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
        await vm.exec("true")
        assert not all(one.done() for one in writes)
        await vm.kill_process(process.pid)
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
        assert {getattr(one, "code", None) for one in outcomes} == {None, "process.stdin_closed"}

    on(body, kind="small")


def test_output_is_read_by_cursors(on: Any) -> None:
    """From any position, in pages of any size, as often as wanted, also after the end."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("sh", ["-c", "seq 200; echo wrong >&2"])
        await vm.wait_process(process.pid)
        expected = b"".join(b"%d\n" % number for number in range(1, 201))
        cursor, got = 0, {"stdout": b"", "stderr": b""}
        while True:
            page = await vm.read_process_output(process.pid, cursor=cursor, max_bytes=50)
            assert sum(len(one.data) for one in page.events) <= 50
            for one in page.events:
                assert one.offset == len(got[one.stream])
                got[one.stream] += one.data
            cursor = page.cursor
            if page.exited:
                break
        assert got == {"stdout": expected, "stderr": b"wrong\n"}
        again = await vm.read_process_output(process.pid, cursor=100)
        assert b"".join(one.data for one in again.events) == (expected + b"wrong\n")[100:]
        assert (again.truncated, again.exited) == (False, True)

    on(body)


def test_a_read_waits_for_output_its_time_or_the_end(on: Any) -> None:
    """And no longer."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("cat", [])
        page = await vm.read_process_output(process.pid, cursor=0)
        assert (page.events, page.cursor, page.exited) == ((), 0, False)
        began = time.monotonic()
        page = await vm.read_process_output(process.pid, cursor=0, wait=0.2)
        assert (page.events, page.exited) == ((), False)
        assert time.monotonic() - began >= 0.2
        reading = asyncio.ensure_future(vm.read_process_output(process.pid, cursor=0, wait=20))
        await vm.write_process_stdin(process.pid, "x")
        page = await reading
        assert [one.data for one in page.events] == [b"x"]
        reading = asyncio.ensure_future(vm.read_process_output(process.pid, cursor=page.cursor, wait=20))
        await vm.close_process_stdin(process.pid)
        assert (await reading).exited

    on(body)


def test_a_gap_is_explicit(on: Any) -> None:
    """A log keeps its newest bytes; a reader of the oldest is told exactly how many are gone."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("head", ["-c", "1000000", "/dev/zero"])
        await vm.wait_process(process.pid)
        page = await vm.read_process_output(process.pid, cursor=0)
        assert page.truncated
        kept = await vm.output(process.pid, page.cursor)
        assert page.skipped + sum(len(one.data) for one in page.events) + len(kept) == 1_000_000
        assert page.events[0].skipped == page.skipped
        assert page.events[0].offset == page.skipped

    on(body, kind="small")


def test_lossless_waits_for_its_reader(on: Any) -> None:
    """Ten times what the log holds, and not a byte is missing."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("head", ["-c", "700000", "/dev/zero"], lossless=True)
        chunks = await vm.chunks(process.pid)
        assert sum(len(one.data) for one in chunks) == 700_000
        assert not any(one.skipped for one in chunks)

    on(body, kind="small")


def test_any_number_may_wait(on: Any) -> None:
    """Before the end and after it; a time limit ends the waiting, not the process."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("sh", ["-c", "read line; exit 42"])
        with fails("process.wait_timeout") as error:
            await vm.wait_process(process.pid, timeout=0.1)
        assert error.details["pid"] == process.pid
        assert (await vm.get_process(process.pid)).running
        waits = [asyncio.ensure_future(vm.wait_process(process.pid)) for _ in range(10)]
        await vm.write_process_stdin(process.pid, "go\n")
        assert await asyncio.gather(*waits) == [42] * 10
        assert await vm.wait_process(process.pid, timeout=0) == 42

    on(body)


def test_the_list_has_what_was_spawned_oldest_first(on: Any) -> None:
    """Running and exited, with all fields; an exec is not in it."""

    async def body(vm: Surface) -> None:
        before = time.time()
        first = await vm.spawn("sh", ["-c", "exit 5"])
        await vm.wait_process(first.pid)
        second = await vm.spawn("sleep", ["1000"])
        await vm.exec("true")
        one, two = await vm.list_processes()
        assert (one.pid, one.command, one.args) == (first.pid, "sh", ("-c", "exit 5"))
        assert (one.running, one.exit_code, one.signal, one.reason) == (False, 5, None, "exited")
        assert before - 60 < one.start_time <= one.exit_time < time.time() + 60
        assert (two.pid, two.command, two.args) == (second.pid, "sleep", ("1000",))
        assert one.usage.cpu_ms > 0
        assert one.usage.max_rss_bytes > 0
        assert (two.running, two.exit_code, two.reason, two.exit_time) == (True, None, None, None)
        assert two.usage is None
        assert await vm.get_process(second.pid) == two

    on(body)


def test_stop_kill_and_signal(on: Any) -> None:
    """SIGTERM that can be ignored, SIGKILL that cannot and takes all descendants, any other; none after the end."""

    async def body(vm: Surface) -> None:
        script = "trap 'echo asked' TERM; setsid sleep 1000 & echo ready; while :; do sleep 0.01; done"
        stubborn = await vm.spawn("bash", ["-c", script])
        await vm.until(stubborn.pid, b"ready")
        await vm.stop_process(stubborn.pid)
        await vm.until(stubborn.pid, b"asked")
        assert (await vm.get_process(stubborn.pid)).running
        await vm.kill_process(stubborn.pid)
        assert await vm.wait_process(stubborn.pid) == 137
        assert await vm.alive() == []
        gone = await vm.get_process(stubborn.pid)
        assert (gone.running, gone.exit_code, gone.signal, gone.reason) == (False, 137, "SIGKILL", "signaled")

        for signal, line in (("SIGUSR1", b"usr1"), (12, b"usr2")):
            traps = "trap 'echo usr1; exit 7' USR1; trap 'echo usr2; exit 7' USR2"
            script = f"{traps}; echo ready; while :; do sleep 0.01; done"
            process = await vm.spawn("bash", ["-c", script])
            await vm.until(process.pid, b"ready")
            await vm.signal_process(process.pid, signal)
            assert await vm.wait_process(process.pid) == 7
            assert line in await vm.output(process.pid)
            for late in (vm.stop_process, vm.kill_process, lambda pid: vm.signal_process(pid, "SIGINT")):
                await late(process.pid)
        with fails("request.invalid", "signal"):
            await vm.signal_process(process.pid, "SIGNOTHING")

    on(body)


def test_stop_may_insist(on: Any) -> None:
    """killAfter: who still runs then is killed with all that it started."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn(
            "sh", ["-c", "trap '' TERM; echo ready; sleep 1000 & sleep 1001; sleep 1002"]
        )
        await vm.until(process.pid, b"ready")
        await vm.stop_process(process.pid, kill_after=0.1)
        assert await vm.wait_process(process.pid) == 137
        assert await vm.alive() == []

    on(body)


def test_a_spawned_process_may_have_a_time_limit(on: Any) -> None:
    """With the reason in what there is to know of it."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("sh", ["-c", "echo begun; sleep 1000"], timeout=0.3)
        assert await vm.wait_process(process.pid) == 137
        assert (await vm.get_process(process.pid)).reason == "timeout"
        assert await vm.output(process.pid) == b"begun\n"

    on(body)


def test_an_idempotency_key_starts_one_process(on: Any) -> None:
    """However often it is asked."""

    async def body(vm: Surface) -> None:
        calls = [
            vm.spawn("sh", ["-c", "echo x >> marks; sleep 1000"], idempotency_key="once") for _ in range(5)
        ]
        pids = {one.pid for one in await asyncio.gather(*calls)}
        assert len(pids) == 1
        assert len(await vm.list_processes()) == 1

    on(body)


def test_an_idempotency_key_is_for_one_request(on: Any) -> None:
    """Asked for anything else, it is refused by its name, and nothing is started; the same call finds its process."""

    async def body(vm: Surface) -> None:
        asked: dict[str, Any] = {"args": ["-c", "echo x >> marks; exec cat"], "env": {"A": "1", "B": "2"}}
        process = await vm.spawn("sh", **asked, idempotency_key="once")
        for other in (
            {"args": ["-c", "echo y >> marks"]}, {"args": []}, {"env": {"A": "1"}}, {"env": {"A": "2", "B": "1"}},
            {"cwd": "/tmp"}, {"user": "root"}, {"timeout": 5}, {"lossless": True},
        ):  # fmt: skip
            with fails("request.invalid", "^idempotency_?[kK]ey: .*not used for another request.*'once'"):
                await vm.spawn("sh", **{**asked, **other}, idempotency_key="once")
        with fails("request.invalid", "another request"):
            await vm.spawn("bash", **asked, idempotency_key="once")
        turned = {**asked, "env": {"B": "2", "A": "1"}}
        assert (await vm.spawn("sh", **turned, idempotency_key="once")).pid == process.pid
        assert len(await vm.list_processes()) == 1

        await vm.write_process_stdin(process.pid, "one\n", idempotency_key="line")
        with fails("request.invalid", "another request"):
            await vm.write_process_stdin(process.pid, "two\n", idempotency_key="line")
        await vm.write_process_stdin(process.pid, b"one\n", idempotency_key="line")
        await vm.close_process_stdin(process.pid)
        assert await vm.output(process.pid) == b"one\n"
        with fails("request.invalid", "another request"):  # also when there is nobody to write to any more
            await vm.write_process_stdin(process.pid, "two\n", idempotency_key="line")
        assert (await vm.exec("cat marks")).stdout == "x\n"

    on(body)


def test_where_and_as_whom_a_process_runs(on: Any) -> None:
    """The options of exec, for spawn."""

    async def body(vm: Surface) -> None:
        line = "pwd; id -u; echo $COLOR"
        process = await vm.spawn("sh", ["-c", line], cwd="/tmp", user="root", env={"COLOR": "blue"})
        assert await vm.output(process.pid) == b"/tmp\n0\nblue\n"

    on(body)


def test_all_processes_are_those_that_ps_shows(on: Any) -> None:
    """On every runtime, whoever started them, with driver, parent, user and directory; without the VM's own init."""

    async def body(vm: Surface) -> None:
        ready = "print(1, flush=True); import time; time.sleep(1000)"
        script = f"cd /tmp; python3 -c '{ready}' & node -e 'console.log(2); setTimeout(() => 0, 1e7)' & wait"
        top = await vm.spawn("sh", ["-c", script])
        root = await vm.spawn("sleep", ["1000"], user="root")
        await vm.until(top.pid, b"1\n.*2\n|2\n.*1\n")
        table = {one.pid: one for one in await vm.all_processes()}
        drivers = {one.driver: one for one in table.values() if one.ppid == top.pid}
        assert set(drivers) == {"python", "node"}
        python = drivers["python"]
        assert (python.user, python.cwd, python.managed) == ("agentos", "/tmp", False)
        assert (python.status, python.exit_code, python.exit_time) == ("running", None, None)
        assert python.args[-1] == ready
        assert python.pgid == python.sid == top.pid
        assert python.rss_bytes > 1_000_000
        assert python.threads >= 1
        assert table[top.pid].managed
        if os.geteuid() == 0:  # an ordinary user's VM may have one id: its root is root in name only
            assert table[root.pid].user == "root"
        # a user's ps shows that user's
        for user in ("agentos", "root"):
            shown = (await vm.exec("ps -eo pid=", user=user)).stdout.split()
            assert {str(pid) for pid, one in table.items() if one.user == user} <= set(shown)
        assert "1" not in [str(pid) for pid in table]
        forest = {node.process.pid: node for node in await vm.process_tree()}
        assert set(forest) == {top.pid, root.pid}
        assert {node.process.driver for node in forest[top.pid].children} == {"python", "node"}

    on(body)


def test_limits_have_names(on: Any) -> None:
    """One process more than may live is refused with the limit's name; the oldest exited ones are forgotten."""

    async def body(vm: Surface) -> None:
        running = [await vm.spawn("sleep", ["1000"]) for _ in range(4)]
        with fails("limit.exceeded", "live_processes") as error:
            await vm.spawn("sleep", ["1000"])
        assert (error.details["limit"], error.details["maximum"]) == ("live_processes", 4)
        for one in running:
            await vm.kill_process(one.pid)
            await vm.wait_process(one.pid)
        with fails("process.not_found"):
            await vm.get_process(running[0].pid)
        assert len(await vm.list_processes()) == 3

    on(body, kind="small")
