"""Writes with an idempotency key: what is asked for twice is written once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Final

from agentos.errors import InvalidRequest

REMEMBERED_KEYS: Final = 256
"""Of one process or shell: the newest ones."""


def check_same(key: str, before: int, asked: Hashable) -> None:
    """InvalidRequest where what is `asked` with this `key` is not what was asked `before`, as a hash."""
    if hash(asked) != before:
        raise InvalidRequest.argument("idempotency_key", key, "a key that was not used for another request")


class WrittenOnce:
    """The keys of what was written to one process or shell."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._written: OrderedDict[str, int] = OrderedDict()
        """With the hash of what was written: all of it would be too much to keep."""

    async def write(self, key: str | None, content: bytes, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Have `write` accept `content`, unless it was accepted with this `key` before. None is no key.

        InvalidRequest where other content was.
        """
        if key is None:
            await write(content)
            return
        async with self._one_at_a_time:
            before = self._written.get(key)
            if before is not None:
                check_same(key, before, content)
                return
            # Either accepted as a whole and noted, or cancelled and not written at all: no step lies between.
            await write(content)
            self._written[key] = hash(content)
            if len(self._written) > REMEMBERED_KEYS:
                self._written.popitem(last=False)
