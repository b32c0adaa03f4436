"""Messages as BARE structs, the shape of the bare encoding.

A version stands in front, and a tag follows it where one of several messages may come.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

from agentos.errors import InvalidRequest
from agentos.wire import bare, cbor
from agentos.wire.cbor import PAIRS, PairsForm
from agentos.wire.malformed import Bounds, MalformedMessage, malformed, oversized, unwanted
from agentos.wire.messages import FIELDS, FIRST_VERSION, VERSION, ActorSpecifier, Field, Kind
from agentos.wire.values import clean, revive

_Message = TypeVar("_Message")

_VERSION_BYTES: Final = 2

_FIELDS: Final[dict[tuple[type, int], tuple[Field, ...]]] = {
    (kind, version): tuple(field for field in fields if field.since <= version <= field.until)
    for kind, fields in FIELDS.items()
    for version in range(FIRST_VERSION.get(kind, 1), VERSION + 1)
}
"""Those that a version has, of the messages that it has."""

# Enumerations are compared with what they are: looking one up calls its hash, which is Python.
_TEXT: Final = Kind.TEXT
_BOOL: Final = Kind.BOOL
_ID: Final = Kind.ID
_UINT: Final = Kind.UINT
_U64: Final = Kind.U64
_ARGUMENTS: Final = Kind.ARGUMENTS
_SPECIFIER: Final = Kind.SPECIFIER


def write_body(message: object, version: int = VERSION, form: PairsForm = PAIRS) -> bytes:
    """The bytes of a message that stands alone, as HTTP bodies do; `form` is that of the CBOR inside."""
    parts = [version.to_bytes(_VERSION_BYTES, "little")]
    _write_fields(parts, message, version, form)
    return b"".join(parts)


def write_frame(
    message: object, kinds: tuple[type, ...], version: int = VERSION, form: PairsForm = PAIRS
) -> bytes:
    """The bytes of a WebSocket frame with `message`, which is one of `kinds`."""
    parts = [version.to_bytes(_VERSION_BYTES, "little"), bare.BYTES[kinds.index(type(message))]]
    _write_fields(parts, message, version, form)
    return b"".join(parts)


def _write_fields(parts: list[bytes], message: object, version: int, form: PairsForm) -> None:
    fields = _FIELDS.get((type(message), version))
    if fields is None:
        raise InvalidRequest.argument("version", version, f"one that has {type(message).__name__}")
    add = parts.append
    for field in fields:
        kind = field.kind
        value: Any = getattr(message, field.attribute) if field.attribute else ""
        if field.optional:
            add(b"\0" if value is None else b"\1")
            if value is None:
                continue
        if kind is _ID or kind is _UINT:
            add(bare.BYTES[value] if 0 <= value < 0x80 else bare.uint(value))
        elif kind is _BOOL:
            add(b"\1" if value else b"\0")
        elif kind is _U64:
            add(bare.fixed(value, 8))
        elif kind is _SPECIFIER:
            _write_fields(parts, value, version, form)
        else:
            data = clean(value).encode() if kind is _TEXT else cbor.dumps(value, form)
            size = len(data)
            add(bare.BYTES[size] if size < 0x80 else bare.uint(size))
            add(data)


def read_body(kind: type[_Message], data: bytes, bounds: Bounds) -> _Message:
    """The message that `data` holds. Raises MalformedMessage."""
    return _finished(kind, data, _VERSION_BYTES, _read_version(data, bounds), bounds)


def read_frame(kinds: tuple[type[_Message], ...], data: bytes, bounds: Bounds) -> _Message:
    """The message, one of `kinds`, that a WebSocket frame holds. Raises MalformedMessage."""
    version, at = _read_version(data, bounds), _VERSION_BYTES
    if len(data) == at:
        raise bare.ended()
    tag = data[at]
    if tag >= len(kinds):
        raise malformed(f"BARE: no message has tag {tag}")
    return _finished(kinds[tag], data, at + 1, version, bounds)


def _read_version(data: bytes, bounds: Bounds) -> int:
    if len(data) > bounds.bytes:
        raise oversized(len(data), bounds)
    if len(data) < _VERSION_BYTES:
        raise bare.ended()
    version = data[0] | data[1] << 8
    if not 1 <= version <= VERSION:
        raise malformed(f"BARE: version {version} of the protocol is not known here, 1 to {VERSION} are")
    return version


def _finished(kind: type[_Message], data: bytes, at: int, version: int, bounds: Bounds) -> _Message:
    if (kind, version) not in _FIELDS:
        raise malformed(f"BARE: version {version} has no {kind.__name__}")
    message, at = _read_struct(kind, data, at, version, bounds)
    if at != len(data):
        raise malformed(f"BARE: {len(data) - at} bytes after the end of the message")
    return message


def _read_struct(
    kind: type[_Message], data: bytes, at: int, version: int, bounds: Bounds
) -> tuple[_Message, int]:
    size = len(data)
    values: dict[str, Any] = {}
    for field in _FIELDS[kind, version]:
        what = field.kind
        try:
            there = True
            if field.optional:
                there, at = bare.read_bool(data, at)
            if not there:
                value: Any = None
            elif what is _BOOL:
                value, at = bare.read_bool(data, at)
            elif what is _U64:
                value, at = bare.read_fixed(data, at, 8)
            elif what is _SPECIFIER:
                value, at = _read_struct(ActorSpecifier, data, at, version, bounds)
            else:
                if at < size and data[at] < 0x80:
                    value = data[at]
                    at += 1
                else:
                    value, at = bare.read_uint(data, at)
                if what is not _ID and what is not _UINT:  # what comes is as long as that
                    start, at = at, at + value
                    if at > size:
                        raise bare.ended()
                    value = (
                        _read_text(data[start:at])
                        if what is _TEXT
                        else _read_value(data, start, at, what, bounds)
                    )
        except MalformedMessage as problem:
            problem.action_id = values.get("id")
            raise
        values[field.attribute] = value
    values.pop("", None)  # what this version no longer has
    return kind(**values), at


def _read_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise malformed("BARE: text that is not UTF-8") from None


def _read_value(data: bytes, start: int, end: int, kind: Kind, bounds: Bounds) -> Any:
    value = cbor.load(data, bounds, start, end)
    # The name of a tagged pair begins with it: where there is none, there is nothing to revive.
    if data.find(b"$", start, end) >= 0:
        value = revive(value, bounds.depth)
    if kind is not _ARGUMENTS:
        return value
    if type(value) is not list:
        raise unwanted("args", value, "an array")
    return tuple(value)
