"""The gateway: actions over HTTP and connections over WebSockets, addressed by key or by id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from functools import lru_cache
from typing import Any, Final, TypeVar

from agentos.actor import Actor
from agentos.actors import Actors
from agentos.errors import AgentOSError, InternalError, InvalidRequest, LimitExceeded, VmNotFound
from agentos.server.access import Access
from agentos.server.calls import BIG_BYTES, Calls, ReadArguments, aside, read_arguments, weight
from agentos.server.connection import Connection
from agentos.server.http import (
    JSON_TYPE,
    Arriving,
    BodyTooLong,
    Disconnected,
    Headers,
    MethodNotAllowed,
    Receive,
    Request,
    RequestTimeout,
    RouteNotFound,
    Scope,
    Send,
    ServerGoing,
    TooMuchArriving,
    answer,
)
from agentos.server.metrics import Metrics
from agentos.server.previews import origin_of
from agentos.server.settings import Settings
from agentos.wire.address import (
    Action,
    Address,
    ById,
    Connect,
    Health,
    Metadata,
    Queue,
    parse_address,
)
from agentos.wire.encodings import JSON, Encoding, encode_value
from agentos.wire.failures import COME_BACK, GOING_AWAY, Close, close_for, http_error, http_status
from agentos.wire.keys import serialize_key
from agentos.wire.malformed import AT_ONCE, MalformedMessage
from agentos.wire.messages import ActorSpecifier, HttpActionRequest, HttpActionResponse
from agentos.wire.terms import Terms, select_subprotocol, terms_of_headers, terms_of_subprotocols
from agentos.wire.values import UNDEFINED

_T = TypeVar("_T")

log = logging.getLogger("agentos.server")

_HOOK_SECONDS: Final = 30.0
_QUICK_SECONDS: Final = 0.1
"""An action that takes longer is cancelled when its client goes away."""


_SHORT_ADDRESS: Final = 1024
_parse_known = lru_cache(maxsize=256)(parse_address)
"""For addresses that are short: a client calls the same one again and again."""


class Unsupported(AgentOSError):
    """This server has no such thing."""

    code = "actor.not_supported"


class Gateway:
    """Answers everything that is addressed to an actor."""

    def __init__(
        self,
        actors: Actors,
        access: Access,
        calls: Calls,
        metrics: Metrics,
        settings: Settings,
        arriving: Arriving,
    ) -> None:
        self._actors = actors
        self._actions = calls
        self._access = access
        self._metrics = metrics
        self._settings = settings
        self._arriving = arriving
        self._connections: set[Connection] = set()
        self._calls = 0
        self._nobody = asyncio.Event()
        self.leaving = False

    # -- HTTP

    async def http(self, request: Request, receive: Receive, send: Send, cors: Headers) -> None:
        """Answer an HTTP request."""
        encoding, actor = JSON, None
        try:
            terms = terms_of_headers(request.headers)
            encoding = terms.encoding
            address = self._address(request, terms)
            asked = address.asked
            if not isinstance(asked, Action):
                await self._other(asked, send, cors)
                return
            if request.method != "POST":
                raise MethodNotAllowed(
                    f"{request.method}: an action is called with POST", method=request.method
                )
            data = await request.body(self._settings, self._arriving)
            args, read = await _decoded(encoding, data, asked.name)
            del data  # which would be kept as long as the action takes
            # Not before: answered while it still sends, a client loses the answer (RFC 9112, 9.6). Those that are
            # counted from here on are waited for.
            self._check_staying()
            actor = self._find(address)
            self._calls += 1
            try:
                with actor:
                    await actor.admit(terms.params)
                    work = self._actions.perform(actor, asked.name, args, self._origin(request), read)
                    output = await _until_gone(work, receive)
            finally:
                self._calls -= 1
                self._look_empty()
            body = await _encoded(encoding, output)
        except Disconnected:
            return
        except Exception as error:
            await fail(send, error, cors, actor)
            return
        headers = [(b"content-type", encoding.content_type.encode()), *_actor_headers(actor), *cors]
        await answer(send, 200, body, headers)

    def _origin(self, request: Request) -> str:
        """Where the client reaches the server, as far as can be known."""
        public = self._settings.public_url
        return (
            public.rstrip("/")
            if public
            else origin_of(request.scheme, request.header(b"host")) + request.root
        )

    def _check_staying(self) -> None:
        if self.leaving:
            raise ServerGoing

    async def _other(self, asked: Any, send: Send, cors: Headers) -> None:
        if isinstance(asked, Health):
            await answer(send, 200, b"ok", [(b"content-type", b"text/plain"), *cors])
        elif isinstance(asked, Metadata):
            await answer(send, 200, b"{}", [JSON_TYPE, *cors])
        elif isinstance(asked, Queue):
            raise Unsupported("VMs have no queues; call an action instead", queue=asked.name[:200])
        else:
            raise RouteNotFound("there is nothing under this path")

    def _address(self, request: Request, terms: Terms) -> Address:
        path, query = request.path, request.query
        short = len(path) + len(query) <= _SHORT_ADDRESS
        address = (_parse_known if short else parse_address)(path, query, terms.direct)
        if address is None:
            self._access.check(request, terms.token)
            raise RouteNotFound("there is nothing under this path")
        self._access.check(request, address.target.token, terms.token)
        return address

    def _find(self, address: Address) -> Actor:
        target = address.target
        if isinstance(target, ById):
            return self._actors.by_id(target.actor_id)
        actor = self._actors.by_key(target.namespace, target.name, target.key)
        if actor is not None:
            return actor
        if not target.create:
            raise VmNotFound.of(target.name, target.key)
        given = None if target.input is UNDEFINED else encode_value(target.input)
        return self._actors.create(
            target.namespace, target.name, target.key, pool=target.pool, region=target.region,
            crash_policy=target.crash_policy, input=given,
        )  # fmt: skip

    async def see_through(self, work: Awaitable[_T]) -> _T:
        """What `work` returns, which is waited for at the end as calls are."""
        self._calls += 1
        try:
            return await work
        finally:
            self._calls -= 1
            self._look_empty()

    # -- WebSockets

    async def websocket(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a WebSocket. It is accepted whatever comes: clients that are refused earlier may wait for ever."""
        await receive()
        offered = scope.get("subprotocols", [])
        await send({"type": "websocket.accept", "subprotocol": select_subprotocol(offered)})
        counters = self._metrics.counters
        try:
            if self.leaving:
                raise _GoingAway
            if counters.connections >= self._settings.max_connections:
                most = self._settings.max_connections
                raise LimitExceeded.of(
                    "max_connections", counters.connections + 1, most, "too many connections"
                )
            terms = terms_of_subprotocols(offered)
            address = self._address(request, terms)
            if not isinstance(address.asked, Connect):
                raise RouteNotFound("there is nothing under this path")
            actor = self._find(address)
            with actor:
                async with asyncio.timeout(_HOOK_SECONDS):
                    await actor.admit(terms.params)
                counters.connections += 1
                try:
                    await self._serve(
                        Connection(
                            actor,
                            terms.encoding,
                            receive,
                            send,
                            self._actions,
                            self._metrics,
                            self._settings,
                            self._origin(request),
                        )
                    )
                finally:
                    counters.connections -= 1
        except _GoingAway:
            await _close(send, GOING_AWAY)
        except Exception as error:
            if not isinstance(error, AgentOSError):
                log.exception("connection failed")
            await _close(send, close_for(error))

    async def _serve(self, connection: Connection) -> None:
        if self.leaving:  # since it was let in: those that are counted from here on are told so
            raise _GoingAway
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._look_empty()

    def _look_empty(self) -> None:
        if self.leaving and not self._calls and not self._connections:
            self._nobody.set()

    async def go_away(self) -> None:
        """Tell every connection to come back later; wait until they were told, and calls in flight have ended.

        Who comes now is told the same: a client whose first try to come back is refused may never try again.
        """
        self.leaving = True
        for connection in list(self._connections):
            connection.end(GOING_AWAY)
        self._look_empty()
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._nobody.wait()
        except TimeoutError:
            log.warning("calls were still in flight at the end", extra={"calls": self._calls})


class _GoingAway(Exception):
    """The server shuts down."""


async def fail(send: Send, error: Exception, cors: Headers, actor: Actor | None = None) -> None:
    """Answer with an error: always in JSON, which every client reads whatever it sent."""
    if not isinstance(error, AgentOSError):
        log.exception("request failed")
        error = InternalError("An internal error occurred")
    going = isinstance(error, ServerGoing)
    body = JSON.encode_body(COME_BACK if going else http_error(error, _specifier(actor)))
    # After a body that was not read, what follows on this connection is no request.
    unread = going or isinstance(error, BodyTooLong | TooMuchArriving | RequestTimeout)
    headers = [JSON_TYPE, *cors, *([(b"connection", b"close")] if unread else [])]
    await answer(send, status_of(error), body, headers)


def status_of(error: BaseException) -> int:
    """The status of an answer that is an error."""
    if isinstance(error, BodyTooLong):
        return 413
    if isinstance(error, RequestTimeout):
        return 408
    if isinstance(error, MethodNotAllowed):
        return 405
    if isinstance(error, Unsupported):
        return 501
    if isinstance(error, ServerGoing):
        return 503
    return http_status(error)


async def _close(send: Send, close: Close) -> None:
    try:
        await send({"type": "websocket.close", "code": close.code, "reason": close.reason})
    except Exception:  # the client has gone, which is what a close is for
        pass


def _specifier(actor: Actor | None) -> ActorSpecifier | None:
    return None if actor is None else ActorSpecifier(actor.actor_id, 1, serialize_key(actor.record.key))


def _actor_headers(actor: Actor) -> Headers:
    return [(b"x-rivet-actor", actor.actor_id.encode())]


async def _decoded(
    encoding: Encoding, data: bytes, action: str
) -> tuple[tuple[Any, ...], ReadArguments | None]:
    if not data:
        raise InvalidRequest("the body is empty: wanted an object with args", argument="body")
    if len(data) <= BIG_BYTES:
        try:
            return encoding.decode_body(HttpActionRequest, data, AT_ONCE).args, None
        except MalformedMessage:
            pass  # or too much to be decoded at once
    return await aside(_looked_into, encoding, data, action)


def _looked_into(encoding: Encoding, data: bytes, action: str) -> tuple[tuple[Any, ...], ReadArguments]:
    args = encoding.decode_body(HttpActionRequest, data).args
    return args, read_arguments(action, args)


async def _encoded(encoding: Encoding, output: Any) -> bytes:
    message = HttpActionResponse(output)
    if weight(output) > BIG_BYTES:
        return await aside(encoding.encode_body, message)
    return encoding.encode_body(message)


async def _until_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """What `work` returns; when the client goes away first, `work` is cancelled and Disconnected raised.

    Most have their result before it is worth a task to look for that.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = _Watch(task, receive)
    timer = asyncio.get_running_loop().call_later(_QUICK_SECONDS, watch.begin)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.gone and not task.uncancel():
            raise Disconnected from None
        raise
    finally:
        timer.cancel()
        watch.end()


class _Watch:
    """Cancels a task when its client goes away."""

    def __init__(self, task: asyncio.Task[Any], receive: Receive) -> None:
        self.gone = False
        self._task = task
        self._receive = receive
        self._watching: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look for it from now on."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def end(self) -> None:
        """Look for it no more."""
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        await self._receive()
        self.gone = True
        self._task.cancel()
