"""Messages as trees of plain objects, the shape that the json and cbor encodings share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from agentos.wire.malformed import MalformedMessage, unwanted
from agentos.wire.messages import FIELDS, ActionRequest, ActorSpecifier, Field, Kind
from agentos.wire.values import UNDEFINED, Form, encode_tree, revive

_Message = TypeVar("_Message")
_MOST = 2**64 - 1


def message_tree(message: object, form: Form, identify: Callable[[int], Any]) -> dict[str, Any]:
    """The object that stands for `message`; `identify` writes an id so that it arrives as a bigint.

    What is None is left out, except for an error's id: the client wants that to be there, as null.
    """
    tree: dict[str, Any] = {}
    for field in _BY_NAME[type(message)]:
        value = getattr(message, field.attribute)
        if value is not None or not field.optional:
            tree[field.wire] = _field_tree(value, field.kind, form, identify)
        elif field.kind is Kind.ID:
            tree[field.wire] = None
    return tree


def _field_tree(value: Any, kind: Kind, form: Form, identify: Callable[[int], Any]) -> Any:
    if kind is Kind.ID:
        return identify(value)
    if kind is Kind.SPECIFIER:
        return message_tree(value, form, identify)
    return encode_tree(list(value) if kind is Kind.ARGUMENTS else value, form)


_BY_NAME = {
    kind: tuple(sorted((field for field in fields if field.attribute), key=lambda field: field.wire))
    for kind, fields in FIELDS.items()
}
_BY_NAME[ActionRequest] = FIELDS[ActionRequest]
"""Its id comes first: what follows may be too much to be looked at, and is to be answered all the same."""


@dataclass(frozen=True, slots=True)
class Revival:
    """How the values inside a message are read: how deep they may be, and how certain pairs must be."""

    depth: int
    lenient: bool = False


def read_message(kind: type[_Message], tree: Any, revival: Revival) -> _Message:
    """The message that object `tree` stands for; what it has besides the known fields is ignored.

    Raises MalformedMessage, with the action's id if the failure came after it was read.
    """
    if type(tree) is not dict:
        raise unwanted(kind.__name__, tree, "an object")
    values: dict[str, Any] = {}
    for field in FIELDS[kind]:
        if not field.attribute:
            continue
        try:
            values[field.attribute] = _read_field(field, tree.get(field.wire, UNDEFINED), revival)
        except MalformedMessage as problem:
            problem.action_id = values.get("id")
            raise
    return kind(**values)


def _read_field(field: Field, value: Any, revival: Revival) -> Any:
    if field.optional and (value is None or value is UNDEFINED):
        return None
    if field.kind is Kind.VALUE:
        if value is UNDEFINED and field.wire == "output":
            raise unwanted(field.wire, value, "a value")
        return revive(value, revival.depth, lenient=revival.lenient)
    if field.kind is Kind.ARGUMENTS:
        return _read_arguments(field.wire, value, revival)
    if field.kind is Kind.SPECIFIER:
        return read_message(ActorSpecifier, value, revival)
    if field.kind is Kind.TEXT or field.kind is Kind.BOOL:
        wanted = str if field.kind is Kind.TEXT else bool
        if type(value) is not wanted:
            raise unwanted(field.wire, value, "text" if wanted is str else "true or false")
        return value
    return read_uint(field.wire, value)


def _read_arguments(name: str, value: Any, revival: Revival) -> tuple[Any, ...]:
    if revival.lenient and type(value) is list:  # the array itself is no pair, whatever is in it
        return tuple(revive(one, revival.depth - 1, lenient=True) for one in value)
    revived = revive(value, revival.depth)
    if type(revived) is not list:
        raise unwanted(name, revived, "an array")
    return tuple(revived)


def read_uint(name: str, value: Any) -> int:
    """The whole number that the tree `value` stands for; `name` is for the error. Raises MalformedMessage."""
    value = revive(value, 1)
    if type(value) is not int or not 0 <= value <= _MOST:
        raise unwanted(name, value, f"a whole number from 0 to {_MOST}")
    return value


def read_body(kinds: dict[str, type[_Message]], tree: Any, revival: Revival) -> _Message:
    """The message in the envelope of a WebSocket frame, one of `kinds` by their tags."""
    body = tree.get("body") if type(tree) is dict else None
    if type(body) is not dict:
        raise unwanted("message", tree if body is None else body, "an object with body, tag and val")
    tag = body.get("tag")
    kind = kinds.get(tag) if type(tag) is str else None
    if kind is None:
        raise unwanted("tag", tag, " or ".join(kinds))
    return read_message(kind, body.get("val"), revival)


def body_tree(message: object, form: Form, identify: Callable[[int], Any]) -> dict[str, Any]:
    """The envelope of a WebSocket frame around `message`."""
    return {"body": {"tag": type(message).__name__, "val": message_tree(message, form, identify)}}
