"""The management API: which actors there are, making them, and deleting them. Always JSON."""

from __future__ import annotations

import json
from typing import Any, Final
from urllib.parse import parse_qs

from agentos.actor import Actor
from agentos.actors import Actors
from agentos.errors import InvalidRequest, VmExists, VmNotFound
from agentos.server.calls import BIG_BYTES, aside
from agentos.server.http import Arriving, MethodNotAllowed, Request, RouteNotFound, ServerGoing
from agentos.server.settings import Settings
from agentos.store import ActorRecord
from agentos.wire.keys import deserialize_key, serialize_key
from agentos.wire.values import decode_base64

_MOST_LISTED: Final = 1000
_MOST_INPUT: Final = 1024 * 1024


class Management:
    """Answers requests under `/actors`."""

    def __init__(self, actors: Actors, settings: Settings, arriving: Arriving) -> None:
        self._kept = actors
        self._settings = settings
        self._arriving = arriving

    async def answer(self, request: Request) -> dict[str, Any]:
        """The body of the answer. Raises AgentOSError."""
        query = _query(request.query)
        rest = request.path.decode("latin-1").removeprefix("/actors").strip("/")
        if rest:
            if "/" in rest:
                raise RouteNotFound("there is nothing under this path")
            return await self._one(request, rest)
        if request.method == "GET":
            return self._list(query)
        if request.method not in ("PUT", "POST"):
            raise MethodNotAllowed(
                f"{request.method}: /actors knows GET, PUT and POST", method=request.method
            )
        data = await request.body(self._settings, self._arriving)
        body = await aside(_object, data) if len(data) > BIG_BYTES else _object(data)
        return self._make(request.method, body, query)

    @property
    def _actors(self) -> Actors:
        if self._kept.closed:
            raise ServerGoing
        return self._kept

    async def _one(self, request: Request, actor_id: str) -> dict[str, Any]:
        if request.method == "GET":
            return {"actor": self._tree(self._actors.by_id(actor_id).record)}
        if request.method != "DELETE":
            raise MethodNotAllowed(f"{request.method}: an actor knows GET and DELETE", method=request.method)
        if self._actors.closing:  # it takes a while, and the record is removed at its end
            raise ServerGoing
        try:
            actor = self._actors.by_id(actor_id)
        except VmNotFound:
            return {}  # it is gone, which was what was wanted
        await actor.destroy()
        return {}

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        namespace, name = query.get("namespace") or "default", query.get("name")
        if "actor_ids" in query:
            ids = [one for one in query["actor_ids"].split(",") if one][:_MOST_LISTED]
            found = [record for one in ids if (record := self._actors.store.by_id(one)) is not None]
            return {"actors": [self._tree(one) for one in found if name is None or one.name == name]}
        if "key" in query:
            if name is None:
                raise InvalidRequest.argument("name", None, "the name that the key belongs to")
            one = self._actors.store.by_key(namespace, name, deserialize_key(query["key"]))
            return {"actors": [] if one is None else [self._tree(one)]}
        most = _count(query.get("limit", "100"))
        records = self._actors.store.find(namespace, name, after=query.get("cursor", ""), most=most)
        answer: dict[str, Any] = {"actors": [self._tree(one) for one in records]}
        if len(records) == most:
            answer["pagination"] = {"cursor": records[-1].actor_id}
        return answer

    def _make(self, method: str, body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        namespace = query.get("namespace") or "default"
        name, key = _text(body, "name"), deserialize_key(_text(body, "key", "/"))
        known = self._actors.by_key(namespace, name, key)
        if known is not None:
            if method == "POST":
                raise VmExists(
                    "there is an actor of this key already",
                    existing_actor_id=known.actor_id,
                    key=serialize_key(key),
                )
            return {"actor": self._tree(known.record), "created": False}
        actor = self._create(namespace, name, key, body)
        return {"actor": self._tree(actor.record), **({"created": True} if method == "PUT" else {})}

    def _create(self, namespace: str, name: str, key: tuple[str, ...], body: dict[str, Any]) -> Actor:
        given = _text(body, "input", "")
        if len(given) > _MOST_INPUT:
            raise InvalidRequest.argument("input", given, f"at most {_MOST_INPUT} characters")
        return self._actors.create(
            namespace, name, key, pool=_text(body, "runner_name_selector", "") or None,
            region=_text(body, "datacenter", "") or None, crash_policy=_text(body, "crash_policy", "") or None,
            input=decode_base64(given, "input") if given else None,
        )  # fmt: skip

    def _tree(self, record: ActorRecord) -> dict[str, Any]:
        actor = self._actors.loaded(record.actor_id)
        running = actor is not None and actor.running
        return {
            "actor_id": record.actor_id,
            "name": record.name,
            "key": serialize_key(record.key),
            "namespace_id": record.namespace,
            "runner_name_selector": record.pool,
            "datacenter": record.region,
            "crash_policy": record.crash_policy,
            "create_ts": record.create_ts,
            "start_ts": record.start_ts,
            "connectable_ts": record.start_ts if running else None,
            "sleep_ts": None if running else record.sleep_ts,
            "destroy_ts": record.destroy_ts,
            "pending_allocation_ts": None,
            "reschedule_ts": None,
            "running": running,
        }


def _query(raw: bytes) -> dict[str, str]:
    try:
        found = parse_qs(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise InvalidRequest(
            "the query string is not UTF-8, or has too many parameters", argument="query"
        ) from None
    return {name: values[0] for name, values in found.items()}


def _object(data: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON", argument="body") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("the body is not a JSON object", argument="body")
    return tree


def _text(body: dict[str, Any], name: str, default: str | None = None) -> str:
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise InvalidRequest.argument(name, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest.argument(name, value, "text that UTF-8 can hold") from None
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= _MOST_LISTED:
        raise InvalidRequest.argument("limit", text, f"a whole number from 1 to {_MOST_LISTED}")
    return int(text)
