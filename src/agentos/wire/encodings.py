"""The three encodings of the protocol, as objects with the same methods.

A connection's frames and an HTTP exchange's bodies are in one of them, which the client chose.
Decoding raises MalformedMessage and nothing else; encoding raises InvalidRequest for a value that
cannot be sent.
"""

from __future__ import annotations

from typing import Any, Final, Protocol, TypeAlias, TypeVar

from agentos.wire import cbor, envelope, jsontext, structs, trees
from agentos.wire.malformed import FROM_CLIENT, FROM_SERVER, Bounds, MalformedMessage, malformed, unwanted
from agentos.wire.messages import (
    TO_CLIENT,
    TO_SERVER,
    HttpActionRequest,
    HttpActionResponse,
    HttpMessage,
    HttpQueueSendRequest,
    HttpQueueSendResponse,
    HttpResponseError,
    ToClient,
    ToServer,
)

Frame: TypeAlias = str | bytes
"""What a WebSocket carries: text where it is str."""

_Http = TypeVar(
    "_Http",
    HttpActionRequest,
    HttpActionResponse,
    HttpResponseError,
    HttpQueueSendRequest,
    HttpQueueSendResponse,
)
_FROM_CLIENT: Final = (HttpActionRequest, HttpQueueSendRequest)
_TO_CLIENT_BY_TAG: Final[dict[str, type[ToClient]]] = {kind.__name__: kind for kind in TO_CLIENT}
_TO_SERVER_BY_TAG: Final[dict[str, type[ToServer]]] = {kind.__name__: kind for kind in TO_SERVER}


class Encoding(Protocol):
    """One encoding, for both sides."""

    @property
    def name(self) -> str:
        """json, cbor or bare."""

    @property
    def binary(self) -> bool:
        """Whether frames are sent as binary ones; text ones are refused then."""

    @property
    def native_bytes(self) -> bool:
        """Whether bytes are CBOR's own byte strings, in both directions, instead of tagged pairs with base64."""

    @property
    def content_type(self) -> str:
        """Of HTTP bodies."""

    def encode_frame(self, message: ToClient | ToServer) -> Frame:
        """A WebSocket frame with `message`."""

    def decode_to_server(self, frame: Frame, bounds: Bounds = FROM_CLIENT) -> ToServer:
        """What a client sent."""

    def decode_to_client(self, frame: Frame, bounds: Bounds = FROM_SERVER) -> ToClient:
        """What a server sent."""

    def encode_body(self, message: HttpMessage) -> bytes:
        """An HTTP body with `message`."""

    def decode_body(self, kind: type[_Http], data: bytes, bounds: Bounds | None = None) -> _Http:
        """The message, of this `kind`, in an HTTP body; the side that sends it decides on its bounds."""


class Json:
    """Text, and all that JSON has no words for as tagged pairs. What curl and people write."""

    name: Final = "json"
    binary: Final = False
    native_bytes: Final = False
    content_type: Final = "application/json"

    def encode_frame(self, message: ToClient | ToServer) -> str:
        return jsontext.dump(trees.body_tree(message, jsontext.JSON, _pair))

    def decode_to_server(self, frame: Frame, bounds: Bounds = FROM_CLIENT) -> ToServer:
        try:
            tree = jsontext.load(frame, bounds)
        except MalformedMessage as problem:
            found = envelope.json_id(frame, bounds.items) if isinstance(frame, str) else None
            if found is not None:
                problem.action_id = trees.read_uint("id", jsontext.load(frame[slice(*found)], bounds))
            raise
        return trees.read_body(_TO_SERVER_BY_TAG, tree, trees.Revival(bounds.depth))

    def decode_to_client(self, frame: Frame, bounds: Bounds = FROM_SERVER) -> ToClient:
        return trees.read_body(_TO_CLIENT_BY_TAG, jsontext.load(frame, bounds), trees.Revival(bounds.depth))

    def encode_body(self, message: HttpMessage) -> bytes:
        return jsontext.dump(trees.message_tree(message, jsontext.JSON, _pair)).encode()

    def decode_body(self, kind: type[_Http], data: bytes, bounds: Bounds | None = None) -> _Http:
        bounds = bounds or _bounds(kind)
        return trees.read_message(kind, jsontext.load(data, bounds), trees.Revival(bounds.depth))


class Cbor:
    """CBOR: a client sends its own words for bytes and the like, a server sends tagged pairs.

    Other clients send pairs too. As a client's array may look like one by chance, only what is certainly
    a pair is read as such.
    """

    name: Final = "cbor"
    binary: Final = True
    content_type: Final = "application/octet-stream"

    def __init__(self, *, native_bytes: bool = False) -> None:
        self.native_bytes = native_bytes
        self._to_client = cbor.BYTES if native_bytes else cbor.PAIRS

    def encode_frame(self, message: ToClient | ToServer) -> bytes:
        form = cbor.NATIVE if isinstance(message, TO_SERVER) else self._to_client
        return cbor.dump(trees.body_tree(message, form, cbor.wide))

    def decode_to_server(self, frame: Frame, bounds: Bounds = FROM_CLIENT) -> ToServer:
        data = _binary(frame)
        try:
            tree = cbor.load(data, bounds)
        except MalformedMessage as problem:
            found = envelope.cbor_id(data, bounds.items)
            if found is not None:
                problem.action_id = trees.read_uint("id", cbor.load(data, bounds, *found))
            raise
        return trees.read_body(_TO_SERVER_BY_TAG, tree, trees.Revival(bounds.depth, lenient=True))

    def decode_to_client(self, frame: Frame, bounds: Bounds = FROM_SERVER) -> ToClient:
        tree = cbor.load(_binary(frame), bounds)
        return trees.read_body(_TO_CLIENT_BY_TAG, tree, trees.Revival(bounds.depth))

    def encode_body(self, message: HttpMessage) -> bytes:
        form = cbor.NATIVE if isinstance(message, _FROM_CLIENT) else self._to_client
        return cbor.dump(trees.message_tree(message, form, cbor.wide))

    def decode_body(self, kind: type[_Http], data: bytes, bounds: Bounds | None = None) -> _Http:
        bounds = bounds or _bounds(kind)
        revival = trees.Revival(bounds.depth, lenient=kind in _FROM_CLIENT)
        return trees.read_message(kind, cbor.load(data, bounds), revival)


class Bare:
    """BARE structs with CBOR inside for what has no fixed type. The default of the JavaScript client."""

    name: Final = "bare"
    binary: Final = True
    content_type: Final = "application/octet-stream"

    def __init__(self, *, native_bytes: bool = False) -> None:
        self.native_bytes = native_bytes
        self._form = cbor.BYTES if native_bytes else cbor.PAIRS

    def encode_frame(self, message: ToClient | ToServer) -> bytes:
        kinds = TO_SERVER if isinstance(message, TO_SERVER) else TO_CLIENT
        return structs.write_frame(message, kinds, form=self._form)

    def decode_to_server(self, frame: Frame, bounds: Bounds = FROM_CLIENT) -> ToServer:
        return structs.read_frame(TO_SERVER, frame if type(frame) is bytes else _binary(frame), bounds)

    def decode_to_client(self, frame: Frame, bounds: Bounds = FROM_SERVER) -> ToClient:
        return structs.read_frame(TO_CLIENT, frame if type(frame) is bytes else _binary(frame), bounds)

    def encode_body(self, message: HttpMessage) -> bytes:
        return structs.write_body(message, form=self._form)

    def decode_body(self, kind: type[_Http], data: bytes, bounds: Bounds | None = None) -> _Http:
        return structs.read_body(kind, data, bounds or _bounds(kind))


JSON: Final[Encoding] = Json()
CBOR: Final[Encoding] = Cbor()
BARE: Final[Encoding] = Bare()
CBOR_BYTES: Final[Encoding] = Cbor(native_bytes=True)
BARE_BYTES: Final[Encoding] = Bare(native_bytes=True)
ENCODINGS: Final[dict[str, Encoding]] = {one.name: one for one in (JSON, CBOR, BARE)}
"""By name."""
_WITH_BYTES: Final[dict[str, Encoding]] = {one.name: one for one in (JSON, CBOR_BYTES, BARE_BYTES)}


def encoding_named(name: str | None, *, native_bytes: bool = False) -> Encoding:
    """The encoding that a client named; json where it named none. Raises MalformedMessage.

    `native_bytes`: the client takes CBOR's own byte strings. JSON has none.
    """
    found = (_WITH_BYTES if native_bytes else ENCODINGS).get(name or "json")
    if found is None:
        raise unwanted("encoding", name, "json, cbor or bare")
    return found


def decode_http_error(encoding: Encoding, content_type: str, data: bytes) -> HttpResponseError:
    """The error in an HTTP body: in JSON where the content type says so, however the request was encoded."""
    chosen = JSON if "application/json" in content_type.lower() else encoding
    return chosen.decode_body(HttpResponseError, data)


def encode_value(value: Any) -> bytes:
    """`value` as CBOR with tagged pairs, the form of an actor's input."""
    return cbor.dumps(value)


def _pair(number: int) -> list[str]:
    return ["$BigInt", str(number)]


def _bounds(kind: type) -> Bounds:
    return FROM_CLIENT if kind in _FROM_CLIENT else FROM_SERVER


def _binary(frame: Frame) -> bytes:
    if isinstance(frame, str):
        raise malformed("a binary frame is wanted, got a text frame")
    return frame
