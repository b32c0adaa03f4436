"""The doctor, on this host and on ones that were made worse for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PYTHON = [sys.executable, "-W", "error"]
DOCTOR = [*PYTHON, "-m", "agentos", "doctor"]

# A filter as the container engines have by default: EPERM for unshare(2), and for clone(2) with namespaces.
REFUSE_UNSHARE = """
import ctypes, os, platform, struct, sys
NUMBER = {"x86_64": (272, 56), "aarch64": (97, 220)}[platform.machine()]
def instruction(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
program = b"".join((
    instruction(0x20, 0, 0, 0),               # load the number
    instruction(0x15, 3, 0, NUMBER[0]),       # unshare: refuse
    instruction(0x15, 0, 3, NUMBER[1]),       # not clone: allow
    instruction(0x20, 0, 0, 16),              # load the flags
    instruction(0x45, 0, 1, 0x7E020000),      # namespaces: refuse
    instruction(0x06, 0, 0, 0x00050001),      # EPERM
    instruction(0x06, 0, 0, 0x7FFF0000),      # allow
))
class Program(ctypes.Structure): _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_char_p))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(program) // 8, program))) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""


def run(command: list[str], code: int, **env: str) -> dict[str, Any]:
    """The report as a value, by names; the same text must be there for people."""
    shown = {**os.environ, "PYTHONPATH": str(SOURCE), **env}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=50, env=shown)
    assert (done.returncode, done.stderr) == (code, ""), done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is (code == 0)
    for check in report["checks"]:
        assert check["ok"] is not False or check["remedy"], check
    return {check["name"]: check for check in report["checks"]}


def unprivileged() -> bool:
    return os.geteuid() != 0


def test_what_there_is() -> None:
    """For people, and the same for programs: groups, no colour where nobody looks, all of it required works."""
    by_name = run(DOCTOR, 0)
    done = subprocess.run(
        DOCTOR, capture_output=True, text=True, timeout=50, env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("VMs can be booted here.\n")
    assert "\x1b" not in done.stdout
    for name in by_name:
        assert f" {name}:" in done.stdout
    assert {check["group"] for check in by_name.values()} == {
        "This host", "A VM, booted for this", "Limits", "What follows",
    }  # fmt: skip
    for name in (
        "user namespaces",
        "other namespaces",
        "system-call filter",
        "boot",
        "loopback",
        "isolation",
    ):
        assert by_name[name]["ok"], by_name[name]
    for name in ("kernel", "Landlock", "KVM"):
        assert by_name[name]["ok"] is None
    assert "not used" in by_name["KVM"]["detail"]
    assert by_name["ids of its own"]["ok"] is not unprivileged()
    assert by_name["memory"]["ok"] is by_name["cgroup memory"]["ok"]


def test_in_a_terminal_it_has_colours() -> None:
    """And none with NO_COLOR."""
    script = ["script", "-qec", " ".join(f"'{one}'" for one in DOCTOR), "/dev/null"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    environment.pop("NO_COLOR", None)
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        done = subprocess.run(
            script, capture_output=True, text=True, timeout=50, env={**environment, **more}, check=True
        )
        assert ("\x1b[32mok" in done.stdout) is coloured


def test_a_seccomp_filter_that_refuses_namespaces() -> None:
    """As in a container with the default profile: said, with the reason and where to read on; exit code 1."""
    by_name = run([*PYTHON, "-c", REFUSE_UNSHARE, *DOCTOR], 1)
    for name in ("user namespaces", "other namespaces", "boot"):
        assert by_name[name]["ok"] is False
    assert "unshare(CLONE_NEWUSER): Operation not permitted (EPERM)" in by_name["user namespaces"]["detail"]
    assert "--security-opt seccomp=unconfined" in by_name["user namespaces"]["remedy"]
    # What was tried in a user namespace has no trouble of its own that is known.
    assert by_name["overlay"]["remedy"] == "as for user namespaces"
    assert "docs/containers.md" in by_name["boot"]["remedy"]
    assert by_name["system-call filter"]["ok"]


def test_no_user_namespaces_left() -> None:
    """With max_user_namespaces=0, here that of a user namespace of the test's own: ENOSPC, and the sysctl to raise."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    by_name = run(["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", *DOCTOR], 1)
    assert "ENOSPC" in by_name["user namespaces"]["detail"]
    assert "max_user_namespaces" in by_name["user namespaces"]["remedy"]
    assert "max_user_namespaces" in by_name["boot"]["remedy"]


def test_a_proc_with_covered_parts() -> None:
    """As in a container: an ordinary user may not mount another there, and is told so."""
    script = (
        'mount --bind /dev/null /proc/version && exec unshare --user --map-user=1000 --map-group=1000 "$@"'
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *DOCTOR]
    by_name = run(command, 1)
    assert by_name["user namespaces"]["ok"]
    proc = by_name["a /proc of its own"]
    assert proc["ok"] is False
    assert "EPERM" in proc["detail"]
    assert "--security-opt systempaths=unconfined" in proc["remedy"]
    assert by_name["boot"]["ok"] is False


def test_both_as_in_a_container() -> None:
    """What else will be missing is said at once, though nothing could be tried."""
    script = 'mount --bind /dev/null /proc/version && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    by_name = run([*command, *PYTHON, "-c", REFUSE_UNSHARE, *DOCTOR], 1)
    assert "seccomp=unconfined" in by_name["user namespaces"]["remedy"]
    assert "systempaths=unconfined" in by_name["a /proc of its own"]["remedy"]


@pytest.mark.skipif(unprivileged(), reason="has no cgroups to hide")
def test_without_cgroups() -> None:
    """VMs boot; that their memory and CPU are not bounded as a whole is said, and what would change it."""
    script = 'umount -R /sys/fs/cgroup && exec "$@"'
    by_name = run(["unshare", "--mount", "sh", "-c", script, "sh", *DOCTOR], 0)
    for name in ("cgroup memory", "cgroup pids", "cgroup cpu", "memory", "CPU"):
        assert by_name[name]["ok"] is False
        assert by_name[name]["remedy"]
    assert "RLIMIT_DATA" in by_name["memory"]["detail"]
    assert by_name["number of processes"]["ok"]
