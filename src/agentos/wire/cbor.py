"""CBOR in the profile that the protocol's JavaScript side reads and writes.

Sending goes through cbor2, after numbers were given the form that JavaScript takes for a number: a
long integer would arrive as a bigint there. Reading is done here and knows only what the protocol uses:
cbor2 5.9 needs quadratic time for long text (9.5 s for 50 MB), and its tags compile regular
expressions, parse mail and compute powers that the sender chose.
"""

from __future__ import annotations

import struct
from datetime import datetime
from typing import Any, Final

import cbor2

from agentos.wire.cbor_tags import EPOCH, NUMBER_ARRAYS, TAGS, element_size
from agentos.wire.malformed import Bounds, check_size, malformed
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

_SHORT: Final = 2**32


class _Wide:
    """An id, written in 8 bytes however small it is: only so is it a bigint in JavaScript."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class PairsForm(Form):
    """What a JavaScript client reads: tagged pairs, and numbers that arrive as numbers."""

    def integer(self, value: int) -> Any:
        if -_SHORT <= value < _SHORT:
            return value
        return float(value) if -SAFE_INTEGER <= value <= SAFE_INTEGER else big_integer(value)

    def moment(self, value: datetime) -> Any:
        return cbor2.CBORTag(1, (value - EPOCH).total_seconds())


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
        return cbor2.undefined

    def members(self, value: list[Any]) -> Any:
        return cbor2.CBORTag(258, value)


class BytesForm(PairsForm):
    """Tagged pairs, but bytes as CBOR's own byte strings: a quarter less to send, and nothing to convert."""

    def binary(self, value: bytes) -> Any:
        return value


PAIRS = PairsForm()
NATIVE = NativeForm()
BYTES = BytesForm()


def wide(number: int) -> object:
    """`number` as an id for `dump`."""
    return _Wide(number)


def dump(tree: Any) -> bytes:
    """The bytes of a tree that `encode_tree` made for one of the forms here."""
    return cbor2.dumps(tree, default=_write_wide)


def dumps(value: Any, form: PairsForm = PAIRS) -> bytes:
    """The bytes of any value, in tagged pairs where CBOR alone would not do."""
    return dump(encode_tree(value, form))


def _write_wide(encoder: cbor2.CBOREncoder, value: Any) -> None:
    encoder.write(struct.pack(">BQ", 0x1B, value.number))


def load(data: bytes | memoryview, bounds: Bounds) -> Any:
    """The tree that `data` describes, its tagged pairs not revived yet. Raises MalformedMessage."""
    check_size(data, bounds)
    reader = _Reader(data, bounds.items)
    try:
        value = reader.item(bounds.depth)
    except RecursionError:
        raise malformed("CBOR: arrays and maps are too deep inside one another") from None
    if value is _BREAK:
        raise malformed("CBOR: a break outside of any array or map")
    if reader.at != len(data):
        raise malformed(f"CBOR: {len(data) - reader.at} bytes after the end of the value")
    return value


_BREAK: Final = object()
_INDEFINITE: Final = -1
_SIMPLE: Final = {20: False, 21: True, 22: None, 23: UNDEFINED, 31: _BREAK}
_FLOATS: Final = {25: (">e", 2), 26: (">f", 4), 27: (">d", 8)}


class _Reader:
    """One pass over the bytes. Lengths are held against what is left before anything is made of them."""

    __slots__ = ("at", "data", "end", "left")

    def __init__(self, data: bytes | memoryview, items: int) -> None:
        self.data = memoryview(data)
        self.end = len(self.data)
        self.at = 0
        self.left = items

    def item(self, depth: int) -> Any:
        self.spend(1)
        head = self.byte()
        major, info = head >> 5, head & 31
        if major == 3 and info < 24:  # most of what there is
            return _text(self.take(info))
        if major == 7:
            return self.special(info)
        size = info if info < 24 else self.argument(major, info)
        if major == 0:
            return size
        if major == 1:
            return -1 - size
        if major == 2:
            return bytes(self.take(size)) if size >= 0 else b"".join(self.chunks(2))
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
            raise malformed("CBOR: the message ends inside a value")
        self.at = at + 1
        return self.data[at]

    def take(self, size: int) -> memoryview:
        at = self.at
        self.at = end = at + size
        if end > self.end:
            raise malformed("CBOR: the message ends inside a value")
        return self.data[at:end]

    def argument(self, major: int, info: int) -> int:
        if info <= 27:
            return int.from_bytes(self.take(1 << (info - 24)), "big")
        if info == 31 and 2 <= major <= 5:
            return _INDEFINITE
        raise malformed(f"CBOR: a head of {major << 5 | info:#04x} has no meaning")

    def chunks(self, major: int) -> list[memoryview]:
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
        found: list[Any] = []
        while size:
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
        found: dict[Any, Any] = {}
        while size:
            if 0x80 <= self.byte() < 0xE0:  # their hashes could be chosen to be equal
                raise malformed("CBOR: a key that is an array, a map or tagged")
            self.at -= 1
            key = self.item(0)
            if key is _BREAK:
                self.check_break(size)
                break
            value = self.item(depth)
            if value is _BREAK:
                raise malformed("CBOR: a key without a value")
            found[key] = value
            size -= 1
        return found

    def check_break(self, size: int) -> None:
        if size >= 0:  # of indefinite length it is below 0, and counts down from there
            raise malformed("CBOR: a break inside a value of known length")

    def tagged(self, tag: int, depth: int) -> Any:
        read = TAGS.get(tag)
        if read is None:
            raise malformed(f"CBOR: tag {tag} is not part of the protocol")
        value = self.item(depth)
        if tag in NUMBER_ARRAYS and type(value) is bytes:
            self.spend(len(value) // element_size(tag))
        return read(tag, value)

    def special(self, info: int) -> Any:
        if info in _FLOATS:
            code, size = _FLOATS[info]
            return whole(struct.unpack(code, self.take(size))[0])
        if info not in _SIMPLE:
            raise malformed("CBOR: a simple value that is not part of the protocol")
        return _SIMPLE[info]


def _text(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        pass
    try:
        # JavaScript's text may have half of a pair, where it was cut in two; clients send it so, as JSON can too.
        return clean(str(data, "utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        raise malformed("CBOR: text that is not UTF-8") from None
