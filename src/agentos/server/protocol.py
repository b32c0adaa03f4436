"""The protocols of the ASGI server, with what they lack: bounds on a request's headers, and ends that are none.

A client that opens a connection and sends its headers byte by byte, or never, or without end, holds a
descriptor and memory for nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN

from agentos.server.http import Arriving
from agentos.server.settings import Settings
from agentos.wire.failures import GOING_AWAY, TOO_MUCH

_PIECE = 4 * 1024
"""Bytes that are parsed at once: how far headers may exceed their bound, and how many requests of one connection may
be waiting behind one another, before that is seen."""
_MOST_HELD = 64 * 1024
"""Bytes of a connection that wait to be parsed, beyond which it is not read."""
_FRAMES_PIECE = 16 * 1024
"""Bytes of a WebSocket that are parsed at once: thousands of frames, if they are small."""
_LINGER_SECONDS = 2.0
"""How long a client that is refused may go on sending: closed earlier, it could lose the answer (RFC 9112, 9.6)."""
_ASKING_SECONDS = 1.0
"""How long connections on which nothing is asked stay open when the server ends. A request that is on its way when its
connection ends without a word fails, and a WebSocket's client may never try again; one that is answered comes back."""

BREAK_OFF = "agentos.break_off"
"""An ASGI extension: its `close` ends the connection after what was sent, so that half an answer stays half."""


RELIED_ON: Final[tuple[tuple[type, tuple[str, ...]], ...]] = (
    (
        HttpToolsProtocol,
        ("connection_made", "connection_lost", "data_received", "on_message_begin", "on_headers_complete",
         "on_response_complete", "shutdown", "scope", "transport", "loop", "cycle", "pipeline", "flow"),
    ),
    (
        WebSocketsSansIOProtocol,
        ("connection_lost", "data_received", "send_receive_event_to_app", "handle_ping", "handle_bytes", "handle_text",
         "handle_cont", "receive", "send", "shutdown", "conn", "transport", "loop", "queue", "frames", "read_paused",
         "writable", "close_sent", "disconnected", "handshake_complete"),
    ),
)  # fmt: skip
"""What is replaced or used here of uvicorn's protocols, which have nothing public for it: methods and attributes."""


def check_reliance(relied_on: tuple[tuple[type, tuple[str, ...]], ...]) -> None:
    """Raise ImportError where a protocol lacks what is relied on: a replacement that nobody calls would say nothing."""
    for kind, names in relied_on:
        there = {*dir(kind), *kind.__init__.__code__.co_names}  # type: ignore[misc]
        missing = [one for one in names if one not in there]
        if missing:
            said = f"uvicorn {uvicorn.__version__} does not work with agentos: its {kind.__name__} has no "
            raise ImportError(
                f"{said}{', '.join(missing)}; install another version (see agentos's requirements)"
            )


check_reliance(RELIED_ON)


class _Flow(FlowControl):
    """Reads on only when nothing of what was read is held back."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class BoundedHttp(HttpToolsProtocol):
    """Closes connections whose headers are too slow or too long; takes requests only as it answers them."""

    settings = Settings()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = False
        self._refused = False
        self._ending = False
        self._flow: _Flow
        self._held = b""
        """What was read, and is parsed when the requests before it are answered."""
        self._unanswered: deque[Any] = deque()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport)
        self._timer = self.loop.call_later(self.settings.header_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._held = b""
        for cycle in self._unanswered:  # of which only the last one would be told
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._held:
            self._hold(data)
            return
        for start in range(0, len(data), _PIECE):
            if self._refused or self.transport.is_closing() or self.transport.get_protocol() is not self:
                return
            if self.pipeline:
                self._hold(data[start:])
                return
            piece = data[start : start + _PIECE]
            if self._in_headers:
                self._header_bytes += len(piece)
                if self._header_bytes > self.settings.max_header_bytes:
                    self._refuse(b"431 Request Header Fields Too Large", b"headers too long")
                    return
            super().data_received(piece)

    def _hold(self, rest: bytes) -> None:
        """Keep `rest` until what was asked is answered; beyond a bound, do not look whether the client is there."""
        self._held += rest
        self._stop_timer()
        if len(self._held) > _MOST_HELD:
            self._flow.pause_reading()
            self._flow.held = True

    def _go_on(self) -> None:
        data, self._held = self._held, b""
        self._flow.held = False
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._timer = self.loop.call_later(self.settings.header_seconds, self._too_slow)
        self.data_received(data)
        self._flow.resume_reading()

    def on_response_complete(self) -> None:
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()
        super().on_response_complete()
        if self._held and not self.pipeline:
            self.loop.call_soon(self._go_on)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {BREAK_OFF: {"close": self.transport.close}}
        self._in_headers = True
        self._header_bytes = 0
        if self._timer is None:
            self._timer = self.loop.call_later(self.settings.header_seconds, self._too_slow)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_timer()
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self._unanswered.append(self.cycle)
        if self._ending:
            self.answer_and_close()

    def answer_and_close(self) -> None:
        """The request that is being answered, or the next one if there is none, is the last on this connection."""
        self._ending = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """The server ends: what was asked, or is just being asked, is answered; then the connection is closed."""
        self.answer_and_close()
        if self.cycle is None or self.cycle.response_complete:
            self._stop_timer()
            self._timer = self.loop.call_later(_ASKING_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        self._refuse(b"408 Request Timeout", b"headers did not arrive in time")

    def _refuse(self, status: bytes, text: bytes) -> None:
        if not self._refused and not self.transport.is_closing():
            self._refused = True
            self._stop_timer()
            head = b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-type: application/json\r\n"
            body = b'{"group":"request","code":"invalid","message":"' + text + b'"}'
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            if self.transport.can_write_eof():
                self.transport.write_eof()
                self._timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
            else:
                self.transport.close()


def _head(size: int) -> bytes:
    """What stands before the `size` bytes of a binary message in one frame, as servers send it (RFC 6455, 5.2)."""
    if size < 126:
        return bytes((0x82, size))
    if size < 1 << 16:
        return b"\x82\x7e" + size.to_bytes(2, "big")
    return b"\x82\x7f" + size.to_bytes(8, "big")


class _Inbox:
    """What came and waits for the application, which asks for one after another: what is used of asyncio's queue."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: deque[Any] = deque()
        self._asking: asyncio.Future[None] | None = None

    def put_nowait(self, message: Any) -> None:
        self._messages.append(message)
        if self._asking is not None and not self._asking.done():
            self._asking.set_result(None)

    def empty(self) -> bool:
        return not self._messages

    async def get(self) -> Any:
        while not self._messages:
            self._asking = self._loop.create_future()
            await self._asking
        return self._messages.popleft()


class Sockets(WebSocketsSansIOProtocol):
    """WebSockets; one that is refused with an answer of HTTP is refused, and no error of the application.

    However much comes at once, it is parsed in pieces, between which others have their turn.
    """

    arriving = Arriving(Settings().max_arriving_bytes)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = _Inbox(self.loop)  # type: ignore[assignment]  # with a third of the calls for each message
        self._held = b""
        """What was read, and is parsed when the application has taken what came before, and others had their turn."""
        self._going_on = False
        self._counted = 0
        """Bytes of a message that is not whole yet."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._held = b""
        self._count(0)
        super().connection_lost(exc)
        # The parser and the connection hold one another: what has come of a message would stay until that is noticed.
        self.frames = []
        self.conn.receive_eof()

    def data_received(self, data: bytes) -> None:
        if not self._held and len(data) <= _FRAMES_PIECE:
            self._parse(data)
            return
        self._held += data
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()
        self._go_on_soon()

    def _go_on_soon(self) -> None:
        if not self._going_on:
            self._going_on = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Parse one more piece; then the next one, or read on, unless the application has to take something first."""
        self._going_on = False
        if self.transport.is_closing():
            self._held = b""
            return
        if self.queue.empty() or self.close_sent:
            piece, self._held = self._held[:_FRAMES_PIECE], self._held[_FRAMES_PIECE:]
            self._parse(piece)
            self._read_on()

    def _read_on(self) -> None:
        if self._held:
            self._go_on_soon()
        elif self.read_paused and (self.queue.empty() or self.close_sent) and not self.transport.is_closing():
            self.read_paused = False
            self.transport.resume_reading()

    def _parse(self, data: bytes) -> None:
        self._count(self._counted + len(data))
        super().data_received(data)
        if self.arriving.exceeded and self._counted > self.arriving.SMALL and not self.close_sent:
            self._count(0)
            self.close_sent = True
            self.conn.fail(TOO_MUCH.code, TOO_MUCH.reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def _count(self, size: int) -> None:
        self.arriving.change(self._counted, size)
        self._counted = size

    async def receive(self) -> Any:
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self._read_on()
        return message

    def handle_ping(self) -> None:
        """One that takes no answers gets none: only the last ping wants one (RFC 6455, 5.5.3)."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def handle_bytes(self, event: Any) -> None:
        super().handle_bytes(event)
        event.data = b""  # the parser keeps the frame until the next one has come

    def handle_text(self, event: Any) -> None:
        super().handle_text(event)
        event.data = b""

    def handle_cont(self, event: Any) -> None:
        """Put what comes in parts together as it comes: a million parts of one byte weigh sixty times as much."""
        whole: Any = self.frames[0] if self.frames else b""
        if not isinstance(whole, bytearray):
            whole = bytearray(whole)
            self.frames = [whole]
        whole += event.data
        event.data = b""
        if event.fin:
            self.frames = [bytes(whole)]
            self.send_receive_event_to_app()

    def shutdown(self) -> None:
        """The server ends: whoever was not told so yet is told to come back, by the application or here."""
        if not self.handshake_complete:
            # Refused with a status it would never come back: the application accepts it, and closes it with a reason.
            return
        if not self.close_sent:
            self.close_sent = True
            self.queue.put_nowait({"type": "websocket.disconnect", "code": GOING_AWAY.code})
            if self.conn.state is OPEN:
                self.conn.send_close(GOING_AWAY.code, GOING_AWAY.reason)
                self.transport.write(b"".join(self.conn.data_to_send()))
        super().shutdown()

    def send_receive_event_to_app(self) -> None:
        """Stop reading where a message waits already; for one alone, stopping and going on would be all there is."""
        self._count(0)
        alone = self.queue.empty() and not self.read_paused
        self.read_paused = self.read_paused or alone
        super().send_receive_event_to_app()
        if alone:
            self.read_paused = False

    async def send(self, message: Any) -> None:
        data = message.get("bytes")
        if data is not None and self.writable.is_set() and self.conn.state is OPEN and not self.disconnected:
            # What is sent most: without the layers that fragments and extensions would need.
            self.transport.write(_head(len(data)) + data)
            return
        await super().send(message)
        if self._held and self.close_sent:
            self._go_on_soon()  # the other side's close is behind it
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True
