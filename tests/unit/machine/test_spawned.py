"""The processes of a VM by pid, where pids come round again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agentos.errors import ProcessNotFound
from agentos.machine.output import OutputLog
from agentos.machine.spawned import Spawned
from agentos.model import Limits


def process(pid: int) -> Any:
    """What a process is to those who remember it."""
    return SimpleProcess(pid=pid, running=True, log=OutputLog(1024))


class SimpleProcess(SimpleNamespace):
    """Is itself only, as a process is."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def end(spawned: Spawned, one: Any) -> None:
    """It ends."""
    one.running = False
    spawned.ended(one)


def test_a_pid_that_came_round_counts_once() -> None:
    """The newest three are remembered, and the second process of a pid is not forgotten with the first."""
    spawned = Spawned(Limits(exited_processes=3))
    first, second, others = process(7), process(7), [process(8), process(9)]
    for one in (first, second, *others):
        spawned.add(one)
        end(spawned, one)
    assert spawned.get(7) is second
    last = process(10)
    spawned.add(last)
    end(spawned, last)
    with pytest.raises(ProcessNotFound):
        spawned.get(7)
    assert [spawned.get(pid) for pid in (8, 9, 10)] == [*others, last]


def test_an_end_that_is_heard_late_is_not_the_next_ones() -> None:
    """The pid of a process whose end was not reported yet was given again: the new one is there as long as it runs."""
    spawned = Spawned(Limits(exited_processes=1))
    first, second = process(7), process(7)
    spawned.add(first)
    spawned.add(second)
    end(spawned, first)
    for pid in (8, 9):
        other = process(pid)
        spawned.add(other)
        end(spawned, other)
    assert spawned.get(7) is second
    assert spawned.running() == [second]
