"""The client has the verbs of the embedded VM, its blocking twin those of the async one; imports stay light."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from agentos.actions import ACTIONS
from agentos.client import aio
from agentos.client import sync as blocking
from agentos.machine import files, process, shell, vm

EMBEDDED = [
    (vm.VM, aio.Agent),
    (vm.VM, aio.Connection),
    (process.Process, aio.RemoteProcess),
    (shell.Shell, aio.RemoteShell),
    (files.Files, aio.RemoteFiles),
]
ONLY_HERE = {
    vm.VM: {
        "start", "close", "link", "keep_draining", "process_ended", "shell_ended", "connect",
        "on_process", "on_process_end", "on_shell", "on_shell_end", "on_stopped", "on_limit",
    },
    process.Process: {"start", "end", "signal_leader", "kill_lineage"},
    shell.Shell: {"start", "hang_up"},
    files.Files: {"close"},
}  # fmt: skip
"""What a VM in this process has and a remote one can not, or calls otherwise."""
TWINS = [
    (aio.Agent, blocking.Agent),
    (aio.Client, blocking.Client),
    (aio.Connection, blocking.Connection),
    (aio.Kind, blocking.Kind),
    (aio.RemoteFiles, blocking.RemoteFiles),
    (aio.RemoteProcess, blocking.RemoteProcess),
    (aio.RemoteShell, blocking.RemoteShell),
]


def methods(kind: type) -> dict[str, Callable[..., Any]]:
    """Public methods, inherited ones too."""
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: value for name, value in found if not name.startswith("_")}


@pytest.mark.parametrize(("embedded", "remote"), EMBEDDED, ids=lambda kind: kind.__name__)
def test_code_moves_by_changing_one_line(embedded: type, remote: type) -> None:
    """Every verb, with the same arguments and defaults."""
    theirs = methods(remote)
    for name, method in methods(embedded).items():
        if name in ONLY_HERE[embedded]:
            continue
        assert name in theirs, f"{remote.__name__} lacks {name}"
        ours = inspect.signature(method).parameters
        assert {n: (p.kind, p.default) for n, p in ours.items()} == {
            n: (p.kind, p.default) for n, p in inspect.signature(theirs[name]).parameters.items()
        }, name
        assert (
            inspect.iscoroutinefunction(method) == inspect.iscoroutinefunction(theirs[name]) or name == "info"
        )


def test_every_action_has_its_verb() -> None:
    """Whatever a server can be asked, the client can ask."""
    for action in ACTIONS:
        assert hasattr(aio.RemoteFiles if action.target == "files" else aio.Agent, action.method), action.name


@pytest.mark.parametrize(("asynchronous", "twin"), TWINS, ids=lambda kind: kind.__name__)
def test_the_blocking_twin_has_the_same(asynchronous: type, twin: type) -> None:
    """Members, arguments and defaults."""
    theirs = methods(twin)
    assert set(methods(asynchronous)) == set(theirs)
    for name, method in methods(asynchronous).items():
        ours = inspect.signature(method).parameters
        assert {n: (p.kind, p.default) for n, p in ours.items()} == {
            n: (p.kind, p.default) for n, p in inspect.signature(theirs[name]).parameters.items()
        }, name
        assert not inspect.iscoroutinefunction(theirs[name])
    assert ("__aenter__" in vars(asynchronous)) == ("__enter__" in vars(twin))


def test_create_client_is_the_same_on_both_sides() -> None:
    """So that code moves from one to the other by changing its import."""
    signatures = [inspect.signature(module.create_client).parameters for module in (aio, blocking)]
    assert signatures[0] == signatures[1]


def test_importing_agentos_needs_only_the_standard_library() -> None:
    """The client and the server are imported when they are asked for."""
    script = (
        "import sys, agentos, agentos.sync, agentos.cli\n"
        "assert not {'httpx', 'cbor2', 'websockets', 'uvicorn', 'starlette'} & set(sys.modules), sys.modules\n"
        "agentos.create_client, agentos.agent_os, agentos.setup\n"
        "assert agentos.sync.create_client().vm.name == 'vm'\n"
        "from agentos import create_client, setup, agent_os\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
