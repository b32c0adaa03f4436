"""Values check themselves when they are made, and name what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentos import VM, agent_os
from agentos.errors import CommandFailed, InvalidRequest, IsolationUnavailable
from agentos.model import (
    ExecResult,
    Limits,
    Mount,
    TermSize,
    VmSpec,
    check_count,
    check_env,
    check_seconds,
    check_text,
    check_texts,
)


@pytest.mark.parametrize("name", [one.name for one in dataclasses.fields(Limits) if one.name != "cpu_cores"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "1", True, None])
def test_a_limit_is_a_whole_number_above_zero(name: str, value: Any) -> None:
    """Anything else is refused by name."""
    with pytest.raises(InvalidRequest) as caught:
        Limits(**{name: value})
    assert caught.value.details["argument"] == f"limits.{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("processes", 2**22 + 1), ("open_files", 15), ("terminals", 2**20 + 1), ("memory_bytes", 2**60 + 1)],
)
def test_a_limit_is_one_that_a_vm_can_be_made_with(name: str, value: int) -> None:
    """What the kernel would refuse while the VM boots, or no VM could live with, is refused when it is said."""
    with pytest.raises(InvalidRequest, match=name):
        Limits(**{name: value})


@pytest.mark.parametrize("value", [0, -0.5, "1", True, float("nan"), float("inf"), 0.001, 10_001, 10**400])
def test_cpu_cores_is_a_number_above_zero(value: Any) -> None:
    """Fractions are fine, and None is no limit."""
    with pytest.raises(InvalidRequest):
        Limits(cpu_cores=value)
    assert Limits(cpu_cores=0.5).cpu_cores == 0.5
    assert Limits().cpu_cores is None


def test_cpu_weight_has_the_kernels_range() -> None:
    """1 to 10000."""
    assert Limits(cpu_weight=10_000).cpu_weight == 10_000
    with pytest.raises(InvalidRequest):
        Limits(cpu_weight=10_001)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "//",
        "/proc",
        "/proc/1",
        "/dev",
        "/dev/shm/x",
        "/sys",
        "x",
        "",
        "/a/../b",
        "/a\0",
        3,
        "//proc",
        "/./proc",
        "/dev/",
        "/./",
    ],
)
def test_mounts_stay_off_the_systems_directories(path: Any) -> None:
    """A guest path is absolute, without .., and none of /proc, /dev and /sys."""
    with pytest.raises(InvalidRequest) as caught:
        Mount("/srv", path)
    assert caught.value.details["argument"] == "mount.guest_path"


def test_a_mount_is_read_only_unless_said_otherwise() -> None:
    """The safe default."""
    with pytest.raises(InvalidRequest):
        Mount("/srv", "/data", read_only=0)  # type: ignore[arg-type]
    assert Mount("/srv", "/data").read_only
    with pytest.raises(InvalidRequest):
        Mount("srv", "/data")


@pytest.mark.parametrize(
    "wrong",
    [
        {"hostname": ""},
        {"hostname": "a" * 65},
        {"hostname": "a b"},
        {"hostname": "é"},
        {"hostname": 3},
        {"user": "nobody"},
        {"network": "host"},
        {"isolation": "none"},
        {"isolation": ["namespaces"]},
        {"env": {"A=B": "x"}},
        {"env": {"": "x"}},
        {"env": {"A": 1}},
        {"env": {"A": "x\0"}},
        {"env": [("A", "x")]},
    ],
)
def test_a_spec_refuses_what_no_vm_can_be(wrong: dict[str, Any]) -> None:
    """Each with the argument's name."""
    with pytest.raises(InvalidRequest) as caught:
        VmSpec(**wrong)
    assert next(iter(wrong)) in caught.value.details["argument"]


@pytest.mark.parametrize("tier", ["gvisor", "microvm"])
@pytest.mark.parametrize("make", [lambda **spec: VmSpec(**spec), lambda **spec: VM(**spec), agent_os])
def test_a_stronger_tier_is_never_replaced_by_a_weaker_one(make: Callable[..., Any], tier: str) -> None:
    """Asking for one that is not to be had is an error of its own, which names those that are."""
    with pytest.raises(IsolationUnavailable) as caught:
        make(isolation=tier)
    assert caught.value.code == "vm.isolation_unavailable"
    assert caught.value.details == {"isolation": tier, "available": ["namespaces"]}
    assert isinstance(caught.value, InvalidRequest)
    assert make(isolation="namespaces")


def test_equal_specs_are_equal() -> None:
    """The pool of booted VMs goes by that."""
    assert VmSpec() == VmSpec()
    assert VmSpec(limits=Limits(processes=10)) != VmSpec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        VmSpec().hostname = "x"  # type: ignore[misc]


@given(st.integers())
def test_terminal_sizes(number: int) -> None:
    """From 1 to 4096 cells each way."""
    if 1 <= number <= 4096:
        assert TermSize(number, number) == TermSize(cols=number, rows=number)
    else:
        for wrong in ({"cols": number}, {"rows": number}):
            with pytest.raises(InvalidRequest):
                TermSize(**wrong)


@given(st.text())
def test_text_is_what_the_kernel_takes(text: str) -> None:
    """No NUL, and nothing that UTF-8 or surrogate escapes can not hold."""
    try:
        text.encode("utf-8", "surrogateescape")
        fits = "\0" not in text
    except UnicodeEncodeError:
        fits = False
    if fits:
        assert check_text("x", text) is text
    else:
        with pytest.raises(InvalidRequest):
            check_text("x", text)


@pytest.mark.parametrize("value", [b"x", 1, None, ["x"]])
def test_text_is_text(value: object) -> None:
    """Nothing is converted on the sly."""
    with pytest.raises(InvalidRequest):
        check_text("x", value)


def test_empty_text_where_it_makes_no_sense() -> None:
    """Only with empty=False."""
    assert check_text("x", "") == ""
    with pytest.raises(InvalidRequest):
        check_text("x", "", empty=False)


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, None, 2**63])
def test_a_count_is_a_whole_number_in_range(value: object) -> None:
    """bool is none."""
    with pytest.raises(InvalidRequest):
        check_count("x", value)


@pytest.mark.parametrize("value", [-0.1, "1", True, float("nan"), float("inf"), 1e9])
def test_seconds_are_a_number_from_zero(value: object) -> None:
    """None is no limit."""
    with pytest.raises(InvalidRequest):
        check_seconds("x", value)
    assert check_seconds("x", None) is None
    assert check_seconds("x", 0) == 0.0


def test_env_is_copied() -> None:
    """A caller that changes its mapping later changes nothing here."""
    mine = {"A": "1"}
    checked = check_env(mine)
    mine["A"] = "2"
    assert checked == {"A": "1"}
    assert check_env(None) == {}


def test_check_returns_or_raises_the_whole_result() -> None:
    """As subprocess's check, with everything in the error's details."""
    fine = ExecResult(0, "out", "")
    assert fine.check() is fine
    for failed, why in (
        (ExecResult(3, "out", "err"), "exit code 3"),
        (ExecResult(137, b"\xff", b"", signal="SIGKILL", reason="timeout"), "timeout"),
        (ExecResult(0, "", "", reason="idleTimeout"), "idleTimeout"),
    ):
        with pytest.raises(CommandFailed, match=why) as caught:
            failed.check()
        assert caught.value.details["exitCode"] == failed.exit_code
        assert isinstance(caught.value.details["stdout"], str)


@pytest.mark.parametrize(
    ("stderr", "shown"),
    [
        ("", "command failed: exit code 2"),
        (" \n", "command failed: exit code 2"),
        ("ls: nothing here\n", "command failed: exit code 2; stderr: ls: nothing here"),
        (b"caf\xe9\n", "command failed: exit code 2; stderr: caf\ufffd"),
        ("a\n\tb\n", "command failed: exit code 2; stderr:\na\n        b"),
        ("\x1b]0;gone\x07red", "command failed: exit code 2; stderr: \\x1b]0;gone\\x07red"),
        ("y" * 5000, "command failed: exit code 2; stderr: ..." + "y" * 2000),
    ],
)
def test_a_failure_says_what_the_command_said(stderr: str | bytes, shown: str) -> None:
    """The end of stderr is in the message, where nobody has to look for it, without what a terminal would obey."""
    with pytest.raises(CommandFailed) as caught:
        ExecResult(2, "out", stderr).check()
    assert str(caught.value) == shown


def test_a_failure_says_the_last_whole_lines_of_a_long_stderr() -> None:
    """A bounded number of characters, from the beginning of a line; all of it is in the details."""
    stderr = "".join(f"line {number}\n" for number in range(100_000))
    with pytest.raises(CommandFailed) as caught:
        ExecResult(2, "", stderr).check()
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["command failed: exit code 2; stderr:", "..."]
    assert lines[2:] == stderr.splitlines()[-len(lines[2:]) :]
    assert 1500 < len(str(caught.value)) < 2100
    assert caught.value.details["stderr"] == stderr


def test_texts_are_checked_one_by_one() -> None:
    """The first that is none is named, among any that are unusual."""
    fine = ["", "a", "é", "\udc80", "😀", "x" * 100]
    assert check_texts("args", tuple(fine)) == fine
    for wrong, said in (
        (7, "text, got 7"),
        ("a\0", "text without NUL"),
        ("\ud800", "text that UTF-8 can hold"),
        (None, "text"),
    ):
        with pytest.raises(InvalidRequest, match=rf"^args\[6\]: wanted {said}"):
            check_texts("args", [*fine, wrong, 8])
