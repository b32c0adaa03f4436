"""The protocols of the ASGI server, with what they lack: bounds on a request's headers, and ends that are none.

A client that opens a connection and sends its headers byte by byte, or never, or without end, holds a
descriptor and memory for nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN

from agentos.server.settings import Settings
from agentos.wire.failures import GOING_AWAY

_PIECE = 16 * 1024
"""Bytes that are parsed at once: how far headers may exceed their bound before that is seen."""
_LINGER_SECONDS = 2.0
"""How long a client that is refused may go on sending: closed earlier, it could lose the answer (RFC 9112, 9.6)."""
_ASKING_SECONDS = 1.0
"""How long connections on which nothing is asked stay open when the server ends. A request that is on its way when its
connection ends without a word fails, and a WebSocket's client may never try again; one that is answered comes back."""

BREAK_OFF = "agentos.break_off"
"""An ASGI extension: its `close` ends the connection after what was sent, so that half an answer stays half."""


class BoundedHttp(HttpToolsProtocol):
    """Closes connections whose headers are too slow or too long."""

    settings = Settings()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = False
        self._refused = False
        self._ending = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.settings.header_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            if self._refused or self.transport.is_closing() or self.transport.get_protocol() is not self:
                return
            piece = data[start : start + _PIECE]
            if self._in_headers:
                self._header_bytes += len(piece)
                if self._header_bytes > self.settings.max_header_bytes:
                    self._refuse(b"431 Request Header Fields Too Large", b"headers too long")
                    return
            super().data_received(piece)

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
        super().on_headers_complete()
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
    """WebSockets; one that is refused with an answer of HTTP is refused, and no error of the application."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = _Inbox(self.loop)  # type: ignore[assignment]  # with a third of the calls for each message

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
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True
