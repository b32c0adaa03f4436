"""The log of output: cursors, gaps, bounds, waiting readers."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable

import pytest

from agentos.machine.output import OutputLog
from agentos.model import OutputChunk


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine function to its end, within some seconds."""

    async def limited() -> None:
        async with asyncio.timeout(10):
            await scenario()

    asyncio.run(limited())


def test_what_was_written_is_read() -> None:
    """Streams keep their order of arrival, and each its own offsets."""
    log = OutputLog(1000)
    log.append("stdout", b"one")
    log.append("stderr", b"two!")
    log.append("stdout", b"three")
    page = log.read()
    assert page.events == (
        OutputChunk("stdout", b"one", 0),
        OutputChunk("stderr", b"two!", 0),
        OutputChunk("stdout", b"three", 3),
    )
    assert (page.cursor, page.truncated, page.skipped, page.exited) == (12, False, 0, False)


def test_a_cursor_continues() -> None:
    """Also from the middle of what was one write."""
    log = OutputLog(1000)
    log.append("stdout", b"abcdef")
    first = log.read(0, max_bytes=2)
    assert first.events == (OutputChunk("stdout", b"ab", 0),)
    second = log.read(first.cursor)
    assert second.events == (OutputChunk("stdout", b"cdef", 2),)
    assert log.read(second.cursor).events == ()


def test_a_page_is_bounded() -> None:
    """It may end within a write, and the cursor says where."""
    log = OutputLog(10_000)
    for data in (b"aaa", b"bbb"):
        log.append("stdout", data)
        log.append("stderr", b"-")
    page = log.read(0, max_bytes=5)
    assert b"".join(one.data for one in page.events) == b"aaa-b"
    assert page.cursor == 5


def test_the_end_is_told_with_the_last_byte() -> None:
    """`exited` only where nothing follows."""
    log = OutputLog(1000)
    log.append("stdout", b"abc")
    log.finish()
    assert not log.read(0, max_bytes=2).exited
    assert log.read(2).exited
    assert log.read(3).exited
    assert log.read(99).exited


def test_a_reader_that_fell_behind_is_told_by_how_much() -> None:
    """The first chunk after the gap and the page both say it, and nothing is invented."""
    log = OutputLog(10_000)
    for number in range(100):
        log.append("stdout", bytes([number]) * 4096)
    page = log.read(0)
    assert page.truncated
    assert page.skipped == log.start > 0
    assert page.events[0].skipped == log.start
    assert page.events[0].offset == log.start
    assert page.events[0].data[:1] == bytes([log.start // 4096])
    assert [one.skipped for one in page.events[1:]] == [0] * (len(page.events) - 1)
    assert not log.read(page.cursor).truncated


def test_one_write_larger_than_the_bound_is_kept_whole() -> None:
    """The newest block always is: a page has something to give."""
    log = OutputLog(100)
    log.append("stdout", b"x" * 5000)
    assert log.read().skipped == 0
    log.append("stdout", b"y")
    assert (log.read().skipped, log.read().events[0].data) == (5000, b"y")


def test_bytes_written_one_by_one_cost_what_bytes_cost() -> None:
    """Small writes of one stream are gathered: almost the whole bound is output."""
    log = OutputLog(100_000)
    for _ in range(200_000):
        log.append("stdout", b"x")
    assert 90_000 <= log.end - log.start <= 100_000


def test_waiting_readers_all_wake() -> None:
    """Any number of them, each with its own cursor."""

    async def scenario() -> None:
        log = OutputLog(1000)
        log.append("stdout", b"abc")
        waiters = [asyncio.create_task(log.read_wait(cursor, 100, 5)) for cursor in (3, 3, 3)]
        await asyncio.sleep(0)
        log.append("stderr", b"d")
        for page in await asyncio.gather(*waiters):
            assert page.events == (OutputChunk("stderr", b"d", 0),)

    run(scenario)


def test_a_wait_ends_with_the_output() -> None:
    """finish() wakes who waits for more."""

    async def scenario() -> None:
        log = OutputLog(1000)
        waiter = asyncio.create_task(log.read_wait(0, 100, 5))
        await asyncio.sleep(0)
        log.finish()
        page = await waiter
        assert (page.events, page.exited) == ((), True)

    run(scenario)


def test_a_wait_that_ran_out_gives_an_empty_page() -> None:
    """No error: the cursor stays."""

    async def scenario() -> None:
        page = await OutputLog(1000).read_wait(0, 100, 0.01)
        assert (page.events, page.cursor, page.exited) == ((), 0, False)

    run(scenario)


def test_a_cancelled_reader_is_forgotten() -> None:
    """It leaves nothing in the log, and the others wait on."""

    async def scenario() -> None:
        log = OutputLog(1000)
        gone = asyncio.create_task(log.wait(0))
        stays = asyncio.create_task(log.wait(0))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert len(log._waiters) == 1
        log.append("stdout", b"x")
        await stays
        assert not log._waiters

    run(scenario)


def test_following_ends_with_the_output() -> None:
    """Chunks as they come, then StopAsyncIteration."""

    async def scenario() -> None:
        log = OutputLog(1000)
        seen: list[bytes] = []

        async def follow() -> None:
            async for chunk in log.follow():
                seen.append(chunk.data)

        follower = asyncio.create_task(follow())
        for data in (b"a", b"b"):
            await asyncio.sleep(0)
            log.append("stdout", data)
        await asyncio.sleep(0)
        log.finish()
        await follower
        assert b"".join(seen) == b"ab"

    run(scenario)


def test_one_piece_beyond_the_bound_is_cut() -> None:
    """Of it the newest bytes are kept, and what is missing is counted, whatever came before and after."""
    log = OutputLog(8 * 1024)
    whole = bytes(range(256)) * 100
    log.append("stdout", b"before")
    log.append("stderr", b"too")
    log.append("stdout", whole)
    assert log.retained_bytes <= log.max_bytes
    page = log.read(0, 100_000)
    (chunk,) = page.events
    assert whole.endswith(chunk.data)
    assert len(chunk.data) >= 7 * 1024
    assert (page.skipped, page.cursor) == (len(b"beforetoo" + whole) - len(chunk.data), log.end)
    assert chunk.skipped == page.skipped
    assert chunk.offset + len(chunk.data) == len(b"before" + whole)
    log.append("stdout", b"after")
    page = log.read(page.cursor)
    assert [(one.data, one.offset, one.skipped) for one in page.events] == [
        (b"after", len(b"before" + whole), 0)
    ]
    first = OutputLog(8 * 1024)
    first.append("stdout", whole)
    page = first.read(0, 100_000)
    assert len(page.events) == 1
    assert page.skipped + len(page.events[0].data) == page.cursor == len(whole)
    kept = OutputLog(8 * 1024, lossless=True)
    kept.append("stdout", whole)
    assert b"".join(one.data for one in kept.read(0, 100_000).events) == whole


def test_what_is_dropped_is_let_go_of_at_once() -> None:
    """However large the pieces are: the bound is one of memory."""
    tracemalloc.start()
    try:
        log = OutputLog(1_000_000)
        for _ in range(50):
            log.append("stdout", bytes(100_000))
            assert tracemalloc.get_traced_memory()[0] < 1_300_000
    finally:
        tracemalloc.stop()


def test_a_lossless_log_says_when_it_is_full() -> None:
    """Full is what nobody has read; asking for what follows makes room and says so.

    What was answered may have been lost on its way, and is asked for again.
    """
    log = OutputLog(10, lossless=True)
    made_room: list[bool] = []
    log.on_room = lambda: made_room.append(log.full)
    log.append("stdout", b"x" * 10)
    assert not log.has_room()
    log.read(0, max_bytes=1)
    assert log.full
    assert made_room == []
    log.read(1, max_bytes=1)
    assert not log.full
    assert made_room == [False]


def test_a_lossless_log_drops_only_what_was_read() -> None:
    """However far over its bound it is."""
    log = OutputLog(100, lossless=True)
    for _ in range(10):
        log.append("stdout", b"x" * 50)
        log.append("stderr", b"y" * 50)
    assert log.start == 0
    log.read(0, max_bytes=500)
    log.append("stdout", b"z")
    assert log.start == 0
    log.read(500, max_bytes=500)
    log.append("stdout", b"z")
    assert 0 < log.start <= 500
    assert not log.read(500).truncated


def test_a_lossless_log_waits_for_the_slowest_that_is_attached() -> None:
    """Until that one has read, or gone; whoever asks for pages does not read for it."""
    log = OutputLog(100, lossless=True)
    room: list[int] = []
    log.on_room = lambda: room.append(log.end)
    quick, slow = log.attach(0), log.attach(0)
    log.append("stdout", b"x" * 100)
    quick.advance(log.peek(0, 100).cursor)
    assert log.read(100).cursor == 100
    assert not log.has_room()
    slow.advance(50)
    assert not log.full
    assert room == [100]
    log.append("stdout", b"y" * 60)
    assert not log.has_room()
    slow.detach()
    assert not log.full
    assert room == [100, 160]


def test_who_reads_nothing_and_goes_leaves_a_lossless_log_as_it_was() -> None:
    """What was read by all stays read, and the next reader gets the rest."""
    log = OutputLog(10, lossless=True)
    reader = log.attach(0)
    log.append("stdout", b"x" * 10)
    reader.advance(10)
    reader.detach()
    log.append("stdout", b"y" * 10)
    assert log.full
    page = log.read(10)
    assert b"".join(chunk.data for chunk in page.events) == b"y" * 10
    log.read(page.cursor)
    assert not log.full


def test_what_is_released_is_a_gap() -> None:
    """A log that lets go of all it has says so to who had not read it, and takes what still comes."""
    log = OutputLog(1 << 20)
    log.append("stdout", b"x" * 5000)
    log.release()
    assert log.retained_bytes == 0
    log.append("stderr", b"last")
    log.finish()
    page = log.read(0)
    assert (page.truncated, page.skipped, page.exited) == (True, 5000, True)
    assert [(one.stream, one.data, one.offset) for one in page.events] == [("stderr", b"last", 0)]


def test_a_lossless_log_keeps_what_nobody_has_read() -> None:
    """Releasing it has an effect only when all of it was read."""
    log = OutputLog(1 << 20, lossless=True)
    log.append("stdout", b"unread")
    log.release()
    page = log.read(0)
    assert [one.data for one in page.events] == [b"unread"]
    log.read(page.cursor)
    log.release()
    assert log.retained_bytes == 0


def test_what_has_arrived_since_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found within a block of gathered writes too, to a second, and never behind the moment; the bound holds."""
    now = 1000.0
    monkeypatch.setattr("agentos.machine.output.time.time", lambda: now)
    log = OutputLog(20_000)
    for second in range(100):
        now = 1000.0 + second
        log.append("stdout", b"line\n")
    assert log.position_since(0) == 0
    assert log.position_since(1050.5) == 50 * 5
    assert log.position_since(1050) == 50 * 5
    assert log.position_since(1098.9) == 98 * 5
    assert log.position_since(1200) == log.end
    now = 1300.0
    log.append("stderr", b"x" * 5000)
    assert log.position_since(1200) == 500
    for second in range(1000):
        now = 2000.0 + second
        log.append("stdout", b"line\n")
    assert log.retained_bytes <= log.max_bytes
    assert log.start > 500
    assert log.position_since(0) == log.start
    assert log.position_since(2900.5) == log.end - 100 * 5
    assert log.retained_bytes == sum(block.cost for block in log._blocks[log._first :])
    log.release()
    assert log.position_since(0) == log.end
