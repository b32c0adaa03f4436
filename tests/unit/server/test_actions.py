"""The table of actions: against the methods that it names, and there and back."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from agentos import actions, conversions
from agentos.errors import ActionNotFound, FileMissing, InvalidRequest
from agentos.machine.files import Files
from agentos.machine.vm import VM
from agentos.model import (
    DirEntry,
    ExecResult,
    FileContent,
    FileStat,
    FileWritten,
    Orphan,
    OutputChunk,
    OutputPage,
    ProcessInfo,
    ProcessTreeNode,
    ShellInfo,
    SpawnedProcess,
    Usage,
)
from agentos.wire.values import UNDEFINED

INFO = ProcessInfo(
    pid=7, ppid=1, pgid=7, sid=7, driver="node", command="node", args=("-e", "1"), cwd="/", status="running",
    exit_code=None, start_time=1000.5, exit_time=None, user="agentos", state="S", cpu_ms=1.5, rss_bytes=4096,
    threads=2,
)  # fmt: skip

RESULTS: list[tuple[conversions.Result, Any]] = [
    (
        conversions.EXEC_RESULT,
        ExecResult(143, "a", "b", "SIGTERM", "timeout", usage=Usage(1.5, 2), orphans=(Orphan(3, "sleep"),)),
    ),
    (conversions.SPAWNED, SpawnedProcess(1, "a", ("b",), False, 0, None, "exited", 1.5, 2.25)),
    (conversions.PROCESS_LIST, [INFO]),
    (conversions.FOREST, [ProcessTreeNode(INFO, (ProcessTreeNode(INFO),))]),
    (conversions.SHELL_LIST, [ShellInfo("shell-1", 2, "bash", (), 80, 24, True, None, 1.5)]),
    (conversions.PAGE, OutputPage((OutputChunk("stdout", b"\xff", 3, 2),), 4, True, 2, False)),
    (conversions.STAT, FileStat("/a", "symlink", 1, 0o777, 0, 0, 1.5, "/b")),
    (conversions.ENTRIES, [DirEntry("a", "/a", "file", 1)]),
    (conversions.CONTENTS, [FileContent("/a", b"x"), FileContent("/b", None, FileMissing("no", path="/b"))]),
    (conversions.WRITTEN, [FileWritten("/a"), FileWritten("/b", FileMissing("no", path="/b"))]),
    (conversions.FETCHED, conversions.FetchResponse(200, "OK", {"a": "b"}, b"x")),
    (conversions.PREVIEW, conversions.Preview("http://a/preview/b/", "b", 1.5)),
]


@pytest.mark.parametrize("action", [one for one in actions.ACTIONS if one.target != "actor"], ids=str)
def test_each_action_has_a_method_with_just_its_arguments(action: actions.Action) -> None:
    """Server, clients and embedded VM cannot drift apart."""
    method = getattr(VM if action.target == "vm" else Files, action.method)
    named = {one.name: one for one in (*action.params, *action.options)}
    parameters = dict(inspect.signature(method).parameters)
    parameters.pop("self")
    named.pop(actions.BOOT.name, None)  # the server's, not the VM's
    assert set(named) == set(parameters)
    for name, parameter in parameters.items():
        assert named[name].required == (parameter.default is parameter.empty), name


@pytest.mark.parametrize(("result", "value"), RESULTS)
def test_results_come_back_as_they_were(result: conversions.Result, value: Any) -> None:
    """What the client reads equals what the VM answered."""
    assert result.read(result.write(value)) == value


def test_names_and_times_are_the_wires() -> None:
    """camelCase and milliseconds."""
    tree = conversions.SPAWNED.write(SpawnedProcess(1, "a", ("b",), True, None, None, None, 1.5, None))
    assert tree["startTime"] == 1500
    assert tree["exitTime"] is None
    assert tree["exitCode"] is None


def test_a_deep_tree_is_cut_but_keeps_every_process() -> None:
    """Encoders bound nesting; a chain of a thousand processes still arrives."""
    node = ProcessTreeNode(INFO)
    for _ in range(999):
        node = ProcessTreeNode(INFO, (node,))
    trees = conversions.FOREST.write([node])
    depth, count = 0, 0
    while trees:
        depth += 1
        count += len(trees)
        trees = [child for tree in trees for child in tree["children"]]
    assert (depth, count) == (conversions.DEEPEST_TREE, 1000)


@pytest.mark.parametrize("action", actions.ACTIONS, ids=lambda one: one.name)
def test_every_alias_reaches_its_action(action: actions.Action) -> None:
    """Nested names are the same action."""
    assert all(actions.find(name) is action for name in (action.name, *action.aliases))


def test_arguments_come_back_as_they_were() -> None:
    """The client packs what the server reads."""
    action = actions.find("execFile")
    values = {"command": "ls", "args": ["-l"], "timeout": 1.5, "on_leader_exit": "kill", "stdin": b"x"}
    assert action.read_arguments(action.write_arguments(values)) == values
    assert action.write_arguments({"command": "ls", "args": None, "cwd": None}) == ["ls"]


def test_what_is_meant_anyway_is_not_sent() -> None:
    """A word that the VM's own method takes where none is given says nothing; any other is sent."""
    action = actions.find("execFile")
    assert action.write_arguments({"command": "ls", "encoding": "utf8", "on_leader_exit": "drain"}) == ["ls"]
    assert action.write_arguments({"command": "ls", "encoding": "bytes"}) == [
        "ls",
        None,
        {"encoding": "bytes"},
    ]
    meant = [(one, param) for one in actions.ACTIONS for param in one.options if param.kind.meant is not None]
    assert {param.name for _, param in meant} == {"encoding", "on_leader_exit"}
    for one, param in meant:
        signature = inspect.signature(getattr(VM, one.method))
        assert signature.parameters[param.name].default == param.kind.meant


def test_bytes_that_are_no_text_arrive_as_bytes() -> None:
    """As an embedded VM takes them; a name has no other way than text, and is refused."""
    action = actions.find("writeProcessStdin")
    assert action.write_arguments({"pid": 1, "data": "a\udcff"}) == [1, b"a\xff"]
    with pytest.raises(InvalidRequest, match="path"):
        actions.find("deleteFile").write_arguments({"path": "a\udcff"})


def test_null_and_undefined_are_not_given() -> None:
    """JavaScript callers skip arguments with undefined."""
    spawn = actions.find("spawn")
    assert spawn.read_arguments(["ls", UNDEFINED, {"cwd": None, "user": UNDEFINED}]) == {"command": "ls"}
    env = {"A": "1", "B": UNDEFINED}
    assert spawn.read_arguments(["ls", [], {"env": env}])["env"] == {"A": "1"}


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("exec", [], "command: wanted text"),
        ("exec", ["a", {"timeOut": 1}], "one of cwd"),
        ("exec", ["a", {"timeout": "1"}], "timeout: wanted milliseconds"),
        ("exec", ["a", {"timeout": float("nan")}], "timeout"),
        ("exec", ["a", {"timeout": 10**400}], "timeout: wanted milliseconds"),
        ("readProcessOutput", [1, {"since": 10**400}], "since: wanted milliseconds"),
        ("writeFile", ["a", {"type": "Buffer", "data": 10**9}], "data: wanted text or bytes"),
        ("writeFile", ["a", {"type": "Buffer", "data": [256]}], "data: wanted text or bytes"),
        ("exec", ["a", {"encoding": "latin1"}], "encoding: wanted utf8 or bytes"),
        ("exec", ["a", {"env": {"A": 1}}], "env"),
        ("exec", ["a", {"env": {"A=B": "1"}}], "env"),
        ("exec", ["a\0b"], "command"),
        ("exec", ["a", []], "options: wanted an object"),
        ("exec", ["a", {}, 1], "at most 2"),
        ("spawn", ["a", "b"], "args: wanted a list of text"),
        ("spawn", ["a", ["b", 1]], r"args[1]"),
        ("waitProcess", [-1], "pid"),
        ("waitProcess", [True], "pid"),
        ("waitProcess", [1.5], "pid"),
        ("writeProcessStdin", [1, {"a": 1}], "data: wanted text or bytes"),
        ("signalProcess", [1], "signal: wanted"),
        ("resizeShell", ["s", 0, 1], "cols: wanted a whole number from 1 to 4096"),
        ("writeFiles", [[{"path": "/a"}]], "content"),
        ("writeFiles", [[1]], "files[0]"),
        ("destroy", [1], "at most 0"),
    ],
)
def test_a_wrong_argument_is_named(name: str, args: list[Any], said: str) -> None:
    """The error says which argument it was and what it should have been."""
    with pytest.raises(InvalidRequest) as caught:
        actions.find(name).read_arguments(args)
    assert said in str(caught.value)


def test_an_unknown_action() -> None:
    """The code that given clients know, and never one that makes them try again."""
    with pytest.raises(ActionNotFound) as caught:
        actions.find("nope")
    assert caught.value.code == "actor.action_not_found"
