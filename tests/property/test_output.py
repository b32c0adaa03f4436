"""The log of output, for any way of writing and reading."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentos.machine.output import _BLOCK_COST, OutputLog
from agentos.model import StreamName

STREAMS = st.sampled_from(["stdout", "stderr"])
WRITES = st.lists(st.tuples(STREAMS, st.binary(max_size=60)), max_size=60)
PAGES = st.lists(st.integers(1, 50), min_size=1, max_size=20)


def together(log: OutputLog, pages: list[int]) -> tuple[dict[str, bytes], int]:
    """Read to the end in pages of these sizes, over and over: each stream's bytes, and how many were missed."""
    cursor = missed = number = 0
    seen = {"stdout": b"", "stderr": b""}
    while True:
        page = log.read(cursor, pages[number % len(pages)])
        assert sum(len(one.data) for one in page.events) <= pages[number % len(pages)]
        assert sum(one.skipped for one in page.events) == (page.skipped if page.events else 0)
        missed += page.skipped
        for one in page.events:
            seen[one.stream] += one.data
        assert page.cursor >= cursor
        cursor = page.cursor
        number += 1
        if page.exited:
            return seen, missed


@given(WRITES, PAGES)
def test_any_chunking_gives_the_same_streams(
    writes: list[tuple[StreamName, bytes]], pages: list[int]
) -> None:
    """However it is written and read, each stream is what was written to it."""
    log = OutputLog(1_000_000)
    for stream, data in writes:
        log.append(stream, data)
    log.finish()
    seen, missed = together(log, pages)
    assert missed == 0
    for stream in ("stdout", "stderr"):
        assert seen[stream] == b"".join(data for name, data in writes if name == stream)


@given(WRITES, st.integers(1, 4000), PAGES)
def test_the_bound_holds_and_gaps_are_exact(
    writes: list[tuple[StreamName, bytes]], bound: int, pages: list[int]
) -> None:
    """Retained is at most the bound, or one block; what is read is exactly what follows the gap."""
    log = OutputLog(bound)
    order: list[tuple[StreamName, int]] = []
    for stream, data in writes:
        log.append(stream, data)
        order += [(stream, byte) for byte in data]
        retained = log._blocks[log._first :]
        cost = sum(len(one.data) + _BLOCK_COST for one in retained)
        assert cost == log._cost
        assert cost <= bound or len(retained) <= 1
        assert log.end == len(order)
        assert log.end - log.start == sum(len(one.data) for one in retained)
    log.finish()
    seen, missed = together(log, pages)
    assert missed == log.start
    for stream in ("stdout", "stderr"):
        assert seen[stream] == bytes(byte for name, byte in order[missed:] if name == stream)


@given(WRITES, st.integers(0, 4000), st.integers(1, 100), st.integers(1, 2000))
def test_a_page_from_any_cursor(
    writes: list[tuple[StreamName, bytes]], cursor: int, size: int, bound: int
) -> None:
    """Offsets count each stream's own bytes, and no cursor gives anything but the truth."""
    log = OutputLog(bound)
    order: list[tuple[StreamName, int, int]] = []
    counts = {"stdout": 0, "stderr": 0}
    for stream, data in writes:
        log.append(stream, data)
        for byte in data:
            order.append((stream, counts[stream], byte))
            counts[stream] += 1
    page = log.read(cursor, size)
    begin = max(cursor, log.start)
    got = [(one.stream, one.offset + i, byte) for one in page.events for i, byte in enumerate(one.data)]
    assert got == order[begin : begin + len(got)]
    assert page.cursor == begin + len(got)
    assert len(got) == min(size, max(0, len(order) - begin))
    assert page.skipped == max(0, log.start - cursor)


@given(WRITES, st.integers(1, 500), PAGES)
def test_lossless_never_loses(writes: list[tuple[StreamName, bytes]], bound: int, pages: list[int]) -> None:
    """Who writes only while it is not full, and reads at any pace, misses nothing."""
    log = OutputLog(bound, lossless=True)
    seen = {"stdout": b"", "stderr": b""}
    cursor = number = 0
    for stream, data in writes:
        while log.full:
            page = log.read(cursor, pages[number % len(pages)])
            number += 1
            assert page.skipped == 0
            cursor = page.cursor
            for one in page.events:
                seen[one.stream] += one.data
        log.append(stream, data)
    log.finish()
    page = log.read(cursor, 1_000_000)
    assert page.exited
    for one in page.events:
        seen[one.stream] += one.data
    for stream in ("stdout", "stderr"):
        assert seen[stream] == b"".join(data for name, data in writes if name == stream)
