"""The loop behind agentos.sync: calls, iterators and chunks between a blocking caller and a coroutine."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from agentos import background
from agentos.background import iterate, run, run_feeding


async def give(value: object) -> object:
    """`value`, after a turn of the loop."""
    await asyncio.sleep(0)
    return value


def test_a_call_returns_what_the_coroutine_returns() -> None:
    """And raises what it raises."""
    assert run(give(3)) == 3

    async def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(fail())


def test_all_calls_share_one_loop() -> None:
    """From whatever thread they come."""

    async def where() -> tuple[int, str]:
        return id(asyncio.get_running_loop()), threading.current_thread().name

    found = [run(where())]
    threads = [threading.Thread(target=lambda: found.append(run(where()))) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert set(found) == {(id(background._running().loop), background.THREAD_NAME)}


def test_context_variables_are_the_callers() -> None:
    """What is set around the call is seen in it."""
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("mine")

    async def look() -> str:
        return variable.get()

    assert run(look()) == "mine"


def test_an_interrupt_cancels_the_call_and_waits_for_its_end() -> None:
    """As Ctrl-C in a terminal does."""
    ended: list[str] = []

    async def endless() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
            ended.append("cleaned up")
            raise

    with pytest.raises(KeyboardInterrupt):
        run(endless())
    assert ended == ["cleaned up"]


def test_a_call_from_the_loops_own_thread_is_refused() -> None:
    """It would wait for itself."""

    async def inside() -> object:
        return run(give(1))

    with pytest.raises(RuntimeError, match="wait for itself"):
        run(inside())


class Counted:
    """An async generator whose steps and end can be seen."""

    def __init__(self) -> None:
        self.taken = 0
        self.closed = 0

    async def items(self) -> AsyncIterator[int]:
        try:
            for number in range(5):
                self.taken += 1
                yield number
        finally:
            await asyncio.sleep(0)
            self.closed += 1


def test_an_iterator_runs_to_its_end() -> None:
    """In order, then closed."""
    counted = Counted()
    assert list(iterate(counted.items())) == [0, 1, 2, 3, 4]
    assert counted.closed == 1


def test_nothing_is_taken_ahead_and_leaving_closes() -> None:
    """A break is the end of the async generator too."""
    counted = Counted()
    for number in iterate(counted.items()):
        if number == 1:
            break
    assert (counted.taken, counted.closed) == (2, 1)


def test_an_iterator_that_was_never_begun_begins_nothing() -> None:
    """Neither by being made nor by being dropped."""
    counted = Counted()
    iterator = iterate(counted.items())
    del iterator
    assert (counted.taken, counted.closed) == (0, 0)


def test_an_iterator_passes_errors_on() -> None:
    """At the step where they are raised."""

    async def failing() -> AsyncIterator[int]:
        yield 1
        raise KeyError("mine")

    iterator = iterate(failing())
    assert next(iterator) == 1
    with pytest.raises(KeyError):
        next(iterator)


async def collect(chunks: Any) -> bytes:
    """All that an async iterable gives."""
    return b"".join([chunk async for chunk in chunks])


def test_chunks_are_made_in_the_callers_thread() -> None:
    """So that a generator may make blocking calls itself."""
    threads: set[str] = set()

    def chunks() -> Iterator[bytes]:
        for number in range(3):
            threads.add(threading.current_thread().name)
            assert run(give(number)) == number
            yield b"%d" % number

    assert run_feeding(collect, chunks()) == b"012"
    assert threads == {threading.current_thread().name}


def test_only_what_is_asked_for_is_made() -> None:
    """A coroutine that stops early leaves the rest unmade."""
    made: list[int] = []

    def chunks() -> Iterator[bytes]:
        for number in range(100):
            made.append(number)
            yield b"x"

    async def two(given: Any) -> int:
        count = 0
        async for _ in given:
            count += 1
            if count == 2:
                break
        return count

    assert run_feeding(two, chunks()) == 2
    assert made == [0, 1]


def test_an_error_in_making_chunks_is_raised_in_both() -> None:
    """The coroutine can undo what it began, and the caller hears of it."""
    seen: list[str] = []

    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise KeyError("mine")

    async def careful(given: Any) -> None:
        try:
            await collect(given)
        except KeyError:
            seen.append("undone")
            raise

    with pytest.raises(KeyError):
        run_feeding(careful, chunks())
    assert seen == ["undone"]


def test_an_interrupt_while_a_chunk_is_made_cancels_the_call() -> None:
    """Whoever waits for the chunk must not wait for ever."""
    ended: list[str] = []

    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise KeyboardInterrupt

    async def endless(given: Any) -> None:
        try:
            await collect(given)
        finally:
            ended.append("ended")

    with pytest.raises(KeyboardInterrupt):
        run_feeding(endless, chunks())
    assert ended == ["ended"]


@pytest.mark.parametrize(
    "last",
    [
        "pass",
        "iterator = iterate(endless()); next(iterator)",
        "import threading; threading.Thread(target=lambda: run(wait()), daemon=True).start()",
        "pid = os.fork()\nif pid == 0:\n    print(run(give(4)), flush=True); os._exit(0)\nos.waitpid(pid, 0)",
    ],
    ids=["idle", "open iterator", "running call", "forked child"],
)
def test_the_thread_ends_with_the_process(last: str) -> None:
    """Quietly, whatever is still under way."""
    program = f"""
import asyncio, os
from agentos.background import iterate, run

async def give(value):
    return value

async def endless():
    while True:
        yield 1

async def wait():
    await asyncio.Event().wait()

print(run(give(3)), flush=True)
{last}
"""
    flags = ["-W", "ignore::DeprecationWarning"]  # of Python 3.12, for a fork of a process with threads
    done = subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["3", "4"] if "fork" in last else ["3"])
