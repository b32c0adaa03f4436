"""The VM's process table as values and as a tree, for any snapshot that /proc may give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentos.machine.spawner import WASM_RUNNER
from agentos.machine.table import driver_of, process_info, tree_of
from agentos.model import ProcessInfo, ProcessTreeNode


def entry(pid: int, ppid: int = 1, **changed: Any) -> dict[str, Any]:
    """What init reads of one process."""
    base: dict[str, Any] = {
        "pid": pid, "ppid": ppid, "pgid": pid, "sid": pid, "state": "S", "comm": "sleep", "args": ["sleep", "60"],
        "uid": 1000, "exe": "/usr/bin/sleep", "cwd": "/home/agentos", "cpu_ms": 1.5, "threads": 1, "start_ticks": 100,
        "rss_bytes": 4096, "mark": 7,
    }  # fmt: skip
    return {**base, **changed}


def info(pid: int, ppid: int) -> ProcessInfo:
    """A process that only has its place in the tree."""
    return process_info(entry(pid, ppid), {})


@pytest.mark.parametrize(
    ("exe", "comm", "args", "driver"),
    [
        ("/usr/bin/sleep", "sleep", ["sleep"], "native"),
        ("/usr/bin/python3.11", "app", ["app"], "python"),
        ("/opt/python/bin/python3", "python3", ["python3"], "python"),
        ("/usr/bin/pypy3", "pypy3", ["pypy3"], "python"),
        ("/usr/bin/node", "node", ["node", "x.js"], "node"),
        ("/usr/bin/nodejs", "MainThread", ["npm install"], "node"),
        ("/usr/bin/node (deleted)", "node", ["node"], "node"),
        ("/usr/bin/ruby3.1", "ruby", ["ruby"], "ruby"),
        ("/usr/bin/python3.11", "python3", ["/usr/bin/python3", "-IS", WASM_RUNNER, "./x.wasm"], "wasm"),
        ("/usr/bin/wasmtime", "wasmtime", ["wasmtime", "x.wasm"], "wasm"),
        ("/usr/bin/bash", "bash", ["python3"], "native"),
        (None, "python3", ["python3", "-c", "1"], "python"),
        (None, "kthread", [], "native"),
        ("/home/agentos/nodeless", "nodeless", ["nodeless"], "native"),
    ],
)
def test_the_driver_is_the_runtime_that_runs_it(
    exe: str | None, comm: str, args: list[str], driver: str
) -> None:
    """By the executable, not by the name that a process gives itself."""
    assert driver_of(exe, comm, args) == driver


def test_a_process_as_a_value() -> None:
    """Names instead of numbers, and what the API started is marked."""
    one = process_info(entry(5), {5: None})
    assert (one.command, one.args, one.user, one.status) == ("sleep", ("60",), "agentos", "running")
    assert (one.managed, one.shell_id) == (True, None)
    assert process_info(entry(5), {5: "shell-1"}).shell_id == "shell-1"
    assert not process_info(entry(5), {6: None}).managed
    assert process_info(entry(5, uid=0), {}).user == "root"
    assert process_info(entry(5, uid=33), {}).user == "33"


def test_a_zombie_has_exited() -> None:
    """It has no arguments any more: its name is what is left."""
    one = process_info(entry(5, state="Z", args=[], exe=None, cwd=None), {})
    assert (one.status, one.command, one.args, one.cwd) == ("exited", "sleep", (), None)


def test_a_wasm_module_is_shown_as_the_program_that_it_is() -> None:
    """Not as the interpreter of its runner."""
    one = process_info(
        entry(5, exe="/usr/bin/python3", args=["/usr/bin/python3", "-IS", WASM_RUNNER, "./x.wasm", "-v"]), {}
    )
    assert (one.driver, one.command, one.args) == ("wasm", "./x.wasm", ("-v",))


def test_a_tree() -> None:
    """Children below their parent in order of pid; whose parent is not shown is a root."""
    tree = tree_of([info(7, 5), info(5, 1), info(6, 5), info(9, 8), info(8, 7)])
    deep = ProcessTreeNode(info(7, 5), (ProcessTreeNode(info(8, 7), (ProcessTreeNode(info(9, 8)),)),))
    assert shape(tree) == shape([ProcessTreeNode(info(5, 1), (ProcessTreeNode(info(6, 5)), deep))])


def shape(nodes: Iterable[ProcessTreeNode]) -> list[object]:
    """Pids, nested as the nodes are."""
    return [[node.process.pid, shape(node.children)] for node in nodes]


def walk(nodes: list[ProcessTreeNode]) -> list[tuple[int, int | None]]:
    """(pid, pid of the node above) of every node, without recursion."""
    found: list[tuple[int, int | None]] = []
    pending: list[tuple[ProcessTreeNode, int | None]] = [(node, None) for node in nodes]
    while pending:
        node, above = pending.pop()
        found.append((node.process.pid, above))
        pending += [(child, node.process.pid) for child in node.children]
    return found


@given(st.dictionaries(st.integers(2, 30), st.integers(0, 30), max_size=25))
def test_any_snapshot_makes_a_tree(parents: dict[int, int]) -> None:
    """Every process once, below its own parent or at the top, though a torn snapshot may even hold a cycle."""
    placed = walk(tree_of([info(pid, ppid) for pid, ppid in parents.items()]))
    assert sorted(pid for pid, _ in placed) == sorted(parents)
    for pid, above in placed:
        if above is not None:
            assert parents[pid] == above
        elif parents[pid] in parents:
            assert leads_back(pid, parents), f"{pid} has a parent in the table and is in no cycle"


def leads_back(pid: int, parents: dict[int, int]) -> bool:
    """Whether the way up from `pid` comes to it again."""
    at = parents[pid]
    for _ in parents:
        if at == pid:
            return True
        at = parents.get(at, 0)
    return False


def test_a_long_line_of_descent() -> None:
    """No recursion limit ends it."""
    tree = tree_of([info(pid, pid - 1) for pid in range(2, 3000)])
    assert len(walk(tree)) == 2998
