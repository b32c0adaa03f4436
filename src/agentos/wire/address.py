"""Which actor a request is for, and what is asked of it.

A path is split while it is still percent-encoded, as names may hold encoded slashes, and whatever belongs
to the actor's own HTTP and WebSocket handlers is handed on byte for byte.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import quote, quote_plus, unquote_to_bytes

from agentos.errors import InvalidRequest
from agentos.wire import cbor, keys
from agentos.wire.malformed import FROM_CLIENT, malformed, unwanted
from agentos.wire.values import UNDEFINED, decode_base64, revive

_GATEWAY: Final = "/gateway/"
_RESERVED: Final = "rvt-"
_COMPONENT_SAFE: Final = "!~*'()"


@dataclass(frozen=True, slots=True)
class ByKey:
    """The actor of this name and key; `create` makes it where there is none."""

    name: str
    key: keys.Key = ()
    create: bool = False
    namespace: str = "default"
    pool: str | None = None
    region: str | None = None
    crash_policy: str | None = None
    input: Any = UNDEFINED
    token: str | None = None
    skip_ready_wait: bool = False


@dataclass(frozen=True, slots=True)
class ById:
    """The actor with this id."""

    actor_id: str
    token: str | None = None
    skip_ready_wait: bool = False


@dataclass(frozen=True, slots=True)
class Action:
    """Call an action over HTTP."""

    name: str


@dataclass(frozen=True, slots=True)
class Queue:
    """Send to a queue."""

    name: str


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a connection."""


@dataclass(frozen=True, slots=True)
class Request:
    """The actor's own HTTP handler; `path` is still encoded and starts with a slash."""

    path: str


@dataclass(frozen=True, slots=True)
class WebSocket:
    """The actor's own WebSocket handler; `path` as in Request."""

    path: str


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the actor lives."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the actor is."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nothing that the protocol has: `path` as it came, for an answer that says so."""

    path: str


Target: TypeAlias = ByKey | ById
Asked: TypeAlias = Action | Queue | Connect | Request | WebSocket | Health | Metadata | Unknown


@dataclass(frozen=True, slots=True)
class Address:
    """Whom a request is for, what it asks, and the caller's own query string, byte for byte."""

    target: Target
    asked: Asked
    query: str = ""


def parse_address(
    raw_path: bytes | str, raw_query: bytes | str, direct: ById | None = None
) -> Address | None:
    """The address that an undecoded path and query string form; None where it is none of the gateway's.

    `direct` is the actor that headers or subprotocols name: then the path has no gateway part. Raises
    MalformedMessage for reserved parameters that are unknown, doubled or missing, and for text that is no
    UTF-8.
    """
    path, query = _text(raw_path), _text(raw_query)
    if not path.startswith(_GATEWAY):
        if direct is None:
            return None
        return Address(direct, _asked(path[1:]), query)
    segment, _, rest = path.removeprefix(_GATEWAY).partition("/")
    reserved, own = _split_query(query)
    target = _by_key(segment, reserved) if reserved else _by_id(segment, direct)
    return Address(target, _asked(rest), own)


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode("latin-1")  # undecoded: each byte stays itself


def _decoded(raw: str, name: str) -> str:
    try:
        return unquote_to_bytes(raw.encode("latin-1")).decode()
    except UnicodeError:
        raise unwanted(name, raw, "UTF-8") from None


def _asked(rest: str) -> Asked:
    verb, _, tail = rest.partition("/")
    if verb in ("request", "websocket"):
        return Request("/" + tail) if verb == "request" else WebSocket("/" + tail)
    if verb in ("action", "queue") and tail and "/" not in tail:
        name = _decoded(tail, verb)
        return Action(name) if verb == "action" else Queue(name)
    alone = _ALONE.get(verb) if not tail else None
    return alone or Unknown("/" + rest)


_ALONE: Final[dict[str, Asked]] = {"connect": Connect(), "health": Health(), "metadata": Metadata()}


def _by_id(segment: str, direct: ById | None) -> ById:
    raw_id, at, raw_token = segment.partition("@")
    actor_id = _decoded(raw_id, "actor id")
    if not actor_id:
        raise malformed("actor id: wanted text that is not empty")
    token = _decoded(raw_token, "token") if at else None
    return ById(actor_id, token, direct is not None and direct.skip_ready_wait)


def _split_query(query: str) -> tuple[dict[str, str], str]:
    """The reserved parameters by name, decoded, and the rest of the query as it came."""
    reserved: dict[str, str] = {}
    own: list[str] = []
    for part in query.split("&"):
        raw_name, _, raw_value = part.partition("=")
        name = _form_decoded(raw_name) if _may_be_reserved(raw_name) else ""
        if not name.startswith(_RESERVED):
            own.append(part)
            continue
        if name not in _PARAMETERS:
            raise unwanted("query parameter", name, "one that the gateway knows")
        if name in reserved:
            raise malformed(f"query parameter {name}: given twice")
        reserved[name] = _form_decoded(raw_value)
    return reserved, "&".join(own)


def _may_be_reserved(raw_name: str) -> bool:
    """A name may be encoded where it need not be; one that is not UTF-8 is the caller's own business."""
    return unquote_to_bytes(raw_name[: 3 * len(_RESERVED)].encode("latin-1", "replace")).startswith(b"rvt-")


def _form_decoded(raw: str) -> str:
    return _decoded(raw.replace("+", " "), "query parameter")


_CREATION: Final = ("rvt-runner", "rvt-pool", "rvt-input", "rvt-region", "rvt-crash-policy")
_PARAMETERS: Final = frozenset(
    ("rvt-namespace", "rvt-method", "rvt-key", "rvt-token", "rvt-skip-ready-wait", *_CREATION)
)


def _by_key(segment: str, given: dict[str, str]) -> ByKey:
    name = _decoded(segment, "actor name")
    if not name:
        raise malformed("actor name: wanted text that is not empty")
    method = given.get("rvt-method")
    if method not in ("get", "getOrCreate"):
        raise unwanted("rvt-method", method, "get or getOrCreate")
    if method == "get" and (useless := [one for one in _CREATION if one in given]):
        raise malformed(f"{useless[0]}: has no meaning where nothing is created")
    if "rvt-pool" in given and "rvt-runner" in given:
        raise malformed("rvt-pool and rvt-runner: two names of one parameter, both given")
    return ByKey(
        name,
        keys.read_query_key(given.get("rvt-key")),
        create=method == "getOrCreate",
        namespace=given.get("rvt-namespace") or "default",
        pool=given.get("rvt-runner", given.get("rvt-pool")),
        region=given.get("rvt-region"),
        crash_policy=given.get("rvt-crash-policy"),
        input=_read_input(given.get("rvt-input")),
        token=given.get("rvt-token"),
        skip_ready_wait=_read_flag(given.get("rvt-skip-ready-wait", "false")),
    )


def _read_flag(value: str) -> bool:
    if value not in ("true", "false", "1", "0"):
        raise unwanted("rvt-skip-ready-wait", value, "true or false")
    return value in ("true", "1")


def _read_input(value: str | None) -> Any:
    if value is None:
        return UNDEFINED
    return revive(cbor.load(decode_base64(value, "rvt-input"), FROM_CLIENT), FROM_CLIENT.depth)


def gateway_path(target: Target, asked: Asked, query: str = "") -> str:
    """The path and query string that `parse_address` reads as just that.

    `query` is the caller's own, encoded. Raises InvalidRequest for a key that a query cannot
    carry: resolve it to an id first.
    """
    own = f"?{query}" if query else ""
    if isinstance(target, ById):
        token = "" if target.token is None else "@" + _component(target.token)
        return f"{_GATEWAY}{_component(target.actor_id)}{token}{_asked_path(asked)}{own}"
    if not keys.survives_query(target.key):
        raise InvalidRequest.argument("key", list(target.key), "elements without a comma")
    reserved = "&".join(f"{name}={_form(value)}" for name, value in _parameters(target) if value is not None)
    return f"{_GATEWAY}{_component(target.name)}{_asked_path(asked)}{own}{'&' if own else '?'}{reserved}"


def _parameters(target: ByKey) -> list[tuple[str, str | None]]:
    creation: list[tuple[str, str | None]] = []
    if target.create:
        creation = [("rvt-region", target.region), ("rvt-crash-policy", target.crash_policy or "sleep")]
    return [
        ("rvt-namespace", target.namespace),
        ("rvt-method", "getOrCreate" if target.create else "get"),
        ("rvt-runner", (target.pool or "default") if target.create else None),
        ("rvt-key", keys.query_key(target.key)),
        ("rvt-input", _input(target.input) if target.create else None),
        *creation,
        ("rvt-token", target.token),
        ("rvt-skip-ready-wait", "true" if target.skip_ready_wait else None),
    ]


def _input(value: Any) -> str | None:
    if value is UNDEFINED:
        return None
    return base64.urlsafe_b64encode(cbor.dumps(value)).decode("ascii").rstrip("=")


def _asked_path(asked: Asked) -> str:
    if isinstance(asked, Action | Queue):
        return f"/{type(asked).__name__.lower()}/{_component(asked.name)}"
    if isinstance(asked, Request | WebSocket):
        return f"/{type(asked).__name__.lower()}{asked.path}"
    return asked.path if isinstance(asked, Unknown) else f"/{type(asked).__name__.lower()}"


def _component(text: str) -> str:
    return quote(text, safe=_COMPONENT_SAFE)


def _form(text: str) -> str:
    return quote_plus(text, safe="*").replace("~", "%7E")
