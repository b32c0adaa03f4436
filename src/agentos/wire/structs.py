"""Messages as BARE structs, the shape of the bare encoding.

A version stands in front, and a tag follows it where one of several messages may come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from agentos.errors import InvalidRequest
from agentos.wire import cbor
from agentos.wire.bare import BareReader, BareWriter
from agentos.wire.cbor import PAIRS, PairsForm
from agentos.wire.malformed import Bounds, MalformedMessage, check_size, malformed, unwanted
from agentos.wire.messages import FIELDS, FIRST_VERSION, VERSION, ActorSpecifier, Field, Kind
from agentos.wire.values import revive

_Message = TypeVar("_Message")


def write_body(message: object, version: int = VERSION, form: PairsForm = PAIRS) -> bytes:
    """The bytes of a message that stands alone, as HTTP bodies do; `form` is that of the CBOR inside."""
    return _framed(message, version, None, form)


def write_frame(
    message: object, kinds: tuple[type, ...], version: int = VERSION, form: PairsForm = PAIRS
) -> bytes:
    """The bytes of a WebSocket frame with `message`, which is one of `kinds`."""
    return _framed(message, version, kinds.index(type(message)), form)


def _framed(message: object, version: int, tag: int | None, form: PairsForm) -> bytes:
    if not FIRST_VERSION.get(type(message), 1) <= version <= VERSION:
        raise InvalidRequest.argument("version", version, f"one that has {type(message).__name__}")
    out = BareWriter()
    out.fixed(version, 2)
    if tag is not None:
        out.fixed(tag, 1)
    _write_struct(out, message, version, form)
    return out.written()


def read_body(kind: type[_Message], data: bytes, bounds: Bounds) -> _Message:
    """The message that `data` holds. Raises MalformedMessage."""
    check_size(len(data), bounds)
    reader = BareReader(data)
    return _finished(reader, kind, _read_version(reader), bounds)


def read_frame(kinds: tuple[type[_Message], ...], data: bytes, bounds: Bounds) -> _Message:
    """The message, one of `kinds`, that a WebSocket frame holds. Raises MalformedMessage."""
    check_size(len(data), bounds)
    reader = BareReader(data)
    version = _read_version(reader)
    tag = reader.fixed(1)
    if tag >= len(kinds):
        raise malformed(f"BARE: no message has tag {tag}")
    return _finished(reader, kinds[tag], version, bounds)


def _read_version(reader: BareReader) -> int:
    version = reader.fixed(2)
    if not 1 <= version <= VERSION:
        raise malformed(f"BARE: version {version} of the protocol is not known here, 1 to {VERSION} are")
    return version


def _finished(reader: BareReader, kind: type[_Message], version: int, bounds: Bounds) -> _Message:
    if version < FIRST_VERSION.get(kind, 1):
        raise malformed(f"BARE: version {version} has no {kind.__name__}")
    message = _read_struct(reader, kind, version, bounds)
    reader.end()
    return message


_FIELDS: Final[dict[tuple[type, int], tuple[Field, ...]]] = {
    (kind, version): tuple(field for field in fields if field.since <= version <= field.until)
    for kind, fields in FIELDS.items()
    for version in range(1, VERSION + 1)
}
"""Those that a version has."""


def _read_struct(reader: BareReader, kind: type[_Message], version: int, bounds: Bounds) -> _Message:
    values: dict[str, Any] = {}
    for field in _FIELDS[kind, version]:
        try:
            if field.optional and not reader.boolean():
                values[field.attribute] = None
            elif field.kind is _SPECIFIER:
                values[field.attribute] = _read_struct(reader, ActorSpecifier, version, bounds)
            else:
                values[field.attribute] = _READ[field.kind](reader, bounds)
        except MalformedMessage as problem:
            problem.action_id = values.get("id")
            raise
    values.pop("", None)  # what this version no longer has
    return kind(**values)


def _read_value(reader: BareReader, bounds: Bounds) -> Any:
    start, end = reader.span(reader.uint())
    tree = cbor.load(reader.whole, bounds, start, end)
    # The name of a tagged pair begins with it: where there is none, there is nothing to revive.
    return tree if reader.whole.find(b"$", start, end) < 0 else revive(tree, bounds.depth)


def _read_arguments(reader: BareReader, bounds: Bounds) -> tuple[Any, ...]:
    value = _read_value(reader, bounds)
    if type(value) is not list:
        raise unwanted("args", value, "an array")
    return tuple(value)


_SPECIFIER: Final = Kind.SPECIFIER
_READ: Final[dict[Kind, Callable[[BareReader, Bounds], Any]]] = {
    Kind.TEXT: lambda reader, bounds: reader.text(),
    Kind.BOOL: lambda reader, bounds: reader.boolean(),
    Kind.ID: lambda reader, bounds: reader.uint(),
    Kind.UINT: lambda reader, bounds: reader.uint(),
    Kind.U64: lambda reader, bounds: reader.fixed(8),
    Kind.VALUE: _read_value,
    Kind.ARGUMENTS: _read_arguments,
}


def _write_struct(out: BareWriter, message: object, version: int, form: PairsForm) -> None:
    for field in _FIELDS[type(message), version]:
        value = getattr(message, field.attribute) if field.attribute else ""
        if field.optional:
            out.boolean(value is not None)
            if value is None:
                continue
        if field.kind is _SPECIFIER:
            _write_struct(out, value, version, form)
        else:
            _WRITE[field.kind](out, value, form)


_WRITE: Final[dict[Kind, Callable[[BareWriter, Any, PairsForm], None]]] = {
    Kind.TEXT: lambda out, value, form: out.text(value),
    Kind.BOOL: lambda out, value, form: out.boolean(value),
    Kind.ID: lambda out, value, form: out.uint(value),
    Kind.UINT: lambda out, value, form: out.uint(value),
    Kind.U64: lambda out, value, form: out.fixed(value, 8),
    Kind.VALUE: lambda out, value, form: out.data(cbor.dumps(value, form)),
    Kind.ARGUMENTS: lambda out, value, form: out.data(cbor.dumps(list(value), form)),
}
