"""Writes with an idempotency key: what is asked for twice is written once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

REMEMBERED_KEYS: Final = 256
"""Of one process or shell: the newest ones."""


class WrittenOnce:
    """The keys of what was written to one process or shell."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._written: OrderedDict[str, None] = OrderedDict()

    async def write(self, key: str | None, content: bytes, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Have `write` accept `content`, unless what came with this `key` has been accepted. None is no key."""
        if key is None:
            await write(content)
            return
        async with self._one_at_a_time:
            if key in self._written:
                return
            # Either accepted as a whole and noted, or cancelled and not written at all: no step lies between.
            await write(content)
            self._written[key] = None
            if len(self._written) > REMEMBERED_KEYS:
                self._written.popitem(last=False)
