"""Output of spawned processes: nothing lost, reordered or invented, whoever reads it and however slowly."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from e2e_support import Transcript, peak_rss_bytes, reset_peak

from agentos import VM, Limits

MIB = 1024 * 1024
GIB = 1024 * MIB


def test_a_late_reader_gets_everything(in_vm: Any) -> None:
    """Cursor 0 begins with the first byte, long after it was written and after the process has ended."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "echo first; echo second >&2; echo third"])
        await process.wait()
        for _ in range(2):
            assert sorted((await Transcript(process).to_end()).split()) == [b"first", b"second", b"third"]
        page = await vm.read_process_output(process.pid)
        assert page.exited
        assert (await vm.read_process_output(process.pid, page.cursor)).events == ()

    in_vm(body)


def test_offsets_are_continuous_in_each_stream(in_vm: Any) -> None:
    """Every chunk begins where the last one of its stream ended, and no byte is of the other stream."""

    async def body(vm: VM) -> None:
        script = "for i in $(seq 3000); do echo out$i; echo err$i >&2; done"
        process = await vm.spawn("bash", ["-c", script])
        data = {"stdout": b"", "stderr": b""}
        async for chunk in process.output():
            assert chunk.offset == len(data[chunk.stream])
            assert chunk.skipped == 0
            data[chunk.stream] += chunk.data
        assert data["stdout"] == b"".join(b"out%d\n" % i for i in range(1, 3001))
        assert data["stderr"] == b"".join(b"err%d\n" % i for i in range(1, 3001))

    in_vm(body)


def test_streams_keep_the_order_of_arrival(in_vm: Any) -> None:
    """What was written to stdout before something came on stderr comes first, where time lies between."""

    async def body(vm: VM) -> None:
        script = "for i in 1 2 3; do echo out$i; sleep 0.1; echo err$i >&2; sleep 0.1; done"
        process = await vm.spawn("sh", ["-c", script])
        assert await Transcript(process).to_end() == b"out1\nerr1\nout2\nerr2\nout3\nerr3\n"

    in_vm(body)


def test_a_reader_continues_where_it_was(in_vm: Any) -> None:
    """Pages of a few bytes, asked for one after another by cursor, make the whole."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("seq", ["1000"])
        await process.wait()
        cursor, data = 0, b""
        while True:
            page = await process.read_output(cursor, max_bytes=7)
            assert sum(len(event.data) for event in page.events) <= 7
            data += b"".join(event.data for event in page.events)
            cursor = page.cursor
            if page.exited:
                break
        assert data == b"".join(b"%d\n" % i for i in range(1, 1001))

    in_vm(body)


def test_waiting_for_output_ends_with_output_time_or_the_end(in_vm: Any) -> None:
    """read_output(wait=) returns on the first byte, empty when its time is over, and at once at the end."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("cat")
        page = await process.read_output(0, wait=0.05)
        assert (page.events, page.exited, page.cursor) == ((), False, 0)
        reading = asyncio.create_task(process.read_output(0, wait=30))
        await process.write_stdin("x")
        assert (await reading).events[0].data == b"x"
        reading = asyncio.create_task(process.read_output(1, wait=30))
        await process.close_stdin()
        assert (await reading).exited

    in_vm(body)


def test_a_burst_stays_within_the_bound_and_says_what_it_dropped(in_vm: Any) -> None:
    """Of 1 GiB, a slow reader gets a part and the exact number of bytes that it missed; memory stays bounded."""

    async def body(vm: VM) -> None:
        await vm.exec("true")
        reset_peak()
        before = peak_rss_bytes()
        process = await vm.spawn("head", ["-c", str(GIB), "/dev/zero"])
        received = skipped = 0
        async for chunk in process.output():
            assert chunk.offset == received + skipped + chunk.skipped
            received += len(chunk.data)
            skipped += chunk.skipped
            await asyncio.sleep(0.01)  # the reader is slow: that is what this test is about
        assert received + skipped == GIB
        assert skipped > 0
        assert await process.wait() == 0
        assert peak_rss_bytes() - before < 12 * MIB

    in_vm(body, limits=Limits(log_bytes=4 * MIB), limit=55)


def test_a_burst_of_tiny_writes_stays_within_the_bound(in_vm: Any) -> None:
    """Single bytes that alternate between the streams cost no more than the bound either."""

    async def body(vm: VM) -> None:
        script = "import os\nfor i in range(150000): os.write(1 + i % 2, b'x')"
        await vm.exec("true")
        reset_peak()
        before = peak_rss_bytes()
        process = await vm.spawn("python3", ["-c", script])
        await process.wait()
        assert process.log.end == 150_000
        assert peak_rss_bytes() - before < 16 * MIB
        transcript = Transcript(process)
        await transcript.to_end()
        assert len(transcript.data) + transcript.skipped == 150_000

    in_vm(body, limits=Limits(log_bytes=1 * MIB))


def test_the_log_keeps_the_newest(in_vm: Any) -> None:
    """What a full log holds is the end of the output, as many bytes as its bound allows."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "seq 200000"])
        await process.wait()
        page = await process.read_output(0, max_bytes=10 * MIB)
        whole = b"".join(b"%d\n" % i for i in range(1, 200_001))
        kept = b"".join(event.data for event in page.events)
        assert page.truncated
        assert whole.endswith(kept)
        assert len(kept) + page.skipped == len(whole)
        assert 100_000 < len(kept) <= 256 * 1024

    in_vm(body, limits=Limits(log_bytes=256 * 1024))


def test_lossless_delivers_every_byte_to_a_slow_reader(in_vm: Any) -> None:
    """200 MB through a log of 1 MB: the process waits for the reader, and the checksum is right."""

    async def body(vm: VM) -> None:
        script = (
            "import sys, hashlib\n"
            "h = hashlib.sha256()\n"
            "for i in range(2000):\n"
            "    block = (b'%d,' % i * 50000)[:100000]\n"
            "    h.update(block); sys.stdout.buffer.write(block)\n"
            "sys.stdout.flush(); print(h.hexdigest(), file=sys.stderr)\n"
        )
        process = await vm.spawn("python3", ["-c", script], lossless=True)
        digest, total, told, count = hashlib.sha256(), 0, b"", 0
        async for chunk in process.output():
            assert chunk.skipped == 0
            if chunk.stream == "stdout":
                assert chunk.offset == total
                digest.update(chunk.data)
                total += len(chunk.data)
                count += 1
                if count % 100 == 0:
                    await asyncio.sleep(0.02)  # the reader is slow: that is what this test is about
                    assert process.log.end - process.log.start < 3 * MIB
            else:
                told += chunk.data
        assert total == 200_000_000
        assert told.decode().strip() == digest.hexdigest()
        assert await process.wait() == 0

    in_vm(body, limits=Limits(log_bytes=1 * MIB))


def test_lossless_stops_the_process_until_somebody_reads(in_vm: Any) -> None:
    """Without a reader it writes what log and pipe hold and then waits; a kill still ends it."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("yes", lossless=True)
        while not process.log.full:
            await process.log.wait(process.log.end)
        await vm.exec("true")
        assert process.running
        assert process.log.end < 2 * 256 * 1024 + 2 * 65536
        await process.kill()
        assert await process.wait() == 137

    in_vm(body, limits=Limits(log_bytes=256 * 1024))


def test_a_slow_reader_holds_nobody_up(in_vm: Any) -> None:
    """A reader that reads nothing delays neither the process nor another reader, who misses nothing."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("sh", ["-c", "read go; seq 100000"])
        stuck = process.output()
        reader = asyncio.create_task(Transcript(process).to_end())
        await process.write_stdin("go\n")
        assert await reader == b"".join(b"%d\n" % i for i in range(1, 100_001))
        assert (await anext(stuck)).offset == 0
        await stuck.aclose()  # type: ignore[attr-defined]

    in_vm(body)


def test_the_end_never_comes_before_the_output(in_vm: Any) -> None:
    """Two hundred times, when a process is known to have ended its last byte is in the log."""

    async def body(vm: VM) -> None:
        for number in range(200):
            process = await vm.spawn("printf", [f"{number}%s", "x" * 3000])
            await process.wait()
            page = await process.read_output()
            assert b"".join(event.data for event in page.events) == b"%d" % number + b"x" * 3000
            assert page.exited

    in_vm(body)


def test_a_background_child_of_a_spawned_process_goes_on(in_vm: Any) -> None:
    """It may write to the stdout that it inherited after its parent's end, and is not killed of it."""

    async def body(vm: VM) -> None:
        await vm.exec("mkfifo go result")
        child = "(read x < go; head -c 1000000 /dev/zero && echo alive > result) & echo left"
        process = await vm.spawn("sh", ["-c", child])
        assert await process.wait() == 0
        assert await Transcript(process).to_end() == b"left\n"
        assert (await vm.exec("echo x > go; cat result", timeout=20)).stdout == "alive\n"

    in_vm(body)


def test_fifty_at_once(in_vm: Any) -> None:
    """Fifty processes that write at once each have their own log."""

    async def body(vm: VM) -> None:
        spawned = await asyncio.gather(
            *(vm.spawn("sh", ["-c", f"for i in 1 2 3; do echo {n}; done"]) for n in range(50))
        )
        outputs = await asyncio.gather(*(Transcript(one).to_end() for one in spawned))
        assert outputs == [b"%d\n" % n * 3 for n in range(50)]
        assert len({one.pid for one in spawned}) == 50

    in_vm(body)


def test_the_output_of_exited_processes_has_a_bound_together(in_vm: Any) -> None:
    """Of many that have exited, the newest can be replayed; of the oldest the record stays, and the gap is told."""
    each = 1024 * 1024

    async def body(vm: VM) -> None:
        processes = []
        for _ in range(6):
            process = await vm.spawn("head", ["-c", str(each), "/dev/zero"])
            assert await process.wait() == 0
            processes.append(process)
        assert sum(one.log.retained_bytes for one in processes) < 4 * each
        oldest = await vm.read_process_output(processes[0].pid, cursor=0)
        assert (oldest.truncated, oldest.skipped, oldest.exited) == (True, each, True)
        newest = [one.data async for one in processes[-1].output()]
        assert sum(map(len, newest)) == each

    in_vm(body, limits=Limits(exited_log_bytes=2 * each))


def test_what_lossless_processes_leave_has_a_bound(in_vm: Any) -> None:
    """Read to the end by pages, nobody asks beyond that: all of it came, and it is not kept for ever.

    Where more is unread than lossless_bytes, the processes wait for their readers and nothing is lost.
    """
    each = 1024 * 1024

    async def read(process: Any) -> int:
        cursor = size = 0
        while True:
            page = await process.read_output(cursor, wait=10)
            assert not page.truncated
            size += sum(len(one.data) for one in page.events)
            cursor = page.cursor
            if page.exited:
                return size

    async def body(vm: VM) -> None:
        processes = []
        for _ in range(10):
            process = await vm.spawn("head", ["-c", str(each), "/dev/zero"], lossless=True)
            await process.wait()
            assert await read(process) == each
            processes.append(process)
        together = [await vm.spawn("head", ["-c", str(each), "/dev/zero"], lossless=True) for _ in range(10)]
        assert await asyncio.gather(*map(read, together)) == [each] * 10
        kept = sum(one.log.retained_bytes for one in (*processes, *together))
        # Each may have 64 KiB unread, and what its pipe held when it exited.
        assert kept < 2 * 2 * each + 20 * 2 * 64 * 1024
        followed = []
        for _ in range(10):
            process = await vm.spawn("head", ["-c", str(each), "/dev/zero"], lossless=True)
            assert sum([len(one.data) async for one in process.output()]) == each
            followed.append(process)
        assert sum(one.log.retained_bytes for one in followed) <= 2 * each

    in_vm(body, limits=Limits(exited_log_bytes=2 * each, lossless_bytes=2 * each), limit=60)
