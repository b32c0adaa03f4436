"""CBOR's tags, as far as the protocol uses them: times, big integers, typed arrays, sets and maps."""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from agentos.wire.malformed import malformed, shown
from agentos.wire.values import as_set, whole

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_BIGNUM: Final = 416
"""Bytes, for about the thousand digits that a $BigInt may have."""


def _expect(tag: int, value: Any, kind: type, name: str) -> None:
    if type(value) is not kind:
        raise malformed(f"CBOR: tag {tag} wants {name}, got {shown(value)}")


def _read_moment(tag: int, value: Any) -> datetime:
    """A time beyond the years of Python's datetime is malformed, as is JavaScript's invalid Date."""
    if type(value) not in (int, float) or value != value:
        raise malformed(f"CBOR: tag {tag} wants a time in seconds, got {shown(value)}")
    try:
        return EPOCH + timedelta(seconds=value)
    except OverflowError:
        raise malformed(f"CBOR: a time of {shown(value)} seconds is out of range") from None


def _read_moment_text(tag: int, value: Any) -> datetime:
    _expect(tag, value, str, "text")
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise malformed(f"CBOR: tag {tag} wants a time, got {shown(value)}") from None
    if moment.tzinfo is None:
        raise malformed(f"CBOR: tag {tag} wants a time with its zone, got {shown(value)}")
    return moment


def _read_bignum(tag: int, value: Any) -> int:
    _expect(tag, value, bytes, "bytes")
    if len(value) > _LONGEST_BIGNUM:
        raise malformed("CBOR: a number of too many digits")
    absolute = int.from_bytes(value, "big")
    return absolute if tag == 2 else -1 - absolute


def _read_bytes(tag: int, value: Any) -> bytes:
    _expect(tag, value, bytes, "bytes")
    return bytes(value)


def _read_set(tag: int, value: Any) -> Any:
    _expect(tag, value, list, "an array")
    return as_set(value)


def _read_map(tag: int, value: Any) -> dict[Any, Any]:
    _expect(tag, value, dict, "a map")
    return dict(value)


_INTEGERS: Final = "BHIQBHIQbhiq hiq"
_REALS: Final = "efd efd "
NUMBER_ARRAYS: Final = {
    64 + index: code for index, code in enumerate(_INTEGERS + _REALS) if code != " " and index not in (0, 4)
}
"""Tags of typed arrays, each with the struct code of its elements. 64 and 68 are bytes."""


def element_size(tag: int) -> int:
    """Bytes of one element of a typed array."""
    return struct.calcsize("=" + NUMBER_ARRAYS[tag])


def _read_number_array(tag: int, value: Any) -> list[int | float]:
    _expect(tag, value, bytes, "bytes")
    code, size = NUMBER_ARRAYS[tag], element_size(tag)
    if len(value) % size:
        raise malformed(f"CBOR: tag {tag} wants elements of {size} bytes, got {len(value)} bytes in all")
    little_endian = tag & 4
    numbers = struct.unpack(f"{'<' if little_endian else '>'}{len(value) // size}{code}", value)
    return [whole(one) for one in numbers] if tag >= 80 else list(numbers)


TAGS: dict[int, Callable[[int, Any], Any]] = {
    0: _read_moment_text,
    1: _read_moment,
    2: _read_bignum,
    3: _read_bignum,
    64: _read_bytes,
    68: _read_bytes,
    258: _read_set,
    259: _read_map,
    **dict.fromkeys(NUMBER_ARRAYS, _read_number_array),
}
"""What is made of the value after a tag, for each tag that the protocol has."""
