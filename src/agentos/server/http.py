"""HTTP over raw ASGI: a request as it came, byte for byte, and answers in one piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final, TypeAlias

from agentos.errors import AgentOSError, LimitExceeded, NotFound
from agentos.server.settings import Settings

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

JSON_TYPE = (b"content-type", b"application/json")


class RouteNotFound(NotFound):
    """The server has nothing under this path."""

    code = "api.not_found"


class ServerGoing(AgentOSError):
    """The server is about to end: nothing was done, and the same call may be made again later."""

    code = "server.going_away"

    def __init__(self, message: str = "the server is about to end", **details: Any) -> None:
        super().__init__(message, **details)


class MethodNotAllowed(AgentOSError):
    """The path is there, but not for this method."""

    code = "actor.method_not_allowed"


class RequestTimeout(AgentOSError, TimeoutError):
    """The request did not arrive in time."""

    code = "request.timeout"


class BodyTooLong(LimitExceeded):
    """The body is over the limit."""


class TooMuchArriving(LimitExceeded):
    """Other bodies that are not whole yet leave no room for this one."""


class Arriving:
    """Counts what has come of bodies and frames that are not whole yet, of all clients together."""

    SMALL: Final = 64 * 1024
    """Up to here one does not count: what begins is let in however much there is."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0

    @property
    def exceeded(self) -> bool:
        """Whether there is too much of it."""
        return self.bytes > self.most

    def change(self, before: int, size: int) -> None:
        """One that had `before` bytes has `size` now; none when it is whole, or given up."""
        if before > self.SMALL or size > self.SMALL:
            self.bytes += (size if size > self.SMALL else 0) - (before if before > self.SMALL else 0)


class Disconnected(Exception):
    """The client went away: nobody is there to be answered."""


class Request:
    """One HTTP request or WebSocket handshake. `path` and `query` are undecoded."""

    def __init__(self, scope: Scope, receive: Receive | None = None) -> None:
        self.method: str = scope.get("method", "GET")
        self.headers: Headers = list(scope["headers"])
        raw = scope.get("raw_path") or scope["path"].encode()
        root = scope.get("root_path", "").encode()
        self.path: bytes = raw[len(root) :] if root and raw.startswith(root) else raw
        self.root: str = root.decode()
        self.scheme: str = scope.get("scheme", "http")
        self.query: bytes = scope.get("query_string", b"")
        client = scope.get("client")
        self.peer: str | None = client[0] if client and client[0] else None
        """The address of whoever sent it; None where that is a Unix socket's end."""
        self.trusted = True
        """Whether it may have more than a greeting."""
        self._receive = receive

    def header(self, name: bytes) -> str | None:
        """The first header of this lower-case name."""
        for one, value in self.headers:
            if one == name:
                return value.decode("latin-1")
        return None

    async def body(self, settings: Settings, arriving: Arriving) -> bytes:
        """All of the body. Raises BodyTooLong, TooMuchArriving, RequestTimeout, or Disconnected."""
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > settings.max_body_bytes:
            raise _too_long(int(length), settings)
        assert self._receive is not None
        message = await self._first(settings)
        chunk: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(chunk) > settings.max_body_bytes:
                raise _too_long(len(chunk), settings)
            return chunk
        return await self._rest(bytearray(chunk), settings, arriving)

    async def _first(self, settings: Settings) -> MutableMapping[str, Any]:
        return await _next(self._receive, settings.body_idle_seconds)

    async def _rest(self, body: bytearray, settings: Settings, arriving: Arriving) -> bytes:
        deadline = asyncio.get_running_loop().time() + settings.body_seconds
        more, counted = True, 0
        try:
            while more:
                arriving.change(counted, len(body))
                counted = len(body)
                if arriving.exceeded and counted > Arriving.SMALL:
                    said = "too much of requests that are not whole yet (raise it with setup(max_arriving_bytes=...))"
                    raise TooMuchArriving(
                        said, limit="max_arriving_bytes", value=arriving.bytes, maximum=arriving.most
                    )
                left = deadline - asyncio.get_running_loop().time()
                message = await _next(self._receive, min(settings.body_idle_seconds, left))
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > settings.max_body_bytes:
                    raise _too_long(len(body), settings)
        finally:
            arriving.change(counted, 0)
        return bytes(body)


async def _next(receive: Receive | None, seconds: float) -> MutableMapping[str, Any]:
    assert receive is not None
    try:
        async with asyncio.timeout(seconds):
            message = await receive()
    except TimeoutError:
        raise RequestTimeout("the request's body did not arrive in time") from None
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message


def _too_long(size: int, settings: Settings) -> BodyTooLong:
    most = settings.max_body_bytes
    said = f"a request's body may have at most {most} bytes (raise it with setup(max_body_bytes=...))"
    return BodyTooLong(said, limit="max_body_bytes", value=size, maximum=most)


async def answer(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Send a whole answer."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


def as_json(value: Any) -> bytes:
    """`value` as the body of an answer."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
