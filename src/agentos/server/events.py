"""What one connection is told: output of processes and shells, each stream at the connection's own pace.

Nothing is queued for a connection but a cursor into each stream's log. A task for each stream reads a page
behind the cursor, sends it and waits for more; while a send waits, because the client does not take what was
sent, the log moves on without it, and what was dropped meanwhile is told with a `streamError`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

from agentos.actor import Actor
from agentos.server.pages import EXIT, OUTPUT, encoded_page, exit_payload, gap_payload
from agentos.server.settings import Counters
from agentos.streams import Stream
from agentos.wire.connection import ServerConnection
from agentos.wire.encodings import Frame
from agentos.wire.positions import Resumption

_MOST_ANNOUNCEMENTS: Final = 256
_SETTLE_SECONDS: Final = 0.01
"""Clients subscribe to one event after the other: output that is waiting goes out when they have done so."""

STREAM_EVENTS: Final = frozenset((*OUTPUT.values(), *EXIT.values()))

SendFrame = Callable[[Frame], Awaitable[None]]


@dataclass(slots=True)
class _Follower:
    """How far the connection is in one stream."""

    cursor: int
    task: asyncio.Task[None] | None = None
    told_exit: bool = False


class Subscriber:
    """The events of one connection. Belongs to its actor's listeners from `start` to `stop`."""

    def __init__(
        self,
        actor: Actor,
        connection: ServerConnection,
        send: SendFrame,
        counters: Counters,
        gone: Callable[[], None],
    ) -> None:
        self._actor = actor
        self._connection = connection
        self._send = send
        self._counters = counters
        self._gone = gone
        self._followers: WeakKeyDictionary[Stream, _Follower] = WeakKeyDictionary()
        self._positions = False
        """Whether the client wants to know where it is, to go on from there on another connection."""
        self.tasks: set[asyncio.Task[None]] = set()
        """What is being told."""
        self._announcements: deque[tuple[str, dict[str, Any]]] = deque()
        self._announcing: asyncio.Task[None] | None = None
        self._settle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Be told from now on."""
        self._actor.listeners.add(self)

    def stop(self) -> None:
        """Be told nothing any more."""
        self._actor.listeners.discard(self)
        if len(self._actor.listeners) < 2:
            self._actor.streams.pages.clear()
        if self._settle is not None:
            self._settle.cancel()
        for task in self.tasks:
            task.cancel()

    def subscribed(self, name: str) -> None:
        """The client wants events of this name."""
        if name in STREAM_EVENTS and self._settle is None:
            self._settle = asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._follow_all)

    def resume(self, before: Resumption | None) -> dict[str, Any]:
        """Begin where another connection of the client was cut off; what it is told of where that is."""
        self._positions = True
        streams = self._actor.streams
        same = before if before is not None and before.epoch == streams.epoch else None
        for stream in streams:
            if same is not None and stream not in self._followers:
                self._followers[stream] = _resumed(stream, same)
            else:
                self._begin(stream)
        known = [
            [stream.serial, follower.cursor, stream.scope, stream.id]
            for stream, follower in self._followers.items()
            if not follower.told_exit
        ]
        return {"epoch": streams.epoch, "after": streams.last, "positions": known}

    def _begin(self, stream: Stream) -> _Follower:
        follower = self._followers.get(stream)
        if follower is None:
            over = not stream.recent and stream.log.finished
            follower = _Follower(0 if stream.recent else stream.log.end, told_exit=over)
            self._followers[stream] = follower
        return follower

    def _follow_all(self) -> None:
        self._settle = None
        for stream in self._actor.streams:
            self._follow(stream)

    # -- what the actor tells

    def stream_started(self, stream: Stream) -> None:
        if self._settle is None:
            self._follow(stream)

    def announce(self, event: str, payload: dict[str, Any]) -> None:
        if not self._connection.wants(event):
            return
        if len(self._announcements) < _MOST_ANNOUNCEMENTS:
            self._announcements.append((event, payload))
        if self._announcing is None:
            self._announcing = self._spawn(self._send_announcements())

    def actor_destroyed(self) -> None:
        self._gone()

    # -- sending

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _send_announcements(self) -> None:
        while self._announcements:
            event, payload = self._announcements.popleft()
            await self._tell(event, payload)
        self._announcing = None

    async def _tell(self, event: str, payload: dict[str, Any]) -> None:
        frame = self._connection.event(event, payload)
        if frame is not None:
            await self._send_event(frame)

    async def _send_event(self, frame: Frame) -> None:
        self._counters.event_frames += 1
        self._counters.event_bytes += len(frame)
        await self._send(frame)

    def _wants(self, stream: Stream) -> bool:
        wants = self._connection.wants
        return wants(OUTPUT[stream.scope]) or wants(EXIT[stream.scope])

    def _follow(self, stream: Stream) -> None:
        if not self._wants(stream):
            return
        follower = self._begin(stream)
        if follower.task is None and not follower.told_exit:
            follower.task = self._spawn(self._pump(stream, follower))

    async def _pump(self, stream: Stream, follower: _Follower) -> None:
        log = stream.log
        output, ended = OUTPUT[stream.scope], EXIT[stream.scope]
        reader = log.attach(follower.cursor) if log.lossless else None
        try:
            while self._wants(stream):
                if not self._connection.wants(output):
                    follower.cursor = log.end
                elif follower.cursor < log.end:
                    await self._send_page(stream, follower)
                    if reader is not None:
                        reader.advance(follower.cursor)
                    continue
                if log.finished:
                    if self._connection.wants(ended):
                        follower.told_exit = True
                        await self._tell(ended, self._marked(stream, exit_payload(stream)))
                    break
                await log.wait(follower.cursor)
        finally:
            follower.task = None
            if reader is not None:
                reader.detach()

    async def _send_page(self, stream: Stream, follower: _Follower) -> None:
        page = encoded_page(
            self._actor, stream, follower.cursor, self._connection.encoding, positions=self._positions
        )
        if page.skipped:
            self._counters.gaps += 1
            gap = self._marked(stream, gap_payload(stream, page.skipped))
            if self._positions:
                gap["cursor"] = follower.cursor + page.skipped
            await self._tell("streamError", gap)
        for frame in page.frames:
            await self._send_event(frame)
        follower.cursor = page.cursor

    def _marked(self, stream: Stream, payload: dict[str, Any]) -> dict[str, Any]:
        return {**payload, "serial": stream.serial} if self._positions else payload


def _resumed(stream: Stream, before: Resumption) -> _Follower:
    if stream.serial > before.after:
        return _Follower(0)
    cursor = before.cursors.get(stream.serial)
    if cursor is None:
        return _Follower(stream.log.end, told_exit=True)
    return _Follower(min(cursor, stream.log.end))
