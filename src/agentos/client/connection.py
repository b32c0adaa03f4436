"""A connection to one remote VM: its events, and actions over a WebSocket that is opened again when it breaks."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import aiohttp
from yarl import URL

from agentos.client.events import read_event
from agentos.client.patience import Patience
from agentos.client.transport import Way
from agentos.client.verbs import Verbs
from agentos.errors import AgentOSError, ConnectionLost
from agentos.wire.address import ById, Connect, gateway_path
from agentos.wire.client_connection import ClientConnection, Completed, EventArrived, Failed, Lost, Opened
from agentos.wire.encodings import BARE_BYTES, Frame
from agentos.wire.failures import error_of_close, reconnects
from agentos.wire.terms import Terms, subprotocols_of_terms

log = logging.getLogger("agentos.client")

_OPEN_SECONDS: Final = 15.0
_PING_SECONDS: Final = 40.0
"""Silence after which the server is asked for a sign of life, for which it has half as long."""
_CLOSE_SECONDS: Final = 1.0
_MOST_QUEUED: Final = 1024
"""Events that wait for their handlers, beyond which nothing more is read (unless an action waits for its answer)."""
_FRAME_BYTES: Final = 1024 * 1024 * 1024

Handler = Callable[..., Any]


class _SocketClosed(Exception):
    """The WebSocket has ended; a client reads the reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


def _frame(socket: aiohttp.ClientWebSocketResponse, message: aiohttp.WSMessage) -> Frame:
    """What `message` of the socket holds. Raises _SocketClosed."""
    if message.type is aiohttp.WSMsgType.BINARY or message.type is aiohttp.WSMsgType.TEXT:
        frame: Frame = message.data
        return frame
    reason = message.extra if message.type is aiohttp.WSMsgType.CLOSE else None
    raise _SocketClosed(socket.close_code or 1006, reason or "")


class Link:
    """The WebSockets of one connection, one after another, and who waits for what over them."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.handlers: dict[str, list[Handler]] = {}
        self.error: AgentOSError | None = None
        """Why the connection is over."""
        self._state = ClientConnection(BARE_BYTES)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._sends: set[asyncio.Task[None]] = set()
        self._events: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._actor: ById | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def reached(self) -> bool:
        """Whether it was ever open."""
        return self._actor is not None

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self.error is not None

    async def open(self) -> None:
        """Open the first WebSocket. Raises the error that the server refuses it with, or ConnectionLost."""
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._tasks = [asyncio.create_task(self._run(opened)), asyncio.create_task(self._dispatch())]
        try:
            await opened
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End it. What is in flight fails."""
        self._end(ConnectionLost("the connection was closed"))
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        await asyncio.gather(
            *(task for task in self._tasks if task is not asyncio.current_task()), return_exceptions=True
        )

    def _end(self, error: AgentOSError) -> None:
        self.error = self.error or error
        self._fail(self._state.give_up(), self.error)
        self._changed.set()

    def _fail(self, ids: tuple[int, ...], error: AgentOSError) -> None:
        for one in ids:
            answer = self._answers.pop(one, None)
            if answer is not None and not answer.done():
                answer.set_exception(error)

    # -- asking

    async def call(self, name: str, args: tuple[Any, ...], wait: float | None) -> Any:
        """The output of an action. Waits for the connection while it is being opened again."""
        if self.error is not None:
            raise type(self.error)(self.error.message, **self.error.details)
        if not self._tasks:
            raise ConnectionLost("the connection is not open: use it in `async with`")
        action_id, frame = self._state.call(name, args)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[action_id] = answer
        if len(self._events) >= _MOST_QUEUED:
            self._room.set()
        try:
            if frame is not None:
                await self._send(frame)
            return await answer
        except asyncio.CancelledError:
            self._send_soon(self._state.cancel(action_id))
            raise
        finally:
            self._answers.pop(action_id, None)
            self._state.forget(action_id)

    async def _send(self, frame: Frame) -> None:
        socket = self._socket
        assert isinstance(frame, bytes)  # as this encoding has it
        if socket is not None:
            try:
                await socket.send_bytes(frame)
            except ConnectionError:
                pass  # whoever receives sees that too, and says so

    def _on_loop(self, do: Callable[[], None]) -> None:
        """Do it now, or soon where another thread asks: the blocking twin does."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if self._loop is None or here is self._loop:
            do()
        else:
            self._loop.call_soon_threadsafe(do)

    def _send_soon(self, frame: Frame | None) -> None:
        if frame is not None:
            task = asyncio.ensure_future(self._send(frame))
            self._sends.add(task)
            task.add_done_callback(self._sends.discard)

    def subscribe(self, event: str, handler: Handler) -> None:
        """Call `handler` for every event of this name."""
        self._on_loop(lambda: self._subscribe(event, handler))

    def _subscribe(self, event: str, handler: Handler) -> None:
        self.handlers.setdefault(event, []).append(handler)
        self._send_soon(self._state.subscribe(event))

    def unsubscribe(self, event: str, handler: Handler | None) -> None:
        """Call it, or all of them, no more."""
        self._on_loop(lambda: self._unsubscribe(event, handler))

    def _unsubscribe(self, event: str, handler: Handler | None) -> None:
        known = self.handlers.get(event, [])
        for one in [one for one in known if handler is None or one == handler]:
            known.remove(one)
            self._send_soon(self._state.unsubscribe(event))

    # -- WebSockets

    async def _run(self, opened: asyncio.Future[None]) -> None:
        trying = Patience()
        while True:
            try:
                await self._one_socket(opened)
                failure: AgentOSError = ConnectionLost("the connection to the server broke")
            except AgentOSError as error:
                failure = error
            before = self._state.open
            self._fail(self._state.dropped(), failure)
            if before:
                trying.rewarded()
            stay_away = not isinstance(failure, ConnectionLost) and not before
            if not opened.done():
                opened.set_exception(failure)
                self._end(failure)
                return
            delay = None if stay_away or self.way.closed else trying.delay(failure)
            if delay is None:
                self._end(failure)
                return
            await asyncio.sleep(delay)

    async def _one_socket(self, opened: asyncio.Future[None]) -> None:
        """Serve one WebSocket to its end. Raises AgentOSError where it was not even opened."""
        target = self._actor or await self.way.resolve()
        transport = self.way.transport
        target = type(target)(**{**_fields(target), "token": transport.token})
        url = "ws" + transport.endpoint.removeprefix("http") + gateway_path(target, Connect())
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                socket = await transport.session_of_sockets.ws_connect(
                    URL(url, encoded=True), protocols=subprotocols_of_terms(Terms(BARE_BYTES)),
                    max_msg_size=_FRAME_BYTES, heartbeat=_PING_SECONDS,
                    timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_SECONDS),
                )  # fmt: skip
        except AgentOSError:  # some are an OSError too
            raise
        except TimeoutError:
            raise transport.unreachable("timed out") from None
        except (aiohttp.ClientError, OSError) as error:
            raise transport.lost(error) from None
        async with socket:
            self._socket = socket
            try:
                await self._receive(socket, opened)
            finally:
                self._socket = None

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse, opened: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                await self._take(_frame(socket, await socket.receive()), opened)
            while True:
                await self._take(_frame(socket, await socket.receive()), opened)
                while len(self._events) >= _MOST_QUEUED and not self._answers:
                    self._room.clear()
                    await self._room.wait()
        except _SocketClosed as closed:
            if self._state.open:
                return
            error = error_of_close(closed.code, closed.reason)
            raise (ConnectionLost(error.message) if reconnects(closed.reason) else error) from None
        except TimeoutError:
            raise ConnectionLost(
                f"{self.way.transport.endpoint} took a connection and said nothing",
                endpoint=self.way.transport.endpoint,
            ) from None

    async def _take(self, frame: Frame, opened: asyncio.Future[None]) -> None:
        received = self._state.receive(frame)
        if isinstance(received, EventArrived):
            self._events.append((received.name, received.args))
            self._changed.set()
        elif isinstance(received, Completed):
            answer = self._answers.pop(received.id, None)
            if answer is not None and not answer.done():
                answer.set_result(received.output)
        elif isinstance(received, Lost):
            self._events += [("streamError", (error,)) for error in received.errors]
            self._changed.set()
        elif isinstance(received, Failed):
            self._fail(received.ids, received.error)
        elif isinstance(received, Opened):
            # Whoever comes back is led to the same VM, not to a new one of its key.
            self._actor = ById(received.actor_id)
            for one in received.frames:
                await self._send(one)
            if not opened.done():
                opened.set_result(None)

    # -- handlers

    async def _dispatch(self) -> None:
        while True:
            while self._events:
                name, args = self._events.popleft()
                self._room.set()
                await self._handle(name, args)
            if self.error is not None:
                return
            self._changed.clear()
            await self._changed.wait()

    async def _handle(self, name: str, args: tuple[Any, ...]) -> None:
        for handler in tuple(self.handlers.get(name, ())):
            try:
                result = handler(*read_event(name, args))
                if inspect.isawaitable(result):
                    await result
            except Exception:
                log.exception("a handler of %s failed", name)


def _fields(target: Any) -> dict[str, Any]:
    return {name: getattr(target, name) for name in target.__dataclass_fields__}


class Connection(Verbs):
    """A connection to one remote VM: `on` for its events, and its verbs over the same WebSocket.

    When the WebSocket breaks it is opened again and the events are subscribed to again; reads that were in flight
    are repeated, other actions raise ConnectionLost, as nobody can know whether they were done. Events of processes
    and shells go on where they were cut off, each byte once; what the server no longer has is told with a
    streamError (code `stream.lost` where it has forgotten the process, as after a restart, `stream.gap` where its log
    has dropped bytes).
    """

    def __init__(self, way: Way) -> None:
        self._way = way
        self._link = Link(way)
        super().__init__(self._link)

    def __repr__(self) -> str:
        return f"<Connection to {self._way}>"

    async def __aenter__(self) -> Connection:
        await self._link.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._link.close()

    async def close(self) -> None:
        """End it. Actions in flight fail with ConnectionLost."""
        await self._link.close()

    @property
    def error(self) -> AgentOSError | None:
        """Why it is over, None while it is not."""
        return self._link.error

    def on(self, event: str, handler: Callable[..., Any]) -> None:
        """Call `handler` with every event of this name, one after another.

        It may be a coroutine function.
        It gets one value with the event's fields, such as `.pid`, `.stream` and `.data` of a processOutput.
        """
        self._link.subscribe(event, handler)

    def off(self, event: str, handler: Callable[..., Any] | None = None) -> None:
        """Call it no more; without `handler`, none of this event."""
        self._link.unsubscribe(event, handler)
