"""Actor keys as text.

The management API has an unambiguous form: elements joined by `/`, with `\\` and `/` escaped inside
them. The form in a gateway's query joins elements by `,` and escapes nothing, as given clients do; so a
comma inside an element is lost there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from agentos.errors import InvalidRequest

Key: TypeAlias = tuple[str, ...]

_EMPTY_KEY: Final = "/"
_EMPTY_ELEMENT: Final = "\\0"


def as_key(key: str | Sequence[str] | None) -> Key:
    """The key that a caller means: text is the key of that one element, None the empty key."""
    if key is None:
        return ()
    if isinstance(key, str):
        return (key,)
    if not isinstance(key, Sequence) or not all(isinstance(one, str) for one in key):
        raise InvalidRequest.argument("key", key, "text, or a sequence of text")
    return tuple(key)


def serialize_key(key: Sequence[str]) -> str:
    """The text of `key`, from which `deserialize_key` gets exactly it again."""
    if not key:
        return _EMPTY_KEY
    return "/".join(one.replace("\\", "\\\\").replace("/", "\\/") if one else _EMPTY_ELEMENT for one in key)


def deserialize_key(text: str) -> Key:
    """The key that `text` stands for. Every text stands for one: a `\\` at its end is a backslash."""
    if text in ("", _EMPTY_KEY):
        return ()
    elements: list[str] = []
    current: list[str] = []
    empty = False
    characters = iter(text)
    for character in characters:
        if character == "/":
            elements.append("" if empty else "".join(current))
            current, empty = [], False
        elif character != "\\":
            current.append(character)
        elif (escaped := next(characters, None)) == "0":
            empty = True
        else:
            current.append(escaped or "\\")
            empty = empty and escaped is not None
    elements.append("" if empty else "".join(current))
    return tuple(elements)


def query_key(key: Sequence[str]) -> str | None:
    """The value of a gateway query's key parameter; None where the parameter is to be left out."""
    return ",".join(key) if key else None


def read_query_key(value: str | None) -> Key:
    """The key that the parameter's value stands for; present but empty, it can only be one empty element."""
    return () if value is None else tuple(value.split(","))


def survives_query(key: Sequence[str]) -> bool:
    """Whether a gateway query carries `key` without loss; otherwise it has to be resolved to an id first."""
    return not any("," in one for one in key)
