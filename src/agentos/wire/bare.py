"""BARE, the binary format of the bare encoding: the primitives that its structs are made of.

Text and data carry their length in front, integers are little endian, and a uint is a LEB128 varint in
its shortest form.
"""

from __future__ import annotations

from agentos.errors import InvalidRequest
from agentos.wire.malformed import MalformedMessage, malformed
from agentos.wire.values import clean

_MOST = 2**64 - 1
_LONGEST_UINT = 10
_BYTES = [bytes((one,)) for one in range(256)]


class BareReader:
    """Reads primitives one after another. Each raises MalformedMessage where the bytes are no such thing."""

    __slots__ = ("_at", "whole")

    def __init__(self, data: bytes) -> None:
        self.whole = data
        """The message that is read."""
        self._at = 0

    def take(self, size: int) -> bytes:
        at, end = self.span(size)
        return self.whole[at:end]

    def span(self, size: int) -> tuple[int, int]:
        """As `take`, but only where it begins and ends: nothing is copied."""
        at = self._at
        self._at = end = at + size
        if end > len(self.whole):
            raise _ended()
        return at, end

    def byte(self) -> int:
        at = self._at
        if at >= len(self.whole):
            raise _ended()
        self._at = at + 1
        return self.whole[at]

    def fixed(self, size: int) -> int:
        """An unsigned integer of `size` bytes: u8, u16 or u64."""
        return int.from_bytes(self.take(size), "little")

    def uint(self) -> int:
        value = self.byte()
        if value < 0x80:
            return value
        value &= 0x7F
        for index in range(1, _LONGEST_UINT):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if value > _MOST or byte == 0:
                    break
                return value
        raise malformed("BARE: a uint that is not in its shortest form, or beyond 64 bits")

    def boolean(self) -> bool:
        byte = self.byte()
        if byte > 1:
            raise malformed(f"BARE: a bool of {byte}")
        return byte == 1

    def text(self) -> str:
        try:
            return self.take(self.uint()).decode()
        except UnicodeDecodeError:
            raise malformed("BARE: text that is not UTF-8") from None

    def end(self) -> None:
        """Raise MalformedMessage where anything is left."""
        if self._at != len(self.whole):
            raise malformed(f"BARE: {len(self.whole) - self._at} bytes after the end of the message")


def _ended() -> MalformedMessage:
    return malformed("BARE: the message ends inside a value")


class BareWriter:
    """Collects primitives; `written` answers the bytes."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def written(self) -> bytes:
        return b"".join(self._parts)

    def fixed(self, value: int, size: int) -> None:
        """An unsigned integer of `size` bytes: u8, u16 or u64."""
        self._parts.append(_checked(value, (1 << 8 * size) - 1).to_bytes(size, "little"))

    def uint(self, value: int) -> None:
        _checked(value, _MOST)
        if value < 0x80:
            self._parts.append(_BYTES[value])
            return
        digits = bytearray()
        while value > 0x7F:
            digits.append(value & 0x7F | 0x80)
            value >>= 7
        digits.append(value)
        self._parts.append(bytes(digits))

    def boolean(self, value: bool) -> None:
        self._parts.append(b"\1" if value else b"\0")

    def data(self, value: bytes) -> None:
        self.uint(len(value))
        self._parts.append(value)

    def text(self, value: str) -> None:
        self.data(clean(value).encode())


def _checked(value: int, most: int) -> int:
    if not 0 <= value <= most:
        raise InvalidRequest.argument("number", value, f"a whole number from 0 to {most}")
    return value
