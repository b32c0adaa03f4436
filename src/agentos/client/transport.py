"""HTTP to one server: actions, and the list of VMs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

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


class Transport:
    """Requests to the server at `endpoint`."""

    def __init__(self, endpoint: str, token: str | None, namespace: str) -> None:
        parts = urlsplit(endpoint if isinstance(endpoint, str) else "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest.argument("endpoint", endpoint, "a URL such as http://localhost:6420")
        self.endpoint = endpoint.rstrip("/")
        self.token = token
        self.namespace = namespace
        self.reached = False
        self._http: httpx.AsyncClient | None = None
        self._closed = False

    def _client(self) -> httpx.AsyncClient:
        if self._closed:
            raise ConnectionLost("the client was closed")
        if self._http is None:
            limits = httpx.Limits(
                max_connections=None, max_keepalive_connections=100, keepalive_expiry=_IDLE_SECONDS
            )
            terms = Terms(BARE_BYTES, token=self.token)
            self._http = httpx.AsyncClient(
                headers=[*headers_of_terms(terms), ("content-type", BARE_BYTES.content_type)],
                limits=limits, timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
                # Reading all the certificates takes 20 ms, for nothing where there is no TLS.
                verify=self.endpoint.startswith("https:"),
            )  # fmt: skip
        return self._http

    async def close(self) -> None:
        """End all connections. Requests in flight fail."""
        self._closed = True
        if self._http is not None:
            await self._http.aclose()

    async def _request(
        self, method: str, path: str, content: bytes | None = None, wait: float | None = None
    ) -> httpx.Response:
        read = None if wait is None else wait + _SLACK_SECONDS
        timeout = httpx.Timeout(read, connect=_CONNECT_SECONDS, pool=None)
        try:
            response = await self._client().request(
                method, self.endpoint + path, content=content, timeout=timeout
            )
        except httpx.ConnectError as error:
            raise ConnectionLost(
                f"nobody answers at {self.endpoint} ({error})", endpoint=self.endpoint,
                remedy="start a server with `agentos serve`",
            ) from None  # fmt: skip
        except httpx.RequestError as error:
            self.reached = True
            said = str(error) or type(error).__name__
            raise ConnectionLost(
                f"the connection to {self.endpoint} broke: {said}", endpoint=self.endpoint
            ) from None
        except RuntimeError as error:  # closed while it was asked
            if not self._closed:
                raise
            raise ConnectionLost("the client was closed") from error
        if response.status_code != 200:
            raise self._failure(response)
        self.reached = True
        return response

    def _failure(self, response: httpx.Response) -> Exception:
        try:
            failure = decode_http_error(
                BARE_BYTES, response.headers.get("content-type", ""), response.content
            )
        except MalformedMessage:
            return ConnectionLost(
                f"{self.endpoint} is no agentos server: it answered {response.status_code}",
                endpoint=self.endpoint, status=response.status_code,
            )  # fmt: skip
        self.reached = True
        return error_of(failure)

    async def call(self, target: Target, name: str, args: tuple[Any, ...], wait: float | None) -> Any:
        """The output of an action."""
        body = BARE_BYTES.encode_body(HttpActionRequest(args))
        response = await self._request("POST", gateway_path(target, Action(name)), body, wait)
        return BARE_BYTES.decode_body(HttpActionResponse, response.content).output

    async def actors(self, **query: str) -> list[dict[str, Any]]:
        """The server's records of VMs, all pages of them."""
        found: list[dict[str, Any]] = []
        parameters = {"namespace": self.namespace, **query}
        while True:
            tree = json.loads(
                (await self._request("GET", f"/actors?{httpx.QueryParams(parameters)}")).content
            )
            found += tree["actors"]
            cursor = (tree.get("pagination") or {}).get("cursor")
            if not cursor:
                return found
            parameters["cursor"] = cursor

    async def make_actor(self, method: str, body: Mapping[str, Any]) -> str:
        """The id of a VM: PUT gets or makes it, POST makes it."""
        path = f"/actors?{httpx.QueryParams({'namespace': self.namespace})}"
        tree = json.loads((await self._request(method, path, json.dumps(body).encode())).content)
        return str(tree["actor"]["actor_id"])


class Way:
    """The way to one VM over HTTP: by its key, or by its id where a query cannot carry the key."""

    def __init__(self, transport: Transport, target: Target) -> None:
        self.transport = transport
        self.target = target

    @property
    def reached(self) -> bool:
        """Whether there was ever a server."""
        return self.transport.reached

    async def resolve(self) -> Target:
        """The VM as an address can name it. A key with a comma in it is asked for first."""
        target = self.target
        if isinstance(target, ById) or survives_query(target.key):
            return target
        self.target = ById(await self._id_of(target), target.token)
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
            raise VmNotFound("there is no VM of this key", name=target.name, key=list(target.key))
        return str(found[0]["actor_id"])

    async def call(self, name: str, args: tuple[Any, ...], wait: float | None) -> Any:
        """The output of an action."""
        return await self.transport.call(await self.resolve(), name, args, wait)
