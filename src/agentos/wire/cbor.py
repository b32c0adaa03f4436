"""CBOR in the profile that the protocol's JavaScript side reads and writes.

What is sent has its numbers in the form that JavaScript takes for a number: a long integer would arrive as
a bigint there. Reading knows only what the protocol uses: the tags of a whole CBOR compile regular
expressions, parse mail and compute powers that the sender chose.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from agentos.wire.cbor_forms import BYTES, NATIVE, PAIRS, PairsForm, Wide
from agentos.wire.cbor_tags import NUMBER_ARRAYS, TAGS, element_size
from agentos.wire.cbor_writer import dump, dumps
from agentos.wire.malformed import NESTED, PAIRED, Bounds, MalformedMessage, malformed, oversized
from agentos.wire.values import UNDEFINED, clean, whole

__all__ = ["BYTES", "NATIVE", "PAIRS", "PairsForm", "dump", "dumps", "load", "wide"]


def wide(number: int) -> object:
    """`number` as an id for `dump`: only in 8 bytes is it a bigint in JavaScript."""
    return Wide(number)


def load(data: bytes, bounds: Bounds, start: int = 0, end: int | None = None) -> Any:
    """The tree that `data` describes (or what of it is from `start` to `end`, which need not be cut out for that).

    Its tagged pairs are not revived yet. Raises MalformedMessage.
    """
    end = len(data) if end is None else end
    if end - start > bounds.bytes:
        raise oversized(end - start, bounds)
    reader = _Reader(data, start, end, bounds.items)
    try:
        value = reader.items(1, bounds.depth)[0]
    except RecursionError:
        raise malformed("CBOR: arrays and maps are too deep inside one another") from None
    if reader.at != end:
        raise malformed(f"CBOR: {end - reader.at} bytes after the end of the value")
    return value


_BREAK: Final = 0xFF
_INDEFINITE: Final = -1
_SIMPLE: Final = {0xF4: False, 0xF5: True, 0xF6: None, 0xF7: UNDEFINED}
_DOUBLE: Final = struct.Struct(">d")
_FLOATS: Final = {0xF9: struct.Struct(">e"), 0xFA: struct.Struct(">f"), 0xFB: _DOUBLE}


class _Reader:
    """One pass over the bytes. Lengths are held against what is left before anything is made of them."""

    __slots__ = ("at", "data", "end", "left")

    def __init__(self, data: bytes, start: int, end: int, items: int) -> None:
        self.data = data
        self.end = end
        self.at = start
        self.left = items

    def items(self, count: int, depth: int, *, keyed: bool = False) -> list[Any]:
        """The next `count` values; `keyed`: every other one is a key.

        Those of few bytes, as most are, are read here: a call for each takes longer than reading it.
        """
        data, at, end = self.data, self.at, self.end
        if count > end - at:
            raise _ended()
        self.left -= count
        if self.left < 0:
            raise _too_many()
        found: list[Any] = []
        add = found.append
        for _ in range(count):
            if at >= end:
                raise _ended()
            head = data[at]
            at += 1
            if 0x60 <= head < 0x78:
                start = at
                at += head - 0x60
                if at > end:
                    raise _ended()
                try:
                    add(data[start:at].decode())
                except UnicodeDecodeError:
                    add(_cut_text(data[start:at]))
            elif head < 24:
                add(head)
            elif head in _SIMPLE:
                add(_SIMPLE[head])
            elif head == 0xFB and at + 8 <= end:
                real = _DOUBLE.unpack_from(data, at)[0]
                add(whole(real) if real.is_integer() else real)
                at += 8
            else:
                if (
                    keyed and 0x80 <= head < 0xE0 and not len(found) % 2
                ):  # their hashes could be chosen to be equal
                    raise malformed("CBOR: a key that is an array, a map or tagged")
                self.at = at
                add(self.after(head, depth))
                at = self.at
        self.at = at
        return found

    def after(self, head: int, depth: int) -> Any:
        """The value that begins with `head`, which was read. Whoever asks for it has spent it."""
        if head >= 0xE0:
            return self.real(head)
        major, size = head >> 5, head & 31
        if size >= 24:
            size = self.argument(head)
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
        if major == 6:
            return self.tagged(size, depth - 1)
        self.spend(NESTED if major == 4 or size < 0 else NESTED + PAIRED * size)
        if major == 4:
            return self.items(size, depth - 1) if size > 0 else self.endless(depth - 1) if size else []
        both = iter(self.items(size * 2, depth - 1, keyed=True) if size >= 0 else self.endless(depth - 1, 2))
        return dict(zip(both, both, strict=True))

    def argument(self, head: int) -> int:
        info = head & 31
        if info <= 27:
            at = self.at
            self.at = end = at + (1 << (info - 24))
            if end > self.end:
                raise _ended()
            return int.from_bytes(self.data[at:end], "big")
        if info == 31 and 0x40 <= head < 0xC0:
            return _INDEFINITE
        raise malformed(f"CBOR: a head of {head:#04x} has no meaning")

    def take(self, size: int) -> bytes:
        at = self.at
        self.at = end = at + size
        if end > self.end:
            raise _ended()
        return self.data[at:end]

    def broken(self) -> bool:
        """Whether a break is next, which is passed over then. It counts, as a value does."""
        if self.at >= self.end:
            raise _ended()
        if self.data[self.at] != _BREAK:
            return False
        self.at += 1
        self.spend(1)
        return True

    def spend(self, items: int) -> None:
        self.left -= items
        if self.left < 0:
            raise _too_many()

    def endless(self, depth: int, at_once: int = 1) -> list[Any]:
        """The values until a break; `at_once` is 2 for those of a map, of which every other one is a key."""
        found: list[Any] = []
        paired = at_once == 2
        while not self.broken():
            if paired:
                self.spend(PAIRED)
            found += self.items(at_once, depth, keyed=paired)
        return found

    def chunks(self, major: int) -> list[bytes]:
        found = []
        while (head := self.take(1)[0]) != _BREAK:
            self.spend(1)
            size = head & 31 if head & 31 < 24 else self.argument(head)
            if head >> 5 != major or size < 0:
                raise malformed("CBOR: a part of a string is no string of its kind")
            found.append(self.take(size))
        return found

    def tagged(self, tag: int, depth: int) -> Any:
        read = TAGS.get(tag)
        if read is None:
            raise malformed(f"CBOR: tag {tag} is not part of the protocol")
        value = self.items(1, depth)[0]
        if tag in NUMBER_ARRAYS and type(value) is bytes:
            self.spend(len(value) // element_size(tag))
        return read(tag, value)

    def real(self, head: int) -> float | int:
        form = _FLOATS.get(head)
        if form is None:
            what = (
                "a break that ends nothing"
                if head == _BREAK
                else "a simple value that is not part of the protocol"
            )
            raise malformed(f"CBOR: {what}")
        return whole(form.unpack(self.take(form.size))[0])


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


def _too_many() -> MalformedMessage:
    return malformed("CBOR: too many values in one message")
