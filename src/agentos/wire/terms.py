"""What a request says besides its address: encoding, parameters of the connection, token.

An HTTP request says it in headers. A WebSocket handshake can say it only in the subprotocols it offers,
since a browser lets a page set nothing else; the server has to select one of them, `rivet`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes

from agentos.wire import jsontext
from agentos.wire.address import ById
from agentos.wire.encodings import JSON, Encoding, encoding_named
from agentos.wire.malformed import FROM_CLIENT, unwanted
from agentos.wire.values import UNDEFINED, encode_tree, revive

SUBPROTOCOL: Final = "rivet"
"""The one to select in the answer to a handshake: without it, clients never get connected."""

_NATIVE_BYTES: Final = "native"
"""A client that says so takes bytes as CBOR's own byte strings. Servers that do not know it send tagged pairs."""
_MOST_TEXT: Final = 65_536


@dataclass(frozen=True, slots=True)
class Terms:
    """All that headers or subprotocols say. `actor_id` is set where they, not the path, name the actor."""

    encoding: Encoding = JSON
    params: Any = UNDEFINED
    token: str | None = None
    actor_id: str | None = None
    skip_ready_wait: bool = False

    @property
    def direct(self) -> ById | None:
        """The actor that the terms name, for `parse_address`."""
        return ById(self.actor_id, self.token, self.skip_ready_wait) if self.actor_id else None


def terms_of_headers(headers: Iterable[tuple[bytes, bytes]]) -> Terms:
    """The terms of an HTTP request, from its raw headers. Raises MalformedMessage."""
    given: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1").lower()
        if name in _HEADERS:
            given.setdefault(name, _header_text(raw_value))
    return Terms(
        encoding_named(
            given.get("x-rivet-encoding"), native_bytes=given.get("x-agentos-bytes") == _NATIVE_BYTES
        ),
        _read_params(given.get("x-rivet-conn-params")),
        given.get("x-rivet-token") or bearer_token(given.get("authorization")),
        _read_target(given.get("x-rivet-target"), given.get("x-rivet-actor")),
        given.get("x-rivet-skip-ready-wait") in ("1", "true"),
    )


_HEADERS: Final = frozenset(
    (
        "authorization",
        "x-agentos-bytes",
        "x-rivet-encoding",
        "x-rivet-conn-params",
        "x-rivet-token",
        "x-rivet-target",
        "x-rivet-actor",
        "x-rivet-skip-ready-wait",
    )
)


def _header_text(raw: bytes) -> str:
    """A browser sends characters up to U+00FF as single bytes, everybody else sends UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def bearer_token(authorization: str | None) -> str | None:
    """The token in an Authorization header; None where it has none."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def terms_of_subprotocols(offered: Iterable[str]) -> Terms:
    """The terms of a WebSocket handshake, from the subprotocols it offers. Raises MalformedMessage."""
    given: dict[str, str] = {}
    for one in offered:
        name, _, value = one.strip().partition(".")
        given.setdefault(name, value)
    return Terms(
        encoding_named(given.get("rivet_encoding"), native_bytes=given.get("agentos_bytes") == _NATIVE_BYTES),
        _read_params(_decoded(given.get("rivet_conn_params"))),
        given.get("rivet_token"),
        _read_target(given.get("rivet_target"), given.get("rivet_actor")),
        "rivet_skip_ready_wait" in given,
    )


def _decoded(raw: str | None) -> str | None:
    if raw is None:
        return None
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeError:
        raise unwanted("connection parameters", raw, "percent-encoded UTF-8") from None


def _read_params(text: str | None) -> Any:
    if text is None:
        return UNDEFINED
    if len(text) > _MOST_TEXT:
        raise unwanted("connection parameters", text, f"at most {_MOST_TEXT} characters")
    tree = jsontext.load(text, FROM_CLIENT)
    return revive(tree, FROM_CLIENT.depth, lenient=True)  # clients write these without marks


def _read_target(target: str | None, actor_id: str | None) -> str | None:
    if target is None:
        return None
    if target != "actor" or not actor_id:
        raise unwanted("target", target, "actor, together with its id")
    return actor_id


def select_subprotocol(offered: Sequence[str]) -> str | None:
    """The subprotocol to select; None, for a plain WebSocket, where the client offers none that is known."""
    return SUBPROTOCOL if SUBPROTOCOL in (one.strip() for one in offered) else None


def headers_of_terms(terms: Terms) -> list[tuple[str, str]]:
    """The headers with which a client says `terms`, parameters in ASCII."""
    said = [("x-rivet-encoding", terms.encoding.name)]
    if terms.encoding.native_bytes:
        said.append(("x-agentos-bytes", _NATIVE_BYTES))
    if terms.params is not UNDEFINED:
        said.append(("x-rivet-conn-params", _params_text(terms.params)))
    if terms.token is not None:
        said.append(("x-rivet-token", terms.token))
    if terms.actor_id is not None:
        said += [("x-rivet-target", "actor"), ("x-rivet-actor", terms.actor_id)]
    if terms.skip_ready_wait:
        said.append(("x-rivet-skip-ready-wait", "1"))
    return said


def _params_text(params: Any) -> str:
    return json.dumps(encode_tree(params, jsontext.JSON))  # ASCII, which headers need


def subprotocols_of_terms(terms: Terms) -> list[str]:
    """The subprotocols with which a client says `terms`, in the order that given clients use."""
    said = [SUBPROTOCOL, f"rivet_encoding.{terms.encoding.name}"]
    if terms.encoding.native_bytes:
        said.append(f"agentos_bytes.{_NATIVE_BYTES}")
    if terms.actor_id is not None:
        said += ["rivet_target.actor", f"rivet_actor.{terms.actor_id}"]
        if terms.token is not None:
            said.append(f"rivet_token.{terms.token}")
    if terms.skip_ready_wait:
        said.append("rivet_skip_ready_wait")
    if terms.params is not UNDEFINED:  # every character escaped that is not allowed in a header's token
        said.append("rivet_conn_params." + quote(_params_text(terms.params), safe="!~*'"))
    return said
