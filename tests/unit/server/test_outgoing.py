"""Frames of one connection: their order, one at a time, whoever is cancelled or fails in between."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from agentos.server.outgoing import Outgoing


class Slow:
    """A socket that takes a frame when it is told to."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.inside = 0
        self.failing = False
        self._turns = asyncio.Semaphore(0)

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.inside += 1
        assert self.inside == 1, "two frames at once"
        try:
            await self._turns.acquire()
            if self.failing:
                raise RuntimeError("nobody is there")
            self.taken.append(message.get("bytes") or message["text"])
        finally:
            self.inside -= 1

    async def take(self, count: int = 1) -> None:
        for _ in range(count):
            self._turns.release()
        for _ in range(10 * count + 10):
            await asyncio.sleep(0)


def _outgoing(socket: Slow) -> tuple[Outgoing, list[str]]:
    lost: list[str] = []
    return Outgoing(socket.send, lambda: lost.append("lost")), lost


async def _begin(outgoing: Outgoing, *frames: bytes | str) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(outgoing.send(one)) for one in frames]
    await asyncio.sleep(0)
    return tasks


def test_order() -> None:
    """Each frame waits for those before it, also one that comes at the moment when another was taken."""

    async def main() -> None:
        socket = Slow()
        outgoing, lost = _outgoing(socket)
        tasks = await _begin(outgoing, b"1", b"2", "3")
        assert outgoing.unsent == 3
        tasks[0].add_done_callback(lambda _: tasks.append(asyncio.ensure_future(outgoing.send(b"4"))))
        await socket.take()
        assert socket.taken == [b"1"]
        await socket.take(3)
        assert socket.taken == [b"1", b"2", "3", b"4"]
        await asyncio.gather(*tasks)
        assert (outgoing.unsent, lost) == (0, [])

    asyncio.run(main())


def test_alone_again() -> None:
    """When all is sent, the next one finds nobody before it."""

    async def main() -> None:
        socket = Slow()
        outgoing, _ = _outgoing(socket)
        for number in (b"1", b"2", b"3"):
            await _begin(outgoing, number)
            await socket.take()
            assert (socket.taken[-1], outgoing.unsent) == (number, 0)

    asyncio.run(main())


@pytest.mark.parametrize("gone", [0, 1, 2, 3])
def test_one_is_cancelled(gone: int) -> None:
    """The others go on, in their order."""

    async def main() -> None:
        socket = Slow()
        outgoing, _ = _outgoing(socket)
        tasks = await _begin(outgoing, b"0", b"1", b"2", b"3")
        tasks[gone].cancel()
        await socket.take(3)
        assert socket.taken == [b"%d" % one for one in range(4) if one != gone]
        assert [task.cancelled() for task in tasks] == [one == gone for one in range(4)]
        assert outgoing.unsent == 0

    asyncio.run(main())


def test_all_fail() -> None:
    """What cannot be sent is told each time, and nobody waits for ever."""

    async def main() -> None:
        socket = Slow()
        outgoing, lost = _outgoing(socket)
        socket.failing = True
        tasks = await _begin(outgoing, b"0", b"1", b"2")
        await socket.take(3)
        await asyncio.gather(*tasks)
        assert (lost, outgoing.unsent) == (["lost"] * 3, 0)

    asyncio.run(main())


def test_room() -> None:
    """Whoever waits for room goes on when there is, and not before; two may wait at once."""

    async def main() -> None:
        socket = Slow()
        outgoing, _ = _outgoing(socket)
        tasks = await _begin(outgoing, b"123", b"456", b"7")
        waiting = [asyncio.create_task(outgoing.at_most(most, 9)) for most in (3, 0)]
        for expected in ([False, False], [True, False], [True, True]):
            await socket.take()
            assert [task.done() for task in waiting] == expected
        await asyncio.gather(*tasks, *waiting)
        await outgoing.at_most(0, 0)

    asyncio.run(main())
