"""Where the id of an action is in a frame that cannot be read as a whole, so that it can be answered all the same.

A value that is too deep, too big or of a kind that the protocol does not know spoils one action, not the
connection. The frame is passed over in one go, without recursion and without making anything of its values; it
has to be whole, as what is cut off or garbled may say anything. Of one that has too many values, those at its
beginning are looked at: given clients write the id there.
"""

from __future__ import annotations

import re
from typing import Final

_PATH: Final = ("body", "val", "id")

_JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{}:,]|[^\s"\[\]{}:,]++', re.DOTALL)


def json_id(text: str, most: int) -> tuple[int, int] | None:
    """Where the value begins and ends in a JSON frame, of which `most` tokens are looked at; None: it is not there."""
    keys: list[str | None] = [None] * (len(_PATH) + 1)
    wanted = [None, *_PATH]
    depth, last, start, found = 0, "", -1, None
    for count, token in enumerate(_JSON_TOKEN.finditer(text)):
        if count > most:
            return found
        if count and not depth:
            return None
        word = token[0]
        if word in "]},":
            if start >= 0 and depth == len(_PATH):
                found, start = (start, token.start()), -1
            depth -= word != ","
        elif word == ":" and depth <= len(_PATH):
            keys[depth] = last[1:-1]
        elif start < 0 and depth == len(_PATH) and keys == wanted:
            start = token.start()
        if word in "[{":
            depth += 1
        if word in "[{," and depth <= len(_PATH):
            keys[depth] = None
        last = word
    return None if depth else found


def cbor_id(data: bytes, most: int) -> tuple[int, int] | None:
    """The same in a CBOR frame, of `most` values. The keys on the way are in their shortest form."""
    walk = _Walk(data, most)
    try:
        walk.find([bytes((0x60 + len(key),)) + key.encode() for key in _PATH])
    except _TooMuch:
        return walk.found
    except (_Garbled, IndexError):
        return None
    return walk.found if walk.at == len(data) else None


class _Garbled(Exception):
    """It is no CBOR."""


class _TooMuch(Exception):
    """There are more values."""


class _Walk:
    """Passes over values; those inside one another are counted, each with how many values it still has."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data = data
        self._left = most
        self.at = 0
        self.found: tuple[int, int] | None = None

    def find(self, keys: list[bytes]) -> None:
        """Pass over the next value. `found` is where in it is what lies under `keys`, one inside the other."""
        start = self.at
        if not keys or self._data[start] >> 5 != 5:
            self._skip()
            self.found = None if keys else (start, self.at)
            return
        self.found = None
        _, size = self._head()
        while size:
            if size < 0 and self._data[self.at] == 0xFF:
                self.at += 1
                break
            start = self.at
            self._skip()
            if self._data[start : self.at] == keys[0]:
                self.find(keys[1:])
            else:
                self._skip()
            size -= 1

    def _skip(self) -> None:
        inside = [1]
        while inside:
            left = inside[-1]
            if not left:
                inside.pop()
                continue
            major, size = self._head()
            if major == 7 and size < 0:
                if left > 0:
                    raise _Garbled
                inside.pop()
                continue
            inside[-1] = left - 1  # of what has no length, below zero from the start
            if size < 0:
                if major not in _OF_ANY_LENGTH:
                    raise _Garbled
                inside.append(-1)
            elif major in _STRINGS:
                self.at += size
            elif major in _VALUES:
                inside.append(size * 2 if major == 5 else size if major == 4 else 1)

    def _head(self) -> tuple[int, int]:
        """The type of the next value and its argument, below zero where it has none."""
        head = self._data[self.at]
        self.at += 1
        self._left -= 1
        major, info = head >> 5, head & 31
        if self._left < 0:
            raise _TooMuch
        if 28 <= info <= 30:
            raise _Garbled
        if info < 24:
            return major, info
        if info == 31:
            return major, -1
        start = self.at
        self.at += 1 << (info - 24)
        return major, int.from_bytes(self._data[start : self.at], "big")


_OF_ANY_LENGTH: Final = frozenset((2, 3, 4, 5))
_STRINGS: Final = frozenset((2, 3))
_VALUES: Final = frozenset((4, 5, 6))
