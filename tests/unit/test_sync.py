"""agentos.sync is what the generator makes, and has what the async classes have."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentos import host, sync
from agentos.machine import files, process, shell, vm

ROOT = Path(__file__).parents[2]
PAIRS = [
    (vm.VM, sync.VM),
    (process.Process, sync.Process),
    (shell.Shell, sync.Shell),
    (files.Files, sync.Files),
    (host.Host, sync.Host),
]
NOT_FOR_CALLERS = {
    vm.VM: {"link", "keep_draining", "process_ended", "shell_ended"},
    process.Process: {"start", "end", "kill_lineage"},
    shell.Shell: {"start", "hang_up"},
    files.Files: {"close"},
    host.Host: {"ready", "shut_down"},
}


def public(kind: type) -> dict[str, Any]:
    """Public members, inherited ones too, and the methods of a context manager under one name."""
    everything = {
        name: value for one in reversed(kind.__mro__[:-1]) if one.__module__ != "agentos.background"
        for name, value in vars(one).items()
    }  # fmt: skip
    members = {name: value for name, value in everything.items() if not name.startswith("_")}
    for name in ("enter", "exit"):
        for dunder in (f"__a{name}__", f"__{name}__"):
            if dunder in vars(kind):
                members[f"<{name}>"] = vars(kind)[dunder]
    return members


def plain(annotation: object) -> str:
    """An annotation with the async kinds of iteration as the plain ones."""
    text = str(annotation).replace("AsyncIterable[bytes] | ", "")
    return re.sub(r"Async(?:Iterator|Generator)\[([^,\]]+)(?:, None)?\]", r"Iterator[\1]", text)


def test_sync_is_what_the_generator_makes() -> None:
    """Not edited, not forgotten."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate_sync.py"), "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("asynchronous", "blocking"), PAIRS, ids=lambda kind: kind.__name__)
def test_twins_have_the_same_members(asynchronous: type, blocking: type) -> None:
    """Nothing is missing but what is not for callers, and nothing async is left."""
    wanted = {
        name for name, value in public(asynchronous).items() if callable(value) or isinstance(value, property)
    } - NOT_FOR_CALLERS[asynchronous]
    offered = public(blocking)
    assert wanted <= set(offered)
    assert NOT_FOR_CALLERS[asynchronous] <= set(dir(asynchronous))
    assert not NOT_FOR_CALLERS[asynchronous] & set(offered)
    for value in offered.values():
        assert not inspect.iscoroutinefunction(value)
        assert not inspect.isasyncgenfunction(value)


@pytest.mark.parametrize(("asynchronous", "blocking"), PAIRS, ids=lambda kind: kind.__name__)
def test_twins_have_the_same_signatures(asynchronous: type, blocking: type) -> None:
    """Parameters, their kinds, defaults and types, what is returned, and the first line of the docstring."""
    for name, value in public(blocking).items():
        original = public(asynchronous).get(name)
        if original is None or isinstance(value, property):
            continue  # an attribute of the async object
        ours, theirs = inspect.signature(value), inspect.signature(original)
        assert list(ours.parameters) == list(theirs.parameters), name
        for one in ours.parameters:
            mine, its = ours.parameters[one], theirs.parameters[one]
            assert (mine.kind, mine.default) == (its.kind, its.default), name
            assert plain(mine.annotation) == plain(its.annotation), name
        assert ours.return_annotation == plain(theirs.return_annotation), name
        if not name.startswith("<"):
            assert value.__doc__, name


@pytest.mark.parametrize("blocking", [sync.VM, sync.Host])
def test_constructors_take_the_same(blocking: Any) -> None:
    """So that code moves from one to the other by changing its import."""
    original = {kind.__name__: kind for kind, _ in PAIRS}[blocking.__name__]
    assert str(inspect.signature(blocking)) == str(inspect.signature(original))


def test_twins_of_one_object_are_equal() -> None:
    """vm.process(pid) twice is the same process."""
    one = vm.VM()
    assert sync.VM.__eq__(make(one), make(one))
    assert hash(make(one)) == hash(make(one))
    assert make(one) != make(vm.VM())
    assert repr(make(one)) == repr(one)


def make(one: vm.VM) -> sync.VM:
    """A twin of it."""
    twin = object.__new__(sync.VM)
    twin._async = one
    return twin
