"""One WebSocket connection: actions in, results and events out."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from typing import Any

from agentos.actor import Actor
from agentos.errors import AgentOSError, InternalError, InvalidRequest
from agentos.server.calls import BIG_BYTES, Calls, ReadArguments, aside, read_arguments, weight
from agentos.server.events import Subscriber
from agentos.server.http import Receive, Send
from agentos.server.metrics import Metrics
from agentos.server.outgoing import Outgoing
from agentos.server.settings import Settings
from agentos.wire.connection import CANCEL, ActionCalled, Received, Refused, ServerConnection, Subscribed
from agentos.wire.encodings import Encoding, Frame
from agentos.wire.failures import DESTROYED, MALFORMED, Close
from agentos.wire.keys import serialize_key
from agentos.wire.malformed import AT_ONCE, MalformedMessage
from agentos.wire.messages import ActorSpecifier
from agentos.wire.positions import RESUME, read_resumption

_CLOSE_SECONDS = 2.0
_LAST_SECONDS = 1.0
"""For calls in flight to be answered before the connection is closed."""
_MOST_UNSENT_FRAMES = 1024
"""Frames that one connection has not taken yet, beyond which nothing more of it is looked at: small ones weigh more
than their bytes, and all of them end at once when the connection does."""
_FRAMES_AT_ONCE = 16
"""Frames of one connection that are looked at before others have their turn: thousands may have come together."""


class Cancelled(AgentOSError):
    """The action was ended by its own client."""

    code = "request.cancelled"


class Connection:
    """Lives within `run`, which returns when it has ended."""

    def __init__(
        self,
        actor: Actor,
        encoding: Encoding,
        receive: Receive,
        send: Send,
        calls: Calls,
        metrics: Metrics,
        settings: Settings,
        origin: str,
    ) -> None:
        specifier = ActorSpecifier(actor.actor_id, 1, serialize_key(actor.record.key))
        self._core = ServerConnection(encoding, specifier, str(uuid.uuid4()))
        self._actor = actor
        self._receive = receive
        self._raw_send = send
        self._calls = calls
        self._origin = origin
        self._settings = settings
        # A socket that takes nothing any more: the reader is told so too, and ends everything.
        self._outgoing = Outgoing(send, lambda: self.end(None))
        # In their order: so cancelled, each finds itself first among those that wait for one thing.
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._acting: dict[int, asyncio.Task[None]] = {}
        """Actions that have not come to their result, by id."""
        self._ending: asyncio.Future[Close | None] = asyncio.get_running_loop().create_future()
        self._subscriber = Subscriber(
            actor, self._core, self._outgoing.send, metrics.counters, lambda: self.end(DESTROYED)
        )

    def end(self, close: Close | None) -> None:
        """Close it, with this reason; None: the client has gone."""
        if not self._ending.done():
            self._ending.set_result(close)

    async def run(self) -> None:
        """Serve it to its end. The handshake was accepted."""
        reader = asyncio.create_task(self._read())
        try:
            await asyncio.wait({reader, self._ending}, return_when=asyncio.FIRST_COMPLETED)
            close = self._ending.result() if self._ending.done() else reader.result()
            if close is not None and close is not MALFORMED:
                await self._say_the_last(close)
        finally:
            self._subscriber.stop()
            for task in (reader, *self._tasks):
                task.cancel()
        if close is not None:
            with contextlib.suppress(TimeoutError, Exception):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._raw_send(
                        {"type": "websocket.close", "code": close.code, "reason": close.reason}
                    )

    async def _say_the_last(self, close: Close) -> None:
        """Let calls that end by themselves be answered; of a VM that is gone, all that there was to tell be told."""
        pending = set(self._tasks)
        if close is DESTROYED:
            pending |= self._subscriber.tasks
        if pending:
            await asyncio.wait(pending, timeout=_LAST_SECONDS)

    async def _read(self) -> Close | None:
        await self._outgoing.send(self._core.start())
        self._subscriber.start()
        outgoing, most = self._outgoing, self._settings.max_unsent_bytes
        looked_at = 0
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return None
            frame = message.get("text")
            if frame is None:
                frame = message["bytes"]
            read: ReadArguments | None = None
            try:
                if len(frame) > BIG_BYTES:
                    received, read = await aside(self._look_into, frame)
                else:
                    try:
                        received = self._core.receive(frame, AT_ONCE)
                    except MalformedMessage:
                        received, read = await aside(self._look_into, frame)
            except MalformedMessage:
                return MALFORMED
            self._heed(received, read)
            del message, frame, received, read  # which an idle connection would keep
            looked_at += 1
            if looked_at % _FRAMES_AT_ONCE == 0:
                await asyncio.sleep(0)
            if outgoing.unsent > most or outgoing.waiting > _MOST_UNSENT_FRAMES:
                await outgoing.at_most(most, _MOST_UNSENT_FRAMES)

    def _look_into(self, frame: Frame) -> tuple[Received | None, ReadArguments | None]:
        """What a frame says that takes long to decode, or is wrong."""
        received = self._core.receive(frame)
        if not isinstance(received, ActionCalled) or received.name in (RESUME, CANCEL):
            return received, None
        return received, read_arguments(received.name, received.args)

    def _heed(self, received: Received | None, read: ReadArguments | None) -> None:
        if isinstance(received, ActionCalled) and received.name in (RESUME, CANCEL):
            do = self._resume if received.name == RESUME else self._cancel
            self._spawn(self._outgoing.send(self._answer(received, do)))
        elif isinstance(received, ActionCalled):
            self._acting[received.id] = self._spawn(self._act(received, read))
        elif isinstance(received, Refused):
            self._spawn(self._outgoing.send(self._core.fail(received.action_id, received.error)))
        elif isinstance(received, Subscribed):
            self._subscriber.subscribed(received.name)

    def _answer(self, called: ActionCalled, do: Callable[[tuple[Any, ...]], Any]) -> Frame:
        """Of an action that is about the connection itself: it is done before the next frame is looked at."""
        try:
            return self._core.respond(called.id, do(called.args))
        except AgentOSError as error:
            return self._core.fail(called.id, error)

    def _resume(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return self._subscriber.resume(read_resumption(args))

    def _cancel(self, args: tuple[Any, ...]) -> None:
        if len(args) != 1 or not isinstance(args[0], int) or isinstance(args[0], bool):
            raise InvalidRequest.argument("arguments of cancelAction", args, "the id of an action")
        task = self._acting.pop(args[0], None)
        if task is not None:
            task.cancel()
            self._spawn(
                self._outgoing.send(self._core.fail(args[0], Cancelled("the client cancelled the action")))
            )

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    async def _act(self, called: ActionCalled, read: ReadArguments | None) -> None:
        try:
            try:
                output = await self._calls.perform(self._actor, called.name, called.args, self._origin, read)
            finally:
                # From here on it is answered, and not to be cancelled any more.
                self._acting.pop(called.id, None)
            if weight(output) > BIG_BYTES:
                frame = await aside(self._core.respond, called.id, output)
            else:
                frame = self._core.respond(called.id, output)
        except AgentOSError as error:
            frame = self._core.fail(called.id, error)
        except Exception:
            frame = self._core.fail(called.id, InternalError("An internal error occurred"))
        await self._outgoing.send(frame)
