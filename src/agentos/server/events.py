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

from agentos.actor import Actor, Stream
from agentos.model import OutputChunk
from agentos.server.settings import Counters
from agentos.wire.connection import ServerConnection
from agentos.wire.encodings import Encoding, Frame
from agentos.wire.messages import Event

PAGE_BYTES: Final = 128 * 1024
_SHARED_PAGES: Final = 4
_MOST_ANNOUNCEMENTS: Final = 256
_SETTLE_SECONDS: Final = 0.01
"""Clients subscribe to one event after the other: output that is waiting goes out when they have done so."""

_OUTPUT: Final = {"process": "processOutput", "shell": "shellData"}
_EXIT: Final = {"process": "processExit", "shell": "shellExit"}
STREAM_EVENTS: Final = frozenset((*_OUTPUT.values(), *_EXIT.values()))

SendFrame = Callable[[Frame], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Page:
    """Frames that tell what follows a cursor, and where they end."""

    frames: tuple[Frame, ...]
    cursor: int
    skipped: int


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
        if self._settle is not None:
            self._settle.cancel()
        for task in self.tasks:
            task.cancel()

    def subscribed(self, name: str) -> None:
        """The client wants events of this name."""
        if name in STREAM_EVENTS and self._settle is None:
            self._settle = asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._follow_all)

    def _follow_all(self) -> None:
        self._settle = None
        for stream in list(self._actor.streams):
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
        return wants(_OUTPUT[stream.scope]) or wants(_EXIT[stream.scope])

    def _follow(self, stream: Stream) -> None:
        if not self._wants(stream):
            return
        follower = self._followers.get(stream)
        if follower is None:
            follower = _Follower(0 if stream.recent else stream.log.end)
            self._followers[stream] = follower
        if follower.task is None and not follower.told_exit:
            follower.task = self._spawn(self._pump(stream, follower))

    async def _pump(self, stream: Stream, follower: _Follower) -> None:
        log = stream.log
        output, ended = _OUTPUT[stream.scope], _EXIT[stream.scope]
        while self._wants(stream):
            if not self._connection.wants(output):
                follower.cursor = log.end
            elif follower.cursor < log.end:
                await self._send_page(stream, follower)
                continue
            if log.finished:
                if self._connection.wants(ended):
                    follower.told_exit = True
                    await self._tell(ended, _exit_payload(stream))
                break
            await log.wait(follower.cursor)
        follower.task = None

    async def _send_page(self, stream: Stream, follower: _Follower) -> None:
        page = encoded_page(stream, follower.cursor, self._connection.encoding)
        if page.skipped:
            self._counters.gaps += 1
            await self._tell("streamError", _gap_payload(stream, page.skipped))
        for frame in page.frames:
            await self._send_event(frame)
        follower.cursor = page.cursor


def encoded_page(stream: Stream, cursor: int, encoding: Encoding) -> _Page:
    """What follows `cursor`, as frames. Subscribers that are at the same place share them."""
    key = (cursor, encoding)
    page: _Page | None = stream.pages.get(key)
    if page is None:
        read = stream.log.read(cursor, PAGE_BYTES)
        frames = tuple(
            encoding.encode_frame(
                Event(_OUTPUT[stream.scope], (_output_payload(stream, name, data, offset),))
            )
            for name, data, offset in _joined(read.events)
        )
        page = _Page(frames, read.cursor, read.skipped)
        if len(stream.pages) >= _SHARED_PAGES:
            del stream.pages[next(iter(stream.pages))]
        stream.pages[key] = page
    return page


def _joined(chunks: tuple[OutputChunk, ...]) -> list[tuple[str, bytes, int]]:
    """The chunks, with those of one stream that follow one another made one."""
    runs: list[tuple[str, list[bytes], int]] = []
    for chunk in chunks:
        if runs and runs[-1][0] == chunk.stream:
            runs[-1][1].append(chunk.data)
        else:
            runs.append((chunk.stream, [chunk.data], chunk.offset))
    return [(name, parts[0] if len(parts) == 1 else b"".join(parts), offset) for name, parts, offset in runs]


def _output_payload(stream: Stream, name: str, data: bytes, offset: int) -> dict[str, Any]:
    if stream.is_shell:
        return {"shellId": stream.id, "data": data, "offset": offset}
    return {"pid": stream.id, "stream": name, "data": data, "offset": offset}


def _exit_payload(stream: Stream) -> dict[str, Any]:
    status = stream.source.status
    payload: dict[str, Any] = {
        "shellId" if stream.is_shell else "pid": stream.id,
        "exitCode": stream.source.exit_code,
    }
    if status is not None:
        payload |= {"signal": status.signal, "reason": status.reason}
    return payload


def _gap_payload(stream: Stream, skipped: int) -> dict[str, Any]:
    return {
        "scope": stream.scope,
        "id": stream.id,
        "code": "stream.gap",
        "skipped": skipped,
        "message": f"this connection fell behind: {skipped} bytes of {stream.scope} {stream.id} were passed over",
    }
