"""Values that JSON has no words for, as tagged pairs.

The protocol writes a big integer, bytes, undefined or a set as an array of two whose first member
is a name that starts with `$`. A genuine array of two that starts with such text gets one more `$`,
so that a directory listing of `$HOME` and one other name stays what it is. `encode_tree` turns Python
values into the plain tree that a format writes, `revive` turns the tree that a format read into values.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from typing import Any, Final, Literal

from agentos.errors import InvalidRequest
from agentos.wire.malformed import MalformedMessage, malformed, unwanted

SAFE_INTEGER: Final = 2**53 - 1
"""The greatest whole number that a JavaScript number holds exactly, with all below it."""
DEEPEST: Final = 256
"""Arrays and maps inside one another in a value that is sent."""

_DIGITS: Final = 1000
_BIGGEST: Final = 10**_DIGITS
_DECIMAL = re.compile(rf"-?[0-9]{{1,{_DIGITS}}}\Z")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_PIECE: Final = 1024 * 1024
"""Characters that are converted in one call: while one lasts, no other thread goes on. Whole groups of base64."""
_URL_SAFE = str.maketrans("-_", "+/")


def whole(value: float) -> float | int:
    """`value`, as an int where it is a whole number: JavaScript writes those as floats too."""
    return int(value) if -SAFE_INTEGER <= value <= SAFE_INTEGER and value.is_integer() else value


class Undefined(Enum):
    """The type of UNDEFINED."""

    UNDEFINED = "undefined"

    def __repr__(self) -> str:
        return "UNDEFINED"

    def __bool__(self) -> Literal[False]:
        return False


UNDEFINED: Final = Undefined.UNDEFINED
"""JavaScript's undefined: no value was given, which is not the same as null."""


class Form:
    """How one format writes what JSON has no words for. This one writes tagged pairs for all of it."""

    escapes = True
    """Whether a genuine array that looks like a tagged pair is marked as such."""

    def integer(self, value: int) -> Any:
        return value if -SAFE_INTEGER <= value <= SAFE_INTEGER else big_integer(value)

    def real(self, value: float) -> Any:
        return value

    def binary(self, value: bytes) -> Any:
        return ["$Uint8Array", binascii.b2a_base64(value, newline=False).decode("ascii")]

    def moment(self, value: datetime) -> Any:
        raise NotImplementedError

    def undefined(self) -> Any:
        return ["$Undefined", 0]

    def members(self, value: list[Any]) -> Any:
        return ["$Set", value]


def big_integer(value: int) -> list[str]:
    """The tagged pair of an integer of any size."""
    return ["$BigInt", str(check_big(value))]


def check_big(value: int) -> int:
    """`value`, or InvalidRequest where it has more digits than the other side reads."""
    if not -_BIGGEST < value < _BIGGEST:
        raise InvalidRequest(f"a number of more than {_DIGITS} digits cannot be sent")
    return value


def encode_tree(value: Any, form: Form, depth: int = DEEPEST) -> Any:
    """`value` as a tree of what `form`'s format can write.

    Raises InvalidRequest for what no format can: an object of an unknown type, a key that is no text,
    or more than DEEPEST arrays and maps inside one another. Text that UTF-8 cannot hold gets U+FFFD.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else clean(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return form.integer(value)
    if kind is float:
        return form.real(value)
    if depth <= 0:
        raise InvalidRequest(f"values more than {DEEPEST} deep cannot be sent")
    if kind is dict:
        return {text_key(key): encode_tree(one, form, depth - 1) for key, one in value.items()}
    if kind is list or kind is tuple:
        items = [encode_tree(one, form, depth - 1) for one in value]
        if form.escapes and _looks_tagged(items):
            items[0] = "$" + items[0]
        return items
    return _encode_other(value, form, depth)


def _encode_other(value: Any, form: Form, depth: int) -> Any:
    if value is UNDEFINED:
        return form.undefined()
    if isinstance(value, float):
        return form.real(float(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return form.binary(bytes(value))
    if isinstance(value, set | frozenset):
        return form.members([encode_tree(one, form, depth - 1) for one in value])
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise InvalidRequest("a datetime without a time zone cannot be sent")
        return form.moment(value)
    for plain in (str, int):  # subclasses, such as enumerations of names
        if isinstance(value, plain):
            return encode_tree(plain(value), form, depth)
    if isinstance(value, Mapping):
        return encode_tree(dict(value), form, depth)
    if isinstance(value, list | tuple):
        return encode_tree(list(value), form, depth)
    raise InvalidRequest(f"a value of type {type(value).__name__} cannot be sent")


def text_key(key: Any) -> str:
    """`key` of a map, as UTF-8 can hold it. Raises InvalidRequest where it is no text."""
    if type(key) is str and key.isascii():
        return key
    if not isinstance(key, str):
        raise InvalidRequest(f"a key of type {type(key).__name__} cannot be sent: keys are text")
    return clean(key)


def clean(text: str) -> str:
    """`text` with U+FFFD for each surrogate that stands alone: UTF-8 cannot hold those."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        pieces = (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))
        return "".join([_LONE_SURROGATE.sub("\ufffd", piece) for piece in pieces])
    return text


def _looks_tagged(items: list[Any]) -> bool:
    return len(items) == 2 and type(items[0]) is str and items[0].startswith("$")


def revive(value: Any, depth: int, *, lenient: bool = False) -> Any:
    """`value`, as a format read it, with its tagged pairs turned into what they stand for.

    The tree is changed in place. A pair with an unknown name is left alone. `lenient` is for input whose
    writer may not know of pairs: then only what is certainly one is revived, and no `$` is taken away.
    Raises MalformedMessage for more than `depth` arrays and maps inside one another.
    """
    kind = type(value)
    if kind is not list and kind is not dict:
        return value
    if depth <= 0:
        raise malformed("arrays and objects are too deep inside one another")
    if kind is list:
        if _looks_tagged(value):
            return _revive_pair(value, depth, lenient)
        for index, one in enumerate(value):
            if type(one) in _CONTAINERS:
                value[index] = revive(one, depth - 1, lenient=lenient)
    else:
        for key, one in value.items():
            if type(one) in _CONTAINERS:
                value[key] = revive(one, depth - 1, lenient=lenient)
    return value


_CONTAINERS = frozenset((list, dict))


def _revive_pair(pair: list[Any], depth: int, lenient: bool) -> Any:
    tag, payload = pair
    if tag == "$Set" and type(payload) is list:  # its members are no pair, though they may look like one
        return as_set([revive(one, depth - 2, lenient=lenient) for one in payload])
    read = _TAGS.get(tag)
    if read is None:
        pair[0] = tag[1:] if tag.startswith("$$") and not lenient else tag
        pair[1] = revive(payload, depth - 1, lenient=lenient)
        return pair
    try:
        return read(payload)
    except MalformedMessage:
        if not lenient:
            raise
        pair[1] = revive(payload, depth - 1, lenient=lenient)
        return pair


def _read_big_integer(payload: Any) -> int:
    if type(payload) is int:
        return payload
    if type(payload) is not str or not _DECIMAL.match(payload):
        raise unwanted("$BigInt", payload, f"at most {_DIGITS} decimal digits")
    return int(payload)


def _read_binary(payload: Any) -> bytes:
    if type(payload) is not str:
        raise unwanted("$Uint8Array", payload, "base64 text")
    return decode_base64(payload, "$Uint8Array")


def decode_base64(text: str, name: str) -> bytes:
    """The bytes of base64 `text`, in either alphabet, padded or not. `name` is for the error."""
    if "-" in text or "_" in text:
        text = text.translate(_URL_SAFE)
    text += "=" * (-len(text) % 4)
    try:
        if len(text) <= _PIECE:
            return binascii.a2b_base64(text, strict_mode=True)
        if "=" in text[:-2]:
            raise ValueError
        pieces = (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))
        return b"".join([binascii.a2b_base64(piece, strict_mode=True) for piece in pieces])
    except ValueError:  # also for text that is not ASCII
        raise unwanted(name, text, "base64 text") from None


def _read_undefined(payload: Any) -> Undefined:
    if payload != 0:
        raise unwanted("$Undefined", payload, "0")
    return UNDEFINED


def _read_members(payload: Any) -> Any:
    raise unwanted("$Set", payload, "an array")


def as_set(items: list[Any]) -> set[Any] | list[Any]:
    """The set of `items`; a list where one of them is an array, a map or a huge integer.

    Python cannot hash the first two; and the hashes of integers beyond 64 bits can be chosen to be
    equal, which would make building the set take quadratic time.
    """
    for one in items:
        kind = type(one)
        if kind in _CONTAINERS or kind is set or (kind is int and not -(2**64) <= one < 2**64):
            return items
    return set(items)


_TAGS: dict[str, Callable[[Any], Any]] = {
    "$BigInt": _read_big_integer,
    "$Uint8Array": _read_binary,
    "$ArrayBuffer": _read_binary,
    "$Undefined": _read_undefined,
    "$Set": _read_members,
}
