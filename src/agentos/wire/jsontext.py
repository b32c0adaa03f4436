"""JSON as the protocol writes it: compact text, big integers and bytes as tagged pairs."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from typing import Any, Final

from agentos.errors import InvalidRequest
from agentos.wire.malformed import NESTED, PAIRED, Bounds, malformed, oversized
from agentos.wire.values import Form, clean, encode_tree, whole

_INSIDE = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_PIECE: Final = 1024 * 1024
"""Characters that are looked at in one call: while one lasts, no other thread goes on."""
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abcdefABCDEF]")


class JsonForm(Form):
    """Tagged pairs, null for what is no number, and a point in time as ISO 8601 text."""

    def real(self, value: float) -> Any:
        return value if math.isfinite(value) else None

    def moment(self, value: datetime) -> Any:
        try:
            moment = value.astimezone(UTC)
        except OverflowError:
            raise InvalidRequest("a datetime outside the years 1 to 9999 cannot be sent") from None
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


JSON = JsonForm()
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def dump(tree: Any) -> str:
    """The text of a tree that `encode_tree` made for JSON."""
    return _ENCODER.encode(tree)


def dumps(value: Any) -> str:
    """The text of any value."""
    return dump(encode_tree(value, JSON))


def load(data: bytes | str, bounds: Bounds) -> Any:
    """The tree that `data` describes, its tagged pairs not revived yet.

    A whole number is an int however it is written, as there is only one kind of number in JavaScript.
    Raises MalformedMessage.
    """
    if len(data) > bounds.bytes:
        raise oversized(len(data), bounds)
    text = data if isinstance(data, str) else _decode(data)
    _check_items(text, bounds.items)
    try:
        tree = _DECODER.decode(text)
    except RecursionError:
        raise malformed("JSON: arrays and objects are too deep inside one another") from None
    except json.JSONDecodeError as problem:
        raise malformed(f"JSON: {problem.msg} at character {problem.pos}") from None
    except ValueError:  # an integer of thousands of digits
        raise malformed("JSON: a number of too many digits") from None
    return _clean(tree, bounds.depth) if _SURROGATE_ESCAPE.search(text) else tree


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise malformed("JSON: the text is not UTF-8") from None


def _check_items(text: str, most: int) -> None:
    """Refuse before parsing: an empty object takes 2 bytes here, and 64 in memory."""
    if 1 + _items(text, 0, len(text)) > most and _more_than(most, text):
        raise malformed(f"JSON: more than {most} values in one message")


def _items(text: str, start: int, end: int) -> int:
    """How many values the characters from `start` to `end` stand for, none of them being in a string."""
    found = 0
    for at in range(start, end, _PIECE):
        to = min(at + _PIECE, end)
        arrays = text.count("[", at, to) + text.count("{", at, to)
        found += text.count(",", at, to) + (1 + PAIRED) * text.count(":", at, to) + (1 + NESTED) * arrays
    return found


def _more_than(most: int, text: str) -> bool:
    """Whether there are more than so many values outside of strings, or so many strings."""
    at, strings, items, size = 0, 0, 1, len(text)
    while max(items, strings) <= most:
        start = text.find('"', at)
        items += _items(text, at, start if start >= 0 else size)
        if start < 0:
            return items > most
        at, strings = _after_string(text, start + 1), strings + 1
    return True


def _after_string(text: str, at: int) -> int:
    """Where the string ends in which `at` is; where the text does, if it ends in there."""
    size = len(text)
    while at < size:
        found = _INSIDE.match(text, at, at + _PIECE)
        end = at if found is None else found.end()
        if end < size and text[end] == '"':
            return end + 1
        if end == at:  # half of an escape, at the end of all
            break
        at = end
    return size


def _number(text: str) -> float | int:
    return whole(float(text))


def _refuse_constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is not JSON", "", 0)


def _clean(tree: Any, depth: int) -> Any:
    """`tree` without the lone surrogates that escapes can write and UTF-8 cannot."""
    if type(tree) is str:
        return clean(tree)
    if depth <= 0:
        raise malformed("JSON: arrays and objects are too deep inside one another")
    if type(tree) is list:
        return [_clean(one, depth - 1) for one in tree]
    if type(tree) is dict:
        return {clean(key): _clean(one, depth - 1) for key, one in tree.items()}
    return tree


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_refuse_constant)
