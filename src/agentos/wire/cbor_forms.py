"""How values are written in CBOR, for each kind of reader, and the words that trees have besides plain objects."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from agentos.wire.cbor_tags import EPOCH
from agentos.wire.values import SAFE_INTEGER, UNDEFINED, Form, big_integer, check_big

SHORT: Final = 2**32
"""Below it, and from its negative on, every form writes a whole number as what it is, as it writes any float."""


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


class PairsForm(Form):
    """What a JavaScript client reads: tagged pairs, and numbers that arrive as numbers."""

    native_bytes = False
    """Whether bytes are CBOR's own byte strings."""

    def integer(self, value: int) -> Any:
        if -SHORT <= value < SHORT:
            return value
        return float(value) if -SAFE_INTEGER <= value <= SAFE_INTEGER else big_integer(value)

    def binary(self, value: bytes) -> Any:
        return value if self.native_bytes else super().binary(value)

    def moment(self, value: datetime) -> Any:
        return Tagged(1, (value - EPOCH).total_seconds())


class BytesForm(PairsForm):
    """Tagged pairs, but bytes as CBOR's own byte strings: a quarter less to send, and nothing to convert."""

    native_bytes = True


class NativeForm(BytesForm):
    """What a client sends in the cbor encoding: its own words, no pairs, no mark on what looks like one."""

    escapes = False

    def integer(self, value: int) -> Any:
        if -SHORT <= value < SHORT:
            return value
        return float(value) if -SAFE_INTEGER <= value <= SAFE_INTEGER else check_big(value)

    def undefined(self) -> Any:
        return UNDEFINED

    def members(self, value: list[Any]) -> Any:
        return Tagged(258, value)


class TreeForm(NativeForm):
    """What was made for CBOR already: nothing of it is to be said in other words."""


PAIRS: Final = PairsForm()
NATIVE: Final = NativeForm()
BYTES: Final = BytesForm()
TREE: Final = TreeForm()
