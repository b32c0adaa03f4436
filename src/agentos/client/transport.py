"""HTTP to one server: actions, and the list of VMs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from agentos.client.reasons import never_began, reason_of
from agentos.client.tunnel import Tunnels
from agentos.errors import ConnectionLost, InvalidRequest, VmNotFound
from agentos.wire.address import Action, ById, ByKey, Target, gateway_path
from agentos.wire.encodings import BARE_BYTES, decode_http_error
from agentos.wire.failures import error_of
from agentos.wire.keys import serialize_key, survives_query
from agentos.wire.malformed import MalformedMessage
from agentos.wire.messages import HttpActionRequest, HttpActionResponse
from agentos.wire.terms import Terms, headers_of_terms

_CONNECT_SECONDS: Final = 10.0
_SLACK_SECONDS: Final = 15.0
"""Beyond the time that the server said it takes, before the connection counts as dead."""
_IDLE_SECONDS: Final = 30.0
"""An idle connection is not used again after this: less than what the server keeps it for."""


_BIG_BYTES: Final = 256 * 1024
"""A body beyond this is sent piece by piece."""


class Transport:
    """Requests to the server at `endpoint`, through the proxy that the environment names for it."""

    def __init__(self, endpoint: str, token: str | None, namespace: str) -> None:
        parts = urlsplit(endpoint if isinstance(endpoint, str) else "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest.argument("endpoint", endpoint, "a URL such as http://localhost:6420")
        self.endpoint = endpoint.rstrip("/")
        self.token = token
        self.namespace = namespace
        self.reached = False
        self._session: aiohttp.ClientSession | None = None
        self._tunnels: aiohttp.ClientSession | None = None
        self.closed = False
        """Whether it is over: nothing more is asked."""

    @property
    def session(self) -> aiohttp.ClientSession:
        """What keeps the connections. Raises ConnectionLost when the client was closed."""
        if self.closed:
            raise ConnectionLost("the client was closed")
        if self._session is None:
            terms = Terms(BARE_BYTES, token=self.token)
            self._session = aiohttp.ClientSession(
                headers=[
                    *headers_of_terms(terms), ("content-type", BARE_BYTES.content_type), ("user-agent", "agentos"),
                ],
                skip_auto_headers=("accept", "accept-encoding"),
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(), proxy=proxy_for(self.endpoint),
            )  # fmt: skip
        return self._session

    @property
    def session_of_sockets(self) -> aiohttp.ClientSession:
        """The same for WebSockets: one with tunnels, where there is a proxy and nothing is encrypted."""
        session, proxy = self.session, proxy_for(self.endpoint)
        if proxy is None or not (self.endpoint.startswith("http:") and proxy.startswith("http:")):
            return session
        if self._tunnels is None:
            self._tunnels = aiohttp.ClientSession(
                headers=session.headers, skip_auto_headers=session.skip_auto_headers, connector=Tunnels(proxy),
                cookie_jar=aiohttp.DummyCookieJar(),
            )  # fmt: skip
        return self._tunnels

    async def close(self) -> None:
        """End all connections. Requests in flight fail."""
        self.closed = True
        for session in (self._session, self._tunnels):
            if session is not None:
                await session.close()

    def url(self, path: str) -> URL:
        """The address of what is under `path`, which is sent as it is."""
        return URL(self.endpoint + path, encoded=True)

    async def _request(
        self, method: str, url: URL, content: bytes | None = None, wait: float | None = None
    ) -> bytes:
        """The body of a good answer."""
        read = None if wait is None else wait + _SLACK_SECONDS
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=read)
        data = io.BytesIO(content) if content is not None and len(content) > _BIG_BYTES else content
        try:
            async with self.session.request(
                method, url, data=data, timeout=timeout, allow_redirects=False
            ) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._check_open(error)
            self.reached = self.reached or not never_began(error)
            raise self.lost(error) from None
        except RuntimeError as error:
            self._check_open(error)
            raise
        if response.status != 200:
            raise self._failure(response.status, response.headers.get("content-type", ""), body)
        self.reached = True
        return body

    def _check_open(self, error: Exception) -> None:
        """Raise ConnectionLost where it was closed while it was asked."""
        if self.closed:
            raise ConnectionLost("the client was closed") from error

    def lost(self, error: Exception) -> ConnectionLost:
        """What to say when no connection came about (then with a `reason`), or when one broke."""
        if isinstance(error, aiohttp.WSServerHandshakeError):
            return self._stranger(error.status)
        if not never_began(error):
            return ConnectionLost(
                f"the connection to {self.endpoint} broke: {reason_of(error)}", endpoint=self.endpoint
            )
        return self.unreachable(reason_of(error))

    def unreachable(self, reason: str) -> ConnectionLost:
        """What to say when nobody answers."""
        return ConnectionLost(
            f"nobody answers at {self.endpoint}: {reason}", endpoint=self.endpoint, reason=reason,
            remedy="start a server with `agentos serve`",
        )  # fmt: skip

    def _stranger(self, status: int) -> ConnectionLost:
        return ConnectionLost(
            f"{self.endpoint} is no agentos server: it answered {status}",
            endpoint=self.endpoint,
            status=status,
        )

    def _failure(self, status: int, content_type: str, body: bytes) -> Exception:
        try:
            failure = decode_http_error(BARE_BYTES, content_type, body)
        except MalformedMessage:
            return self._stranger(status)
        self.reached = True
        return error_of(failure)

    async def call(self, url: URL, args: tuple[Any, ...], wait: float | None) -> Any:
        """The output of the action that is called at `url`."""
        body = BARE_BYTES.encode_body(HttpActionRequest(args))
        answer = await self._request("POST", url, body, wait)
        return BARE_BYTES.decode_body(HttpActionResponse, answer).output

    async def actors(self, **query: str) -> list[dict[str, Any]]:
        """The server's records of VMs, all pages of them."""
        found: list[dict[str, Any]] = []
        parameters = {"namespace": self.namespace, **query}
        while True:
            tree = json.loads(await self._request("GET", self.url(f"/actors?{urlencode(parameters)}")))
            found += tree["actors"]
            cursor = (tree.get("pagination") or {}).get("cursor")
            if not cursor:
                return found
            parameters["cursor"] = cursor

    async def make_actor(self, method: str, body: Mapping[str, Any]) -> str:
        """The id of a VM: PUT gets or makes it, POST makes it."""
        url = self.url(f"/actors?{urlencode({'namespace': self.namespace})}")
        tree = json.loads(await self._request(method, url, json.dumps(body).encode()))
        return str(tree["actor"]["actor_id"])


def proxy_for(endpoint: str) -> str | None:
    """The proxy that the environment wants to be used for `endpoint` (`http_proxy`, `https_proxy`, `all_proxy`, less
    `no_proxy`). Raises InvalidRequest for one of a kind that is not spoken here."""
    parts = urlsplit(endpoint)
    proxies = getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    url = found if "://" in found else f"http://{found}"
    if urlsplit(url).scheme not in ("http", "https"):
        raise InvalidRequest.argument("proxy of the environment", found, "an http:// URL")
    return url


class Way:
    """The way to one VM over HTTP: by its key, or by its id where a query cannot carry the key."""

    def __init__(self, transport: Transport, target: Target) -> None:
        self.transport = transport
        self.target = target
        self._urls: dict[str, URL] = {}
        """Of actions of `target`, by name."""

    def __str__(self) -> str:
        target = self.target
        return f"{target.name} {'/'.join(target.key)!r}" if isinstance(target, ByKey) else target.actor_id

    @property
    def reached(self) -> bool:
        """Whether there was ever a server."""
        return self.transport.reached

    @property
    def closed(self) -> bool:
        """Whether the client was closed."""
        return self.transport.closed

    async def resolve(self) -> Target:
        """The VM as an address can name it. A key with a comma in it is asked for first."""
        target = self.target
        if isinstance(target, ById) or survives_query(target.key):
            return target
        self.target = ById(await self._id_of(target), target.token)
        self._urls.clear()
        return self.target

    async def actor_id(self) -> str:
        """Its id on the server."""
        target = self.target
        return target.actor_id if isinstance(target, ById) else await self._id_of(target)

    async def _id_of(self, target: ByKey) -> str:
        key = serialize_key(target.key)
        if target.create:
            return await self.transport.make_actor(
                "PUT", {"name": target.name, "key": key, "crash_policy": "sleep"}
            )
        found = await self.transport.actors(name=target.name, key=key)
        if not found:
            raise VmNotFound.of(target.name, target.key)
        return str(found[0]["actor_id"])

    async def call(self, name: str, args: tuple[Any, ...], wait: float | None) -> Any:
        """The output of an action."""
        url = self._urls.get(name)
        if url is None:
            url = self.transport.url(gateway_path(await self.resolve(), Action(name)))
            self._urls[name] = url
        return await self.transport.call(url, args, wait)
