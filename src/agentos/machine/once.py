"""Starts and writes with an idempotency key: what is asked for twice is done once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Generic, TypeVar

from agentos.errors import InvalidRequest

REMEMBERED_KEYS: Final = 256
"""Of what was written to one process or shell: the newest ones."""
REMEMBERED_STARTS: Final = 1024
"""Keys of processes, and of shells, that are remembered for one VM, the oldest forgotten first."""

_Started = TypeVar("_Started")


def check_same(key: str, before: int, asked: Hashable) -> None:
    """InvalidRequest where what is `asked` with this `key` is not what was asked `before`, as a hash."""
    if hash(asked) != before:
        raise InvalidRequest.argument("idempotency_key", key, "a key that was not used for another request")


class StartedOnce(Generic[_Started]):
    """The keys of what was started in one VM."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, tuple[int, asyncio.Future[_Started]]] = OrderedDict()
        """With the hash of what was asked for."""

    async def start(
        self, key: str | None, asked: Hashable, start: Callable[[], Awaitable[_Started]]
    ) -> _Started:
        """What the first `start` with this `key` (None: no key) started. InvalidRequest where other was `asked` for."""
        if key is None:
            return await start()
        before = self._keys.get(key)
        if before is not None:
            asked_before, starting = before
            check_same(key, asked_before, asked)
        else:
            # A task of its own: who asks again must not be cancelled with the first, whose connection broke.
            starting = asyncio.ensure_future(start())
            starting.add_done_callback(lambda done: self._forget_failed(key, done))
            self._keys[key] = hash(asked), starting
            while len(self._keys) > REMEMBERED_STARTS:
                self._keys.popitem(last=False)
        return await asyncio.shield(starting)

    def _forget_failed(self, key: str, done: asyncio.Future[_Started]) -> None:
        if done.cancelled() or done.exception() is not None:
            known = self._keys.get(key)
            if known is not None and known[1] is done:
                del self._keys[key]


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
