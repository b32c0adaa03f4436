"""Serves preview links: HTTP and WebSockets to a port inside a VM, streamed both ways.

What answers is a stranger's program on the server's own origin, so its pages get an origin of their own (a
sandbox without `allow-same-origin`), and neither side sees a credential of the other: cookies, authorization
and the server's tokens are not passed on, nor is what would change the server's origin in a browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Iterator
from typing import Final

import h11
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from agentos.actor import Actor
from agentos.actors import Actors
from agentos.errors import AgentOSError, PortUnreachable, VmNotFound
from agentos.server.http import Disconnected, Headers, Receive, Request, Scope, Send, answer
from agentos.server.preview_exchange import Exchange, NotHttp
from agentos.server.preview_headers import PAGE_HEADERS, View, to_vm
from agentos.server.previews import PREFIX, PreviewDenied, PreviewExpired, Previews
from agentos.server.protocol import BREAK_OFF
from agentos.server.settings import Counters, Settings

log = logging.getLogger("agentos.server")

_HANDSHAKE_SECONDS: Final = 30.0
_CLOSE_SECONDS: Final = 2.0
_TEXT: Final = (b"content-type", b"text/plain; charset=utf-8")


class _Refused(Exception):
    """Answered here: a status and a line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class PreviewProxy:
    """All previews of one server."""

    def __init__(self, actors: Actors, previews: Previews, settings: Settings, counters: Counters) -> None:
        self._actors = actors
        self._previews = previews
        self._settings = settings
        self._counters = counters
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False

    async def close(self) -> None:
        """End all that is under way."""
        self._leaving = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)

    def _open(self, request: Request, scope: Scope) -> tuple[Actor, View]:
        token, slash, rest = request.path[len(PREFIX) :].partition(b"/")
        if self._leaving:
            raise _Refused(503, "the server is about to end")
        try:
            opened = self._previews.open(token)
            actor = self._actors.by_id(opened.actor_id)
        except PreviewDenied as error:
            raise _Refused(403, error.message) from None
        except PreviewExpired as error:
            raise _Refused(410, error.message) from None
        except VmNotFound:
            raise _Refused(410, "the VM of this link was destroyed") from None
        if self._counters.previews >= self._settings.max_previews:
            raise _Refused(503, f"{self._settings.max_previews} previews are under way (max_previews)")
        root = scope.get("root_path", "").encode() + PREFIX + token
        target = b"/" + rest + (b"?" + request.query if request.query else b"")
        return actor, View(opened.port, root, target, scope.get("scheme", "http"), missing_slash=not slash)

    @contextlib.contextmanager
    def _one_more(self, actor: Actor) -> Iterator[None]:
        self._counters.previews += 1
        try:
            with actor:
                yield
        finally:
            self._counters.previews -= 1

    # -- HTTP

    async def http(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Returns when the answer is over, or the client or the VM's server has gone."""
        if request.method == "OPTIONS" and request.header(b"access-control-request-method") is not None:
            await answer(send, 204, b"", _preflight(request))
            return
        try:
            actor, view = self._open(request, scope)
            if request.method == "CONNECT":
                raise _Refused(405, "a preview link is no proxy")
            if view.missing_slash:
                # Relative links of the page would otherwise lead out of the preview.
                last = view.root.rpartition(b"/")[2]
                query = b"?" + request.query if request.query else b""
                await answer(send, 308, b"", [(b"location", b"./" + last + b"/" + query), *PAGE_HEADERS])
                return
            with self._one_more(actor):
                await self._until_closed(self._exchange(actor, view, request, scope, receive, send))
        except _Refused as refused:
            body = f"agentos: {refused}\n".encode()
            # What was not read of the request's body is no next request.
            await answer(send, refused.status, body, [_TEXT, (b"connection", b"close"), *PAGE_HEADERS])
        except Disconnected:
            return

    async def _exchange(
        self, actor: Actor, view: View, request: Request, scope: Scope, receive: Receive, send: Send
    ) -> None:
        exchange = Exchange(view, request, receive, send)
        try:
            with contextlib.closing(await (await actor.vm()).connect(view.port)) as sock:
                await exchange.run(sock)
            return
        except h11.LocalProtocolError as error:
            refused = _Refused(400, f"not a request that can be passed on: {error}")
        except PortUnreachable as error:
            refused = _no_server(view.port, error)
        except AgentOSError as error:
            refused = _not_running(error)
        except TimeoutError:
            refused = _Refused(504, f"what listens on port {view.port} of the VM did not answer in time")
        except (NotHttp, OSError) as error:
            refused = _Refused(502, f"what listens on port {view.port} of the VM broke off: {error}")
        if not exchange.answered:
            raise refused
        # Half an answer is not made whole: the client's connection ends before it.
        break_off = (scope.get("extensions") or {}).get(BREAK_OFF)
        if break_off is not None:
            break_off["close"]()
            while (await receive())["type"] != "http.disconnect":
                pass

    async def _until_closed(self, work: object) -> None:
        """Run a coroutine, unless the server closes first."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        try:
            await task
        except asyncio.CancelledError:
            if not self._leaving:
                raise
        finally:
            task.cancel()
            self._tasks.discard(task)

    # -- WebSockets

    async def websocket(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket: accepted when the VM's server has, with the subprotocol that it chose."""
        await receive()
        try:
            actor, view = self._open(request, scope)
            with self._one_more(actor):
                await self._until_closed(self._bridge(actor, view, request, scope, receive, send))
        except _Refused as refused:
            await _refuse_handshake(scope, send, refused)

    async def _bridge(
        self, actor: Actor, view: View, request: Request, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            sock = await (await actor.vm()).connect(view.port)
        except PortUnreachable as error:
            raise _no_server(view.port, error) from None
        except AgentOSError as error:
            raise _not_running(error) from None
        with contextlib.closing(sock):
            try:
                peer = await connect(
                    f"ws://localhost:{view.port}{view.target.decode('latin-1')}",
                    sock=sock,
                    subprotocols=scope.get("subprotocols") or None,
                    additional_headers=[
                        (name.decode("latin-1"), value.decode("latin-1"))
                        for name, value in to_vm(request, view)
                        if name not in (b"host", b"content-length")
                    ],
                    user_agent_header=None, compression=None, ping_interval=None,
                    open_timeout=_HANDSHAKE_SECONDS, close_timeout=_CLOSE_SECONDS,
                    max_size=self._settings.max_body_bytes, max_queue=1,
                )  # fmt: skip
            except InvalidStatus as error:
                raise _Refused(error.response.status_code, "the VM's server refused the WebSocket") from None
            except TimeoutError:
                raise _Refused(
                    504, f"what listens on port {view.port} of the VM did not answer in time"
                ) from None
            except (WebSocketException, OSError, ValueError, EOFError) as error:
                raise _Refused(
                    502, f"port {view.port} of the VM speaks no WebSocket there: {error}"
                ) from None
            async with peer:
                await send({"type": "websocket.accept", "subprotocol": peer.subprotocol})
                await _carry(peer, receive, send)


async def _carry(peer: ClientConnection, receive: Receive, send: Send) -> None:
    """Messages both ways, until one side closes; the other is closed with the same code and reason."""
    outward = asyncio.get_running_loop().create_task(_outward(peer, receive))
    try:
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = await peer.recv()
                kind = "text" if isinstance(message, str) else "bytes"
                await send({"type": "websocket.send", kind: message})
        code = _code(peer.close_code, otherwise=1011)
        await send({"type": "websocket.close", "code": code, "reason": peer.close_reason or ""})
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await send({"type": "websocket.close", "code": 1012, "reason": "the server restarts"})
        raise
    except Exception as error:  # whoever watched has gone: what is sent to nobody fails in a server's own way
        log.debug("a preview's client has gone", extra={"error": repr(error)[:200]})
    finally:
        outward.cancel()
        await asyncio.wait({outward})


async def _outward(peer: ClientConnection, receive: Receive) -> None:
    with contextlib.suppress(ConnectionClosed):
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                code = _code(message.get("code"), otherwise=1001)
                await peer.close(code, message.get("reason") or "")
                return
            text = message.get("text")
            await peer.send(text if text is not None else message["bytes"])


def _code(code: int | None, *, otherwise: int) -> int:
    """A close code that may be sent: 1005 stands for none, and 1006 for no close at all."""
    if code == 1005:
        return 1000
    if code is None or not (code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code < 5000):
        return otherwise
    return code


async def _refuse_handshake(scope: Scope, send: Send, refused: _Refused) -> None:
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008, "reason": str(refused)[:120]})
        return
    status = refused.status if 400 <= refused.status < 600 else 502
    body = f"agentos: {refused}\n".encode()
    headers = [_TEXT, (b"content-length", str(len(body)).encode()), *PAGE_HEADERS]
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


def _no_server(port: int, error: PortUnreachable) -> _Refused:
    if error.details.get("errno") == errno.ECONNREFUSED:
        return _Refused(502, f"nothing listens on port {port} of the VM's loopback")
    return _Refused(502, error.message)


def _not_running(error: AgentOSError) -> _Refused:
    """What it was is for the server's own clients; whoever has the link learns that it was not the link."""
    return _Refused(503, f"the VM does not run now ({error.code})")


def _preflight(request: Request) -> Headers:
    wanted = request.header(b"access-control-request-headers") or "*"
    return [
        (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
        (b"access-control-allow-headers", wanted.encode("latin-1")),
        (b"access-control-max-age", b"600"),
        *PAGE_HEADERS,
    ]
