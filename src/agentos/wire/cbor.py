"""CBOR in the profile that the protocol's JavaScript side reads and writes.

What is sent has its numbers in the form that JavaScript takes for a number: a long integer would arrive as
a bigint there. Reading knows only what the protocol uses: the tags of a whole CBOR compile regular
expressions, parse mail and compute powers that the sender chose.
"""

from __future__ import annotations

import struct
from datetime import datetime
from typing import Any, Final

from agentos.wire.cbor_tags import EPOCH, NUMBER_ARRAYS, TAGS, element_size
from agentos.wire.cbor_writer import Tagged, Wide, dump
from agentos.wire.malformed import Bounds, MalformedMessage, check_size, malformed
from agentos.wire.values import (
    SAFE_INTEGER,
    UNDEFINED,
    Form,
    big_integer,
    check_big,
    clean,
    encode_tree,
    whole,
)

__all__ = ["BYTES", "NATIVE", "PAIRS", "PairsForm", "dump", "dumps", "load", "wide"]

_SHORT: Final = 2**32


class PairsForm(Form):
    """What a JavaScript client reads: tagged pairs, and numbers that arrive as numbers."""

    def integer(self, value: int) -> Any:
        if -_SHORT <= value < _SHORT:
            return value
        return float(value) if -SAFE_INTEGER <= value <= SAFE_INTEGER else big_integer(value)

    def moment(self, value: datetime) -> Any:
        return Tagged(1, (value - EPOCH).total_seconds())


class NativeForm(PairsForm):
    """What a client sends in the cbor encoding: its own words, no pairs, no mark on what looks like one."""

    escapes = False

    def integer(self, value: int) -> Any:
        if -_SHORT <= value < _SHORT:
            return value
        return float(value) if -SAFE_INTEGER <= value <= SAFE_INTEGER else check_big(value)

    def binary(self, value: bytes) -> Any:
        return value

    def undefined(self) -> Any:
        return UNDEFINED

    def members(self, value: list[Any]) -> Any:
        return Tagged(258, value)


class BytesForm(PairsForm):
    """Tagged pairs, but bytes as CBOR's own byte strings: a quarter less to send, and nothing to convert."""

    def binary(self, value: bytes) -> Any:
        return value


PAIRS = PairsForm()
NATIVE = NativeForm()
BYTES = BytesForm()


def wide(number: int) -> object:
    """`number` as an id for `dump`: only in 8 bytes is it a bigint in JavaScript."""
    return Wide(number)


def dumps(value: Any, form: PairsForm = PAIRS) -> bytes:
    """The bytes of any value, in tagged pairs where CBOR alone would not do."""
    return dump(encode_tree(value, form))


def load(data: bytes, bounds: Bounds, start: int = 0, end: int | None = None) -> Any:
    """The tree that `data` describes (or what of it is from `start` to `end`, which need not be cut out for that).

    Its tagged pairs are not revived yet. Raises MalformedMessage.
    """
    end = len(data) if end is None else end
    check_size(end - start, bounds)
    reader = _Reader(data, start, end, bounds.items)
    try:
        value = reader.item(bounds.depth)
    except RecursionError:
        raise malformed("CBOR: arrays and maps are too deep inside one another") from None
    if value is _BREAK:
        raise malformed("CBOR: a break outside of any array or map")
    if reader.at != end:
        raise malformed(f"CBOR: {end - reader.at} bytes after the end of the value")
    return value


_BREAK: Final = object()
_INDEFINITE: Final = -1
_SIMPLE: Final = {20: False, 21: True, 22: None, 23: UNDEFINED, 31: _BREAK}
_FLOATS: Final = {25: struct.Struct(">e"), 26: struct.Struct(">f"), 27: struct.Struct(">d")}


class _Reader:
    """One pass over the bytes. Lengths are held against what is left before anything is made of them."""

    __slots__ = ("at", "data", "end", "left")

    def __init__(self, data: bytes, start: int, end: int, items: int) -> None:
        self.data = data
        self.end = end
        self.at = start
        self.left = items - 1

    def item(self, depth: int) -> Any:
        """The next value. Whoever asks for it has spent it."""
        at = self.at
        if at >= self.end:
            raise _ended()
        head = self.data[at]
        self.at = at = at + 1
        if 0x60 <= head < 0x78:  # a short text, as most of what there is: without a further call
            self.at = end = at + head - 0x60
            if end > self.end:
                raise _ended()
            try:
                return self.data[at:end].decode()
            except UnicodeDecodeError:
                return _cut_text(self.data[at:end])
        if head < 24:
            return head
        major, info = head >> 5, head & 31
        if major == 7:
            return self.special(info)
        size = info if info < 24 else self.argument(major, info)
        if major == 0:
            return size
        if major == 1:
            return -1 - size
        if major == 2:
            return self.take(size) if size >= 0 else b"".join(self.chunks(2))
        if major == 3:
            return _text(self.take(size)) if size >= 0 else "".join(_text(one) for one in self.chunks(3))
        if depth <= 0:
            raise malformed("CBOR: arrays and maps are too deep inside one another")
        if major == 4:
            return self.array(size, depth - 1)
        return self.map(size, depth - 1) if major == 5 else self.tagged(size, depth - 1)

    def spend(self, items: int) -> None:
        self.left -= items
        if self.left < 0:
            raise malformed("CBOR: too many values in one message")

    def byte(self) -> int:
        at = self.at
        if at >= self.end:
            raise _ended()
        self.at = at + 1
        return self.data[at]

    def take(self, size: int) -> bytes:
        at = self.at
        self.at = end = at + size
        if end > self.end:
            raise _ended()
        return self.data[at:end]

    def argument(self, major: int, info: int) -> int:
        if info <= 27:
            return int.from_bytes(self.take(1 << (info - 24)), "big")
        if info == 31 and 2 <= major <= 5:
            return _INDEFINITE
        raise malformed(f"CBOR: a head of {major << 5 | info:#04x} has no meaning")

    def chunks(self, major: int) -> list[bytes]:
        found = []
        while (head := self.byte()) != 0xFF:
            self.spend(1)
            info = head & 31
            size = info if info < 24 else self.argument(major, info)
            if head >> 5 != major or size < 0:
                raise malformed("CBOR: a part of a string is no string of its kind")
            found.append(self.take(size))
        return found

    def array(self, size: int, depth: int) -> list[Any]:
        if size > self.end - self.at:
            raise malformed("CBOR: the message ends inside an array")
        self.spend(max(size, 0))
        found: list[Any] = []
        while size:
            if size < 0:  # of indefinite length: counts down from there
                self.spend(1)
            one = self.item(depth)
            if one is _BREAK:
                self.check_break(size)
                break
            found.append(one)
            size -= 1
        return found

    def map(self, size: int, depth: int) -> dict[Any, Any]:
        if size > self.end - self.at:
            raise malformed("CBOR: the message ends inside a map")
        self.spend(max(size, 0) * 2)
        found: dict[Any, Any] = {}
        data, end, item = self.data, self.end, self.item
        while size:
            if size < 0:
                self.spend(1)
            if self.at < end and 0x80 <= data[self.at] < 0xE0:  # their hashes could be chosen to be equal
                raise malformed("CBOR: a key that is an array, a map or tagged")
            key = item(0)
            if key is _BREAK:
                self.check_break(size)
                break
            if size < 0:
                self.spend(1)
            value = item(depth)
            if value is _BREAK:
                raise malformed("CBOR: a key without a value")
            found[key] = value
            size -= 1
        return found

    def check_break(self, size: int) -> None:
        if size >= 0:
            raise malformed("CBOR: a break inside a value of known length")

    def tagged(self, tag: int, depth: int) -> Any:
        read = TAGS.get(tag)
        if read is None:
            raise malformed(f"CBOR: tag {tag} is not part of the protocol")
        self.spend(1)
        value = self.item(depth)
        if tag in NUMBER_ARRAYS and type(value) is bytes:
            self.spend(len(value) // element_size(tag))
        return read(tag, value)

    def special(self, info: int) -> Any:
        if info in _SIMPLE:
            return _SIMPLE[info]
        real = _FLOATS.get(info)
        if real is None:
            raise malformed("CBOR: a simple value that is not part of the protocol")
        return whole(real.unpack(self.take(real.size))[0])


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _cut_text(data)


def _cut_text(data: bytes) -> str:
    """JavaScript's text may have half of a pair, where it was cut in two; clients send it so, as JSON can too."""
    try:
        return clean(data.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        raise malformed("CBOR: text that is not UTF-8") from None


def _ended() -> MalformedMessage:
    return malformed("CBOR: the message ends inside a value")
