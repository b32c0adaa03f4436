"""The command line, as a newcomer runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from agentos import __version__

SOURCE = Path(__file__).parents[2] / "src"


def agentos(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `agentos` with `arguments`."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "agentos", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(SOURCE), **env},
    )


def test_the_demo_walks_through_everything() -> None:
    """Every scene, real output, exit code 0, no colour where nobody looks."""
    done = agentos("demo")
    assert (done.returncode, done.stderr) == (0, "")
    titles = re.findall(r"^\d+\. (.*?):", done.stdout, re.MULTILINE)
    assert titles == ["Boot", "exec", "spawn", "stdin", "Lifecycle", "Process tree", "Shell", "The end"]
    for line in (
        r"uid=1000\(agentos\)",
        "exit code 127",
        "stdout 'started\\\\n', reason 'timeout'",
        r"processes left behind: \[\]",
        r"\[pid \d+\] stderr: and one on stderr",
        "hello from stdin",
        "exit code 143: SIGTERM",
        "exit code 137: SIGKILL",
        r"\d+ python .* python3 -c",
        r"\d+ wasm .* \./hello\.wasm",
        "24 80",
        "40 120",
    ):
        assert re.search(line, done.stdout), f"{line!r} not in:\n{done.stdout}"
    assert "\x1b" not in done.stdout


def test_the_demo_prints_the_plan() -> None:
    """With --debug, before it boots anything."""
    done = agentos("demo", "--debug")
    assert done.returncode == 0
    assert done.stdout.index("pivot_root") < done.stdout.index("Boot")


def test_the_doctor_says_what_is_wrong() -> None:
    """Where no user namespace can be made: exit code 1 and a remedy."""
    program = """
import sys
from agentos.cli import main
from agentos.errors import BootFailed
from agentos.machine.factory import Factory
def fail(self):
    raise BootFailed("the VM could not be made: unshare: no", step="unshare", errno=1, remedy="do this")
Factory.start = fail
sys.exit(main(sys.argv[1:]))
"""
    for command, stream in (("doctor", "stdout"), ("demo", "stderr")):
        done = subprocess.run(
            [sys.executable, "-c", program, command],
            capture_output=True,
            text=True,
            timeout=50,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )
        assert done.returncode == 1
        assert "could not be made: unshare" in getattr(done, stream)
        assert "Traceback" not in done.stderr
        assert "do this" in getattr(done, stream) or "sysctl" in getattr(done, stream)


def test_version_and_usage() -> None:
    """Of the package, and a usage line for a command that does not exist."""
    assert agentos("--version").stdout == f"agentos {__version__}\n"
    assert agentos("frobnicate").returncode == 2
    assert agentos().returncode == 2


def test_a_reader_that_has_seen_enough() -> None:
    """No complaint when the output is not wanted any more."""
    command = f"{sys.executable} -m agentos demo | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)
