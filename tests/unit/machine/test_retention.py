"""The bounds that logs share: what goes first, what is waited for, and how long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agentos.machine.output import OutputLog
from agentos.machine.retention import LEAST_UNREAD_BYTES, Retention

KIB = 1024
LOG_BYTES = 1024 * KIB


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """On an event loop: what nobody reads is waited for with a timer."""

    async def main() -> None:
        await asyncio.wait_for(scenario(), 10)

    asyncio.run(main())


def ended(retention: Retention, size: int, *, lossless: bool = False) -> OutputLog:
    """The log of a process that wrote so much, and has exited."""
    log = OutputLog(LOG_BYTES, lossless=lossless, retention=retention)
    log.append("stdout", b"x" * size)
    log.finish()
    return log


def read_all(log: OutputLog) -> int:
    """Read by pages to the one that says `exited`, and ask no further. How much that was."""
    cursor = size = 0
    while True:
        page = log.read(cursor)
        assert not page.truncated
        size += sum(len(one.data) for one in page.events)
        cursor = page.cursor
        if page.exited:
            return size


def test_what_goes_first_was_there_longest() -> None:
    """Of many that have exited, the newest stay; what has gone is a gap of known size."""

    async def scenario() -> None:
        retention = Retention(100 * KIB, LOG_BYTES)
        logs = [ended(retention, 40 * KIB) for _ in range(5)]
        assert [log.start for log in logs] == [40 * KIB] * 3 + [0] * 2
        assert retention.kept.replayed == sum(log.retained_bytes for log in logs) <= 100 * KIB
        page = logs[0].read(0)
        assert (page.truncated, page.skipped, page.exited) == (True, 40 * KIB, True)

    run(scenario)


def test_the_newest_stays_however_large() -> None:
    """Somebody may be about to read it."""

    async def scenario() -> None:
        retention = Retention(KIB, LOG_BYTES)
        for _ in range(3):
            log = ended(retention, 40 * KIB)
            assert read_all(log) == 40 * KIB
        assert retention.kept.replayed == log.retained_bytes

    run(scenario)


def test_lossless_output_that_was_not_read_does_not_go() -> None:
    """Others that have exited go instead; once it is read, it is as any other."""

    async def scenario() -> None:
        retention = Retention(100 * KIB, LOG_BYTES)
        unread = ended(retention, 90 * KIB, lossless=True)
        others = [ended(retention, 40 * KIB) for _ in range(5)]
        assert retention.kept.unread == 90 * KIB
        assert read_all(unread) == 90 * KIB
        assert retention.kept[:2] == (0, 90 * KIB), "the answer may have been lost"
        assert read_all(unread) == 90 * KIB
        unread.read(unread.end)
        assert retention.kept[:2] == (0, 0)
        assert retention.kept.replayed == sum(one.retained_bytes for one in [unread, *others]) <= 100 * KIB

    run(scenario)


@pytest.mark.parametrize("read", [False, True])
def test_nobody_is_waited_for_without_end(monkeypatch: pytest.MonkeyPatch, read: bool) -> None:
    """Neither for a first reader, nor for one that has got the end to ask again; much shorter for that one."""
    monkeypatch.setattr("agentos.machine.output.RETRY_SECONDS", 0.1)
    monkeypatch.setattr("agentos.machine.output.LATE_SECONDS", 0.5)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        retention = Retention(100 * KIB, LOG_BYTES)
        logs = [ended(retention, 90 * KIB, lossless=True) for _ in range(3)]
        assert retention.kept.unread == 270 * KIB
        if read:
            for log in logs:
                read_all(log)
        while any(retention.kept[:2]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (loop.time() - began < 0.45) is read
        assert retention.kept.replayed <= 100 * KIB
        assert [log.start for log in logs] == [90 * KIB] * 2 + [0]
        assert read_all(logs[2]) == 90 * KIB

    run(scenario)


def test_where_much_is_unread_lossless_processes_wait_with_little() -> None:
    """Each has the least however much the others have; who reads goes on; nothing is lost."""

    async def scenario() -> None:
        everywhere = Retention(LOG_BYTES, 500 * KIB)
        retentions = [Retention(LOG_BYTES, 10 * LOG_BYTES, everywhere) for _ in range(2)]
        greedy = OutputLog(LOG_BYTES, lossless=True, retention=retentions[0])
        modest = OutputLog(LOG_BYTES, lossless=True, retention=retentions[1])
        room: list[OutputLog] = []
        modest.on_room = lambda: room.append(modest)
        while greedy.has_room():
            greedy.append("stdout", b"x" * 16 * KIB)
        assert 500 * KIB <= everywhere.kept.unread < LOG_BYTES
        while modest.has_room():
            modest.append("stdout", b"y" * 16 * KIB)
        assert LEAST_UNREAD_BYTES <= modest.unread_bytes < LEAST_UNREAD_BYTES + 17 * KIB
        page = modest.read(0)
        assert room == []
        modest.read(page.cursor)
        assert room == [modest]
        assert modest.has_room()
        greedy.finish()
        assert read_all(greedy) == greedy.end
        greedy.read(greedy.end)
        for _ in range(20):
            assert modest.has_room()
            modest.append("stdout", b"y" * 16 * KIB)

    run(scenario)


def test_what_was_handed_out_makes_room_for_what_is_unread() -> None:
    """The oldest of it first; nobody waits because of what its reader has, if the answer arrived."""

    async def scenario() -> None:
        retention = Retention(100 * KIB, 300 * KIB)
        logs = [ended(retention, 90 * KIB, lossless=True) for _ in range(3)]
        for log in logs[:2]:
            read_all(log)
        assert retention.kept[:2] == (90 * KIB, 180 * KIB)
        running = OutputLog(LOG_BYTES, lossless=True, retention=retention)
        while running.end < 200 * KIB:
            assert running.has_room()
            running.append("stdout", b"x" * 10 * KIB)
        assert retention.kept.handed_out == 0
        # Of the two that were given up, there is room for the newer one.
        assert [log.start for log in logs] == [90 * KIB, 0, 0]
        assert read_all(logs[2]) == 90 * KIB
        assert logs[0].read(0).skipped == 90 * KIB

    run(scenario)


def test_who_waits_with_little_goes_on_when_others_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody reads from it: its reader may wait for its end."""
    monkeypatch.setattr("agentos.machine.output.LATE_SECONDS", 0.1)

    async def scenario() -> None:
        everywhere = Retention(LOG_BYTES, 300 * KIB)
        abandoned = ended(Retention(LOG_BYTES, LOG_BYTES, everywhere), 300 * KIB, lossless=True)
        waiting = OutputLog(LOG_BYTES, lossless=True, retention=Retention(LOG_BYTES, LOG_BYTES, everywhere))
        room = asyncio.Event()
        waiting.on_room = room.set
        waiting.append("stdout", b"x" * 100 * KIB)
        assert not waiting.has_room()
        await room.wait()
        assert waiting.has_room()
        assert read_all(abandoned) == 300 * KIB, "nothing else needed its room"

    run(scenario)


def test_many_small_parts_count_with_what_they_cost() -> None:
    """Two streams byte by byte do not make a lossless log outgrow its bound."""

    async def scenario() -> None:
        log = OutputLog(64 * KIB, lossless=True, retention=Retention(KIB, LOG_BYTES))
        while log.has_room():
            log.append("stdout", b"x")
            log.append("stderr", b"y")
        assert log.retained_bytes < 65 * KIB
        assert read_all_running(log) == log.end

    run(scenario)


def read_all_running(log: OutputLog) -> int:
    """All that there is now."""
    return sum(len(one.data) for one in log.read(0).events)


def test_what_is_forgotten_and_vms_that_end_count_no_more() -> None:
    """Neither here nor among all VMs."""

    async def scenario() -> None:
        everywhere = Retention(LOG_BYTES, LOG_BYTES)
        one, other = (Retention(LOG_BYTES, LOG_BYTES, everywhere) for _ in range(2))
        logs = [
            ended(part, 10 * KIB, lossless=lossless) for part in (one, other) for lossless in (True, False)
        ]
        assert everywhere.kept.unread == one.kept.unread + other.kept.unread == 20 * KIB
        assert everywhere.kept.replayed == one.kept.replayed + other.kept.replayed > 20 * KIB
        for log in logs[:2]:
            one.forget(log)
        assert one.kept == (0, 0, 0)
        assert everywhere.kept == other.kept
        other.close()
        assert everywhere.kept == (0, 0, 0)
        assert read_all(logs[2]) == 10 * KIB, "who holds it may read on"
        logs[2].read(logs[2].end)
        assert everywhere.kept == (0, 0, 0)

    run(scenario)


def test_over_all_vms_the_oldest_goes_first_too() -> None:
    """Whichever VM it is of."""

    async def scenario() -> None:
        everywhere = Retention(100 * KIB, LOG_BYTES)
        parts = [Retention(LOG_BYTES, LOG_BYTES, everywhere) for _ in range(5)]
        logs = [ended(part, 40 * KIB) for part in parts]
        assert [log.start for log in logs] == [40 * KIB] * 3 + [0] * 2
        assert [part.kept.replayed > 0 for part in parts] == [False] * 3 + [True] * 2
        assert everywhere.kept.replayed == sum(part.kept.replayed for part in parts) <= 100 * KIB

    run(scenario)
