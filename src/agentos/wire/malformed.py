"""The one error of every decoder, and the bounds that keep hostile input small.

A decoder is handed bytes that anybody may have written. Whatever they are, it either answers a value
or raises MalformedMessage; it takes time in proportion to their number and memory within its Bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from agentos.errors import InvalidRequest

_LONGEST = 240
_SHOWN = 60


class MalformedMessage(InvalidRequest):
    """What came over the wire is not what the protocol allows there.

    `action_id` is the id of the action that the message asked for, where that much of it could be
    read: such a message can be answered, and need not end its connection.
    """

    action_id: int | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one message may be, at most."""

    bytes: int
    """Size as it comes over the wire."""
    items: int
    """Values in it, each member of an array, key and value of a map counted; what takes more, as more."""
    depth: int
    """Arrays and maps inside one another."""


NESTED: Final = 3
"""What an array or a map counts besides the one value that it is."""
PAIRED: Final = 6
"""What a key of a map and its value count besides the two values that they are."""

FROM_CLIENT = Bounds(bytes=512 * 1024 * 1024, items=1_000_000, depth=64)
"""For what a client sends. The transport should refuse frames sooner; this is the last line."""

AT_ONCE = Bounds(bytes=256 * 1024, items=10_000, depth=64)
"""For what may be decoded while others wait: it takes some milliseconds at most. What is more is no error."""

FROM_SERVER = Bounds(bytes=1024 * 1024 * 1024, items=64_000_000, depth=256)
"""For what a server sends: a process tree is deep and a directory listing long."""


def malformed(what: str) -> MalformedMessage:
    """The error that says `what`, cut where that is long."""
    return MalformedMessage(what if len(what) <= _LONGEST else what[: _LONGEST - 3] + "...")


def unwanted(name: str, got: object, wanted: str) -> MalformedMessage:
    """The error for `name`, which was `got` where `wanted` was wanted."""
    return malformed(f"{name}: wanted {wanted}, got {shown(got)}")


def shown(value: object) -> str:
    """`value` for a message to people: short, and cheap to make however big it is."""
    if isinstance(value, str | bytes):
        return repr(value[:_SHOWN]) + ("..." if len(value) > _SHOWN else "")
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else "a number of many digits"
    kind = type(value)
    return "an array" if kind is list else "an object" if kind is dict else kind.__name__


def oversized(size: int, bounds: Bounds) -> MalformedMessage:
    """The error for a message of `size`, which is longer than `bounds` allow."""
    return malformed(f"a message of {size} bytes is over the limit of {bounds.bytes}")
