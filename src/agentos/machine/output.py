"""The bounded log behind every stream of output: written once, read by any number at their own pace.

A position (cursor) counts the bytes of all streams of one process in the order in which they arrived. The
log keeps the newest bytes up to its bound; a reader whose cursor lies before the oldest one gets what is
left and the exact number of bytes that it missed. Nothing is queued for a reader, so a slow one costs
nothing and delays nobody. Small writes are gathered in blocks, so that the bound holds for bytes, however
finely they were written.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from operator import attrgetter

from agentos.machine.retention import LATE_SECONDS, LEAST_UNREAD_BYTES, RETRY_SECONDS, Kept, Retention
from agentos.model import OutputChunk, OutputPage, StreamName, check_count, check_seconds

_BLOCK_COST = 256
"""What a block costs beyond its bytes: two streams that alternate byte by byte must not outgrow the bound."""
_GATHER_BELOW = 4096
TIME_GRAIN = 1.0
"""Seconds that bytes may lie apart and count as having arrived together."""
_MOST_MARKS = 64
_MARK_COST = 16
"""What it costs to know when one more part of a block has arrived."""
DEFAULT_PAGE_BYTES = 256 * 1024
_FOLLOW_BYTES = 1024 * 1024
_PIECES = 8
"""At least so many pieces of output does a full log consist of: what is dropped, is dropped in whole pieces."""


def check_page(cursor: object, max_bytes: object, wait: object) -> float:
    """`wait` in seconds, where all three say a page that can be asked for. Raises InvalidRequest naming one."""
    check_count("cursor", cursor)
    check_count("max_bytes", max_bytes, least=1)
    return check_seconds("wait", wait) or 0.0


class _Block:
    __slots__ = ("data", "marks", "offset", "position", "stream")

    def __init__(
        self, stream: StreamName, position: int, offset: int, data: bytes | bytearray, now: float
    ) -> None:
        self.stream = stream
        self.position = position
        self.offset = offset
        self.data = data
        self.marks = array("d", (0, now))
        """Pairs: where in it begins what has arrived from when on."""

    @property
    def end(self) -> int:
        return self.position + len(self.data)

    @property
    def cost(self) -> int:
        return len(self.data) + _BLOCK_COST + (len(self.marks) // 2 - 1) * _MARK_COST


_position = attrgetter("position")


class Attached:
    """A reader that a lossless log waits for, from `OutputLog.attach` to `detach`."""

    __slots__ = ("_log", "cursor")

    def __init__(self, log: OutputLog, cursor: int) -> None:
        self._log = log
        self.cursor = cursor

    def advance(self, cursor: int) -> None:
        """It has read what lies before `cursor`."""
        self._log.note(self, cursor)

    def detach(self) -> None:
        """It is not to be waited for any more."""
        self._log.note(self, None)


class OutputLog:
    """The log of one process or shell. `max_bytes` bounds what is retained (at least the newest block).

    With a `retention`, it is one of those that share its bounds.
    """

    def __init__(self, max_bytes: int, *, lossless: bool = False, retention: Retention | None = None) -> None:
        self.max_bytes = max_bytes
        self.lossless = lossless
        self.retention = retention
        self.counted = Kept()
        """What `retention` counts of it."""
        self.start = 0
        """Position of the oldest byte retained."""
        self.end = 0
        """Position after the newest byte."""
        self.finished = False
        self.on_room: Callable[[], None] | None = None
        """Called when a lossless log that was full has been read from, and has room again."""
        self._blocks: list[_Block] = []
        self._first = 0
        self._unread = 0
        """Index of the first block that was not read to its end, where it is lossless."""
        self._cost = 0
        self._offsets: dict[StreamName, int] = {"stdout": 0, "stderr": 0}
        self._waiters: list[asyncio.Future[None]] = []
        self._attached: set[Attached] = set()
        self._asked: int | None = None
        self._consumed = 0
        self._held = False
        """Whether it was full when somebody looked."""
        self._given_up = False
        self._handed_out = False
        """Whether the last page was asked for, so that whoever wants it has it, if the answer arrived."""
        self._touched = 0.0

    @property
    def full(self) -> bool:
        """A lossless log holds a bound's worth that was not read by all: nothing may be appended for now.

        Or not that much, but more than the least, while all lossless processes of the VM, or of all VMs, have too much.
        """
        return self.lossless and self._free() <= 0

    def _free(self) -> int:
        crowded = self.retention is not None and self.retention.crowded
        return (min(LEAST_UNREAD_BYTES, self.max_bytes) if crowded else self.max_bytes) - self.unread_bytes

    def room(self) -> int:
        """How much may be appended now: a part of the bound. If nothing, `on_room` is called when there is again."""
        free = self._free()
        self._held = free <= 0
        if self._held and self.retention is not None and self.unread_bytes < self.max_bytes:
            self.retention.hold(self)
        return max(0, min(free, max(1, self.max_bytes // _PIECES)))

    def has_room(self) -> bool:
        """Whether anything may be appended now; as `room`."""
        return self.room() > 0

    def look_again(self) -> None:
        """There may be room again."""
        if self._held and self.has_room() and self.on_room:
            self.on_room()

    @property
    def unread_bytes(self) -> int:
        """What a lossless log keeps for readers who may still come, with what it costs to keep it."""
        if not self.lossless or self._given_up:
            return 0
        blocks = len(self._blocks) - self._unread
        return self.end - self._consumed + _BLOCK_COST * max(0, blocks - 1)

    @property
    def kept(self) -> Kept:
        """What it keeps beyond what a process that runs may keep for replay."""
        unread = self.unread_bytes
        droppable = self.finished and (not unread or self._first < self._unread)
        replayed = max(0, self._cost - unread) if droppable else 0
        return Kept(0, unread, replayed) if self._handed_out else Kept(unread, 0, replayed)

    @property
    def wanted_until(self) -> float:
        """The moment (of time.monotonic) from which on nobody is expected to come for what is unread."""
        return self._touched + (RETRY_SECONDS if self._handed_out else LATE_SECONDS)

    def give_up(self) -> None:
        """Nobody has come for what is unread: it is kept like what was read, as long as there is room."""
        self._given_up = True
        self._count()

    def _count(self) -> None:
        if self.retention is not None:
            self.retention.count(self)

    def _count_unread(self) -> None:
        """As `_count`, where nothing else can have changed: with each piece of output."""
        if self.retention is not None and not (self.finished or self._handed_out):
            self.retention.count_unread(self, self.unread_bytes)
        else:
            self._count()

    def attach(self, cursor: int) -> Attached:
        """A reader at `cursor`, which a lossless log waits for; it reads with `peek`.

        Those who ask for pages with `read` are unknown: of them, the log waits for the one that is furthest, and
        takes what lies before the cursor that is asked for as read.
        """
        reader = Attached(self, cursor)
        self._attached.add(reader)
        return reader

    def note(self, reader: Attached, cursor: int | None) -> None:
        """`reader` is at `cursor` now; None: it has gone."""
        if cursor is None:
            self._attached.discard(reader)
        else:
            reader.cursor = cursor
        self._look_consumed()

    def append(self, stream: StreamName, data: bytes) -> None:
        """Add the newest bytes of `stream` and drop the oldest beyond the bound."""
        if not data:
            return
        now = time.time()
        most = self.max_bytes - _BLOCK_COST
        passed = len(data) - most if not self.lossless and most > 0 else 0
        if passed > 0:
            # More in one piece than is kept at all: of that only the newest, as of all that came before.
            data = data[passed:]
            self._offsets[stream] += passed
            self.end += passed
            self.start = self.end
        last = self._blocks[-1] if len(self._blocks) > self._first and passed <= 0 else None
        offset = self._offsets[stream]
        if (
            last
            and last.stream == stream
            and len(last.data) + len(data) <= _GATHER_BELOW
            and len(last.marks) < 2 * _MOST_MARKS
        ):
            if not isinstance(last.data, bytearray):
                last.data = bytearray(last.data)
            if not 0 <= now - last.marks[-1] < TIME_GRAIN:
                last.marks.extend((len(last.data), now))
                self._cost += _MARK_COST
            last.data += data
        else:
            self._blocks.append(_Block(stream, self.end, offset, data, now))
            self._cost += _BLOCK_COST
        self._offsets[stream] = offset + len(data)
        self.end += len(data)
        self._cost += len(data)
        if self._cost > self.max_bytes:
            self._drop()
        if self.lossless:
            self._unread = min(self._unread, len(self._blocks) - 1)
            self._count_unread()
        if self._waiters:
            self._wake()

    def _drop(self) -> None:
        while self._cost > self.max_bytes and len(self._blocks) - self._first > 1:
            if self.lossless and self._first >= self._unread:
                break
            dropped = self._blocks[self._first]
            self._cost -= dropped.cost
            dropped.data = b""  # the block itself goes later, with others
            self._first += 1
        self.start = self._blocks[self._first].position
        if self._first > 64 and self._first * 2 > len(self._blocks):
            del self._blocks[: self._first]
            self._unread = max(0, self._unread - self._first)
            self._first = 0

    @property
    def retained_bytes(self) -> int:
        """What is retained, with what it costs to retain it."""
        return self._cost

    def release(self) -> None:
        """Drop all that is retained: who has not read it is told of a gap.

        A lossless log keeps what is unread, until nobody is expected to come for it any more.
        """
        keep = self._blocks[self._unread :] if self.unread_bytes else []
        self._blocks = keep
        self._first = self._unread = 0
        self._cost = sum(block.cost for block in keep)
        self.start = keep[0].position if keep else self.end
        self._count()

    def finish(self) -> None:
        """Nothing will follow: readers at the end are told so."""
        self.finished = True
        self._touched = time.monotonic()
        self._count()
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def position_since(self, moment: float) -> int:
        """Where what has arrived from `moment` on (seconds since the epoch) begins, to TIME_GRAIN: never behind it."""
        for block in self._blocks[self._first :]:
            for inside, arrived in zip(block.marks[::2], block.marks[1::2], strict=True):
                if arrived > moment - TIME_GRAIN:
                    return block.position + int(inside)
        return self.end

    def read(self, cursor: int = 0, max_bytes: int = DEFAULT_PAGE_BYTES) -> OutputPage:
        """What follows `cursor`, at most `max_bytes` of it (but at least one block's beginning), at once.

        A cursor beyond the end reads nothing; one before the oldest byte gets `truncated` and `skipped`.
        """
        self._note_asked(cursor)
        page = self.peek(cursor, max_bytes)
        if self.lossless and page.exited and not self._handed_out:
            self._handed_out = True
            self._count()
        return page

    def _note_asked(self, cursor: int) -> None:
        # What lies before was taken; what is answered now may get lost on its way, and be asked for again.
        self._touched = time.monotonic()
        if self.lossless and (self._asked is None or cursor > self._asked):
            self._asked = min(cursor, self.end)
            self._look_consumed()

    def peek(self, cursor: int, max_bytes: int) -> OutputPage:
        """As `read`, by a reader that is attached."""
        skipped = max(0, self.start - cursor)
        position = max(cursor, self.start)
        events: list[OutputChunk] = []
        index = bisect_right(self._blocks, position, lo=self._first, key=_position) - 1
        room = max_bytes
        while 0 <= index < len(self._blocks) and room > 0:
            block = self._blocks[index]
            inside = position - block.position
            if events and len(block.data) > max(room, _GATHER_BELOW):
                break  # in parts it would have to be copied
            data = (
                block.data if inside == 0 and len(block.data) <= room else block.data[inside : inside + room]
            )
            if data:
                missed = skipped if not events else 0
                events.append(OutputChunk(block.stream, bytes(data), block.offset + inside, missed))
                position += len(data)
                room -= len(data)
            index += 1
        done = self.finished and position >= self.end
        return OutputPage(tuple(events), position, skipped > 0, skipped, done)

    def _look_consumed(self) -> None:
        """What was read by all who read does not become unread by somebody who begins later."""
        positions = [one.cursor for one in self._attached]
        if self._asked is not None:
            positions.append(self._asked)
        consumed = min(positions, default=0)
        if consumed > self._consumed:
            self._consumed = consumed
            blocks = self._blocks
            while self._unread < len(blocks) and blocks[self._unread].end <= consumed:
                self._unread += 1
            self._touched = time.monotonic()
            self._count_unread()
            self.look_again()

    async def wait(self, cursor: int) -> None:
        """Return when there is something after `cursor`, or nothing will follow."""
        while self.end <= cursor and not self.finished:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                raise

    async def read_wait(
        self, cursor: int, max_bytes: int, wait: float, since: float | None = None
    ) -> OutputPage:
        """As `read`, but where nothing follows yet, wait up to `wait` seconds for it. Nothing from before `since`."""
        if since is not None:
            cursor = max(cursor, self.position_since(since))
        self._note_asked(cursor)
        if wait > 0 and self.end <= cursor and not self.finished:
            try:
                async with asyncio.timeout(wait):
                    await self.wait(cursor)
            except TimeoutError:
                pass
        return self.read(cursor, max_bytes)

    async def follow(self, cursor: int = 0) -> AsyncIterator[OutputChunk]:
        """Every chunk from `cursor` to the end of the output."""
        while True:
            page = self.read(cursor, _FOLLOW_BYTES)
            for chunk in page.events:
                yield chunk
            cursor = page.cursor
            if page.exited or self.end <= cursor:
                self._note_asked(cursor)
                if page.exited:
                    return
                await self.wait(cursor)
