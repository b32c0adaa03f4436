"""How arguments of actions look on the wire, and back: one object for each type, both ways.

What `read` gets was decoded from a client's message and may be anything: it answers a value that the VM's
method takes, or raises InvalidRequest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agentos.errors import InvalidRequest
from agentos.model import (
    check_count,
    check_data,
    check_env,
    check_flag,
    check_moment,
    check_seconds,
    check_text,
    check_texts,
)
from agentos.wire.values import UNDEFINED

NOT_GIVEN: Final = (None, UNDEFINED)
"""Null and undefined both say that an argument was not given."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of argument. `read` takes the wire's name, for its error, and the wire's value."""

    python: str
    """The annotation in Python."""
    wanted: str
    """What an error says was wanted."""
    read: Callable[[str, Any], Any]
    write: Callable[[str, Any], Any]
    """Takes Python's name and value: refuses what the VM's own method would refuse, in the same words."""
    meant: str | None = None
    """The value that is meant where none is given, so that it need not be sent."""


def _read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest.argument(name, value, "true or false")
    return value


def _read_milliseconds(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e12:
        raise InvalidRequest.argument(name, value, "milliseconds, 0 or more")
    return float(value / 1000)


def _read_moment(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e15:
        raise InvalidRequest.argument(name, value, "milliseconds since the epoch")
    return float(value / 1000)


def _read_texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise InvalidRequest.argument(name, value, "a list of text")
    return check_texts(name, value)


def _write_text(name: str, value: Any, *, empty: bool = True) -> str:
    text = check_text(name, value, empty=empty)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            # A byte that is no UTF-8, as embedded VMs take it: on its way it would become another character.
            raise InvalidRequest.argument(name, value, "text that UTF-8 can hold") from None
    return text


def _write_texts(name: str, value: Any) -> list[str]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InvalidRequest.argument(name, value, "a list of text")
    return [_write_text(f"{name}[{index}]", one) for index, one in enumerate(value)]


def _write_paths(name: str, value: Any) -> list[str]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        value = list(value)
    return _write_texts(name, value)


def _read_env(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and UNDEFINED in value.values():
        value = {key: one for key, one in value.items() if one is not UNDEFINED}
    return check_env(value, name)


def _write_env(name: str, value: Any) -> dict[str, str]:
    return {
        _write_text(f"{name} variable", key): _write_text(f"{name}[{key!r}]", one)
        for key, one in check_env(value, name).items()
    }


def _write_milliseconds(name: str, value: Any) -> float | None:
    seconds = check_seconds(name, value)
    return None if seconds is None else seconds * 1000


def _write_moment(name: str, value: Any) -> float | None:
    seconds = check_moment(name, value)
    return None if seconds is None else seconds * 1000


def _read_data(name: str, value: Any) -> str | bytes:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, dict) and value.get("type") == "Buffer":
        # What Node's JSON makes of a Buffer.
        content = value.get("data")
        if isinstance(content, list):
            try:
                return bytes(content)
            except (TypeError, ValueError):
                pass
    raise InvalidRequest.argument(name, value, "text or bytes")


def _write_data(name: str, value: Any) -> str | bytes:
    if isinstance(value, str) and value.isascii():
        return value
    return check_data(name, value)


def _read_signal(name: str, value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidRequest.argument(name, value, "a signal's name, such as SIGINT, or its number")
    return value


def _read_files(name: str, value: Any) -> list[tuple[str, str | bytes]]:
    if isinstance(value, dict):
        return [
            (check_text("path", path), _read_data(f"{name}[{path!r}]", data)) for path, data in value.items()
        ]
    if not isinstance(value, list):
        raise InvalidRequest.argument(name, value, "a list of {path, content}")
    pairs = []
    for index, one in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(one, dict) or set(one) - {"path", "content"} or "path" not in one:
            raise InvalidRequest.argument(where, one, "{path, content}")
        path = check_text(f"{where}.path", one["path"])
        pairs.append((path, _read_data(f"{where}.content", one.get("content"))))
    return pairs


def _write_files(name: str, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidRequest.argument(name, value, "a list")
    files = []
    for pair in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidRequest.argument(name, pair, "pairs of a path and its data")
        path = _write_text(f"{name} path", pair[0])
        files.append({"path": path, "content": _write_data(f"{name}[{path!r}]", pair[1])})
    return files


def choice(*names: str) -> Kind:
    """One of a few words, of which the first is meant where none is given."""
    wanted = " or ".join(names)

    def read(name: str, value: Any) -> str:
        if value not in names:
            raise InvalidRequest.argument(name, value, wanted)
        return str(value)

    return Kind("str", wanted, read, read, names[0])


def _counted(wanted: str, least: int = 0, most: int = 2**53 - 1) -> Kind:
    def check(name: str, value: Any) -> int:
        return check_count(name, value, least=least, most=most)

    return Kind("int", wanted, check, check)


TEXT: Final = Kind("str", "text", check_text, _write_text)
PATH: Final = Kind(
    "str",
    "a path",
    lambda name, value: check_text(name, value, empty=False),
    lambda name, value: _write_text(name, value, empty=False),
)
TEXTS: Final = Kind("Sequence[str]", "a list of text", _read_texts, _write_texts)
PATHS: Final = Kind("Iterable[str]", "a list of paths", _read_texts, _write_paths)
DATA: Final = Kind("str | bytes", "text or bytes", _read_data, _write_data)
ENV: Final = Kind("Mapping[str, str]", "an object of text", _read_env, _write_env)
HEADERS: Final = ENV
COUNT: Final = _counted("a whole number, 0 or more")
POSITIVE: Final = _counted("a whole number above 0", 1)
CELLS: Final = _counted("a whole number from 1 to 4096", 1, 4096)
MODE: Final = _counted("permission bits, 0 to 0o7777", 0, 0o7777)
FLAG: Final = Kind("bool", "true or false", _read_flag, check_flag)
MILLISECONDS: Final = Kind("float", "milliseconds, 0 or more", _read_milliseconds, _write_milliseconds)
MOMENT: Final = Kind("float", "milliseconds since the epoch", _read_moment, _write_moment)
SIGNAL: Final = Kind("str | int", "a signal's name or number", _read_signal, _read_signal)
FILES: Final = Kind(
    "Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]",
    "a list of {path, content}",
    _read_files,
    _write_files,
)
