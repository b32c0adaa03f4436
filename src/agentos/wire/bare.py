"""BARE, the binary format of the bare encoding: the primitives that its structs are made of.

Text and data carry their length in front, integers are little endian, and a uint is a LEB128 varint in
its shortest form. What reads takes the message and where in it to begin, and answers where the value ends besides the
value; it raises MalformedMessage where the bytes are no such thing.
"""

from __future__ import annotations

from typing import Final

from agentos.errors import InvalidRequest
from agentos.wire.malformed import MalformedMessage, malformed

_MOST: Final = 2**64 - 1
_LONGEST_UINT: Final = 10
BYTES: Final = [bytes((one,)) for one in range(256)]
"""Each byte; the first 128 are uints too."""


def read_uint(data: bytes, at: int) -> tuple[int, int]:
    """A uint."""
    value = shift = 0
    for byte in data[at : at + _LONGEST_UINT]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _MOST or (shift and not byte):
                break
            return value, at
        shift += 7
    else:
        if shift < 7 * _LONGEST_UINT:
            raise ended()
    raise malformed("BARE: a uint that is not in its shortest form, or beyond 64 bits")


def read_fixed(data: bytes, at: int, size: int) -> tuple[int, int]:
    """An unsigned integer of `size` bytes: u8, u16 or u64."""
    end = at + size
    if end > len(data):
        raise ended()
    return int.from_bytes(data[at:end], "little"), end


def read_bool(data: bytes, at: int) -> tuple[bool, int]:
    """A bool."""
    byte, at = read_fixed(data, at, 1)
    if byte > 1:
        raise malformed(f"BARE: a bool of {byte}")
    return byte == 1, at


def ended() -> MalformedMessage:
    """The error for a message that is too short."""
    return malformed("BARE: the message ends inside a value")


def uint(value: int) -> bytes:
    """The bytes of a uint. Raises InvalidRequest for what is none."""
    if not 0 <= value <= _MOST:
        raise _no_number(value, _MOST)
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def fixed(value: int, size: int) -> bytes:
    """The bytes of an unsigned integer of `size` bytes. Raises InvalidRequest for what is none."""
    if not 0 <= value < 1 << 8 * size:
        raise _no_number(value, (1 << 8 * size) - 1)
    return value.to_bytes(size, "little")


def _no_number(value: int, most: int) -> InvalidRequest:
    return InvalidRequest.argument("number", value, f"a whole number from 0 to {most}")
