"""Messages as BARE structs, the shape of the bare encoding.

A version stands in front, and a tag follows it where one of several messages may come.
"""

from __future__ import annotations

from typing import Any, TypeVar

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
    check_size(data, bounds)
    reader = BareReader(data)
    return _finished(reader, kind, _read_version(reader), bounds)


def read_frame(kinds: tuple[type[_Message], ...], data: bytes, bounds: Bounds) -> _Message:
    """The message, one of `kinds`, that a WebSocket frame holds. Raises MalformedMessage."""
    check_size(data, bounds)
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


def _read_struct(reader: BareReader, kind: type[_Message], version: int, bounds: Bounds) -> _Message:
    values: dict[str, Any] = {}
    for field in FIELDS[kind]:
        if not field.since <= version <= field.until:
            continue
        try:
            values[field.attribute] = _read_field(reader, field, version, bounds)
        except MalformedMessage as problem:
            problem.action_id = values.get("id")
            raise
    values.pop("", None)  # what this version no longer has
    return kind(**values)


def _read_field(reader: BareReader, field: Field, version: int, bounds: Bounds) -> Any:
    if field.optional and not reader.boolean():
        return None
    if field.kind is Kind.SPECIFIER:
        return _read_struct(reader, ActorSpecifier, version, bounds)
    if field.kind is Kind.TEXT:
        return reader.text()
    if field.kind is Kind.BOOL:
        return reader.boolean()
    if field.kind is Kind.U64:
        return reader.fixed(8)
    if field.kind is Kind.UINT or field.kind is Kind.ID:
        return reader.uint()
    value = revive(cbor.load(reader.data(), bounds), bounds.depth)
    if field.kind is Kind.ARGUMENTS:
        if type(value) is not list:
            raise unwanted(field.wire, value, "an array")
        return tuple(value)
    return value


def _write_struct(out: BareWriter, message: object, version: int, form: PairsForm) -> None:
    for field in FIELDS[type(message)]:
        if field.since <= version <= field.until:
            value = getattr(message, field.attribute) if field.attribute else ""
            _write_field(out, field, value, version, form)


def _write_field(out: BareWriter, field: Field, value: Any, version: int, form: PairsForm) -> None:
    if field.optional:
        out.boolean(value is not None)
        if value is None:
            return
    if field.kind is Kind.SPECIFIER:
        _write_struct(out, value, version, form)
    elif field.kind is Kind.TEXT:
        out.text(value)
    elif field.kind is Kind.BOOL:
        out.boolean(value)
    elif field.kind is Kind.U64:
        out.fixed(value, 8)
    elif field.kind is Kind.UINT or field.kind is Kind.ID:
        out.uint(value)
    else:
        out.data(cbor.dumps(list(value) if field.kind is Kind.ARGUMENTS else value, form))
