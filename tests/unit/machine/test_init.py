"""What PID 1 tells of processes, on a table that the test makes."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from agentos.linux import proc
from agentos.machine.channel import BlockingChannel
from agentos.machine.confinement import Confinement
from agentos.machine.init import Init

GOING, COMING = 4, 5
"""Numbers of two spawners: the first was killed, and what was its mark is the other one's now."""
PARENTS = {21: 1, 22: 21, 31: 12, 32: 31, 41: 11}
"""pid -> parent of all that carries the mark."""


@pytest.mark.parametrize(
    ("message", "named"), [({}, [21, 22, 31, 32, 41]), ({"left_by": GOING}, [21, 41])], ids=["all", "left"]
)
def test_what_a_spawner_has_left_is_not_what_the_next_one_has_started(
    monkeypatch: pytest.MonkeyPatch, message: dict[str, Any], named: list[int]
) -> None:
    """The kernel gives a mark that is free to the next one, as it does with pids."""
    monkeypatch.setattr(
        proc,
        "read_process",
        lambda pid: {"pid": pid, "ppid": PARENTS[pid], "args": ["sleep"], "comm": "sleep"},
    )
    monkeypatch.setattr(Init, "living", lambda self, mark: list(PARENTS))
    here, there = socket.socketpair()
    with here, there:
        init = Init(BlockingChannel(here), -1, Confinement.__new__(Confinement), 100)
        init.servants = {11: GOING, 12: COMING}
        members = init.members({"mark": 7, **message}, [])["members"]
    assert [pid for pid, _ in members] == named
