"""CBOR's words for a tree of plain values: the bytes that `cbor.load` reads.

Written here and not by a library, as most messages are small: setting up an encoder takes longer than writing them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, Final

from agentos.wire.values import UNDEFINED

_Add = Callable[[bytes], None]

_MOST: Final = 2**64
_HEADS: Final = [bytes((one,)) for one in range(256)]
_LONGER: Final = ((1 << 8, 24, ">BB"), (1 << 16, 25, ">BH"), (1 << 32, 26, ">BI"), (_MOST, 27, ">BQ"))
"""Below which number an argument is written so, with which second half of the first byte."""
_REAL: Final = struct.Struct(">Bd")


class Wide:
    """A whole number, written in 8 bytes however small it is."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Tagged:
    """A value with a tag of CBOR's."""

    __slots__ = ("tag", "value")

    def __init__(self, tag: int, value: Any) -> None:
        self.tag = tag
        self.value = value


def dump(tree: Any) -> bytes:
    """The bytes of `tree`: dicts, lists, text, bytes, numbers of any size, None, truth values, UNDEFINED, and the
    classes here."""
    parts: list[bytes] = []
    _write(tree, parts.append)
    return b"".join(parts)


def _write(value: Any, add: _Add) -> None:
    kind = type(value)
    if kind is str:
        text = value.encode()
        size = len(text)
        add(_HEADS[0x60 + size] if size < 24 else _head(3, size))
        add(text)
    elif value is None:
        add(b"\xf6")
    elif kind is bool:
        add(b"\xf5" if value else b"\xf4")
    elif kind is int:
        _write_integer(value, add)
    elif kind is dict:
        add(_head(5, len(value)))
        for key, one in value.items():
            _write(key, add)
            _write(one, add)
    elif kind is list:
        add(_head(4, len(value)))
        for one in value:
            _write(one, add)
    elif kind is bytes:
        add(_head(2, len(value)))
        add(value)
    else:
        _write_other(value, add)


def _head(major: int, size: int) -> bytes:
    if size < 24:
        return _HEADS[major << 5 | size]
    for below, info, form in _LONGER:
        if size < below:
            return struct.pack(form, major << 5 | info, size)
    raise ValueError(size)


def _write_integer(value: int, add: _Add) -> None:
    major, size = (0, value) if value >= 0 else (1, -1 - value)
    if size < _MOST:
        add(_head(major, size))
        return
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    _write(Tagged(2 + major, digits), add)


def _write_other(value: Any, add: _Add) -> None:
    if isinstance(value, float):
        add(_written_real(value))
    elif isinstance(value, Wide):
        add(struct.pack(">BQ", 0x1B, value.number))
    elif isinstance(value, Tagged):
        add(_head(6, value.tag))
        _write(value.value, add)
    elif value is UNDEFINED:
        add(b"\xf7")
    else:
        raise TypeError(f"{type(value).__name__} is no value of a tree")


def _written_real(value: float) -> bytes:
    if math.isnan(value):
        return b"\xf9\x7e\x00"
    if math.isinf(value):
        return b"\xf9\x7c\x00" if value > 0 else b"\xf9\xfc\x00"
    return _REAL.pack(0xFB, value)
