"""CBOR's words for values, the bytes that `cbor.load` reads, in one pass over them.

Written here and not by a library, as most messages are small: setting up an encoder takes longer than writing them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Final

from agentos.errors import InvalidRequest
from agentos.wire.cbor_forms import PAIRS, SHORT, TREE, PairsForm, Tagged, Wide
from agentos.wire.values import DEEPEST, UNDEFINED, clean, encode_tree, text_key

_Add = Callable[[bytes], None]

_MOST: Final = 2**64
_DEEPEST_TREE: Final = 4 * DEEPEST
"""Of a tree there is no limit to hold: it was made of values that had theirs."""
_HEADS: Final = [bytes((one,)) for one in range(256)]
_LONGER: Final = ((1 << 8, 24, ">BB"), (1 << 16, 25, ">BH"), (1 << 32, 26, ">BI"), (_MOST, 27, ">BQ"))
"""Below which number an argument is written so, with which second half of the first byte."""
_REAL: Final = struct.Struct(">Bd")


def dumps(value: Any, form: PairsForm = PAIRS) -> bytes:
    """The bytes of any value, in the words that `form` has: those of the tree that `encode_tree` makes of it.

    Raises InvalidRequest as that does.
    """
    parts: list[bytes] = []
    _write((value,), parts.append, form, DEEPEST)
    return b"".join(parts)


def dump(tree: Any) -> bytes:
    """The bytes of `tree`: dicts, lists, text, bytes, numbers of any size, None, truth values, UNDEFINED, Wide
    and Tagged."""
    parts: list[bytes] = []
    _write((tree,), parts.append, TREE, _DEEPEST_TREE)
    return b"".join(parts)


def _write(values: Iterable[Any], add: _Add, form: PairsForm, depth: int) -> None:
    """Write them all, one after another: a call for each takes longer than writing it."""
    for value in values:
        kind = type(value)
        if kind is str:
            try:
                text = value.encode()
            except UnicodeEncodeError:
                text = clean(value).encode()
            size = len(text)
            add(_HEADS[0x60 + size] if size < 24 else _head(3, size))
            add(text)
        elif value is None:
            add(b"\xf6")
        elif kind is bool:
            add(b"\xf5" if value else b"\xf4")
        elif kind is int and -SHORT <= value < SHORT:
            add(_HEADS[value] if 0 <= value < 24 else _head(0, value) if value >= 0 else _head(1, -1 - value))
        elif kind is float:
            add(_REAL.pack(0xFB, value) if math.isfinite(value) else _no_number(value))
        elif kind is dict or kind is list or kind is tuple:
            if depth <= 0:
                raise InvalidRequest(f"values more than {DEEPEST} deep cannot be sent")
            size = len(value)
            if kind is dict:
                for key in value:
                    if type(key) is not str or not key.isascii():
                        value = {text_key(key): one for key, one in value.items()}
                        size = len(value)
                        break
                add(_HEADS[0xA0 + size] if size < 24 else _head(5, size))
                _write(chain.from_iterable(value.items()), add, form, depth - 1)
                continue
            add(_HEADS[0x80 + size] if size < 24 else _head(4, size))
            if size == 2 and form.escapes and isinstance(value[0], str) and str(value[0]).startswith("$"):
                value = "$" + str(value[0]), value[1]
            if size:
                _write(value, add, form, depth - 1)
        elif kind is bytes and form.native_bytes:
            size = len(value)
            add(_HEADS[0x40 + size] if size < 24 else _head(2, size))
            add(value)
        elif form is TREE:
            _write_word(value, add)
        else:
            _write((encode_tree(value, form, depth),), add, TREE, _DEEPEST_TREE)


def _head(major: int, size: int) -> bytes:
    if size < 24:
        return _HEADS[major << 5 | size]
    for below, info, form in _LONGER:
        if size < below:
            return struct.pack(form, major << 5 | info, size)
    raise ValueError(size)


def _no_number(value: float) -> bytes:
    if math.isnan(value):
        return b"\xf9\x7e\x00"
    return b"\xf9\x7c\x00" if value > 0 else b"\xf9\xfc\x00"


def _write_word(value: Any, add: _Add) -> None:
    if type(value) is int:
        if -_MOST <= value < _MOST:
            add(_head(0, value) if value >= 0 else _head(1, -1 - value))
            return
        tag, size = (2, value) if value >= 0 else (3, -1 - value)
        value = Tagged(tag, size.to_bytes((size.bit_length() + 7) // 8, "big"))
    if isinstance(value, Wide):
        add(struct.pack(">BQ", 0x1B, value.number))
    elif isinstance(value, Tagged):
        add(_head(6, value.tag))
        _write((value.value,), add, TREE, _DEEPEST_TREE)
    elif value is UNDEFINED:
        add(b"\xf7")
    else:
        raise TypeError(f"{type(value).__name__} is no value of a tree")
