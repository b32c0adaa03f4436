"""The examples and the code in the README do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

EXPECTED = {
    "exec.py": [r"stdout: hello", "exit code: 0", r"\$HOME; rm -rf \*", r"'started\\n' timeout left: \[\]"],
    "spawn.py": [
        r"\[pid \d+\] stdout: line 0",
        "exited with code 3",
        r"from byte 7 on: b'line 1\\nline 2\\n'",
    ],
    "stdin.py": ["exit code: 0", "hello from stdin", "APPLE\nPEAR"],
    "lifecycle.py": [r"\d+ sleep 1000 running", "polite: 143", "stubborn: 137", "False 137 SIGKILL"],
    "shell.py": [r"\.bashrc", "40 120", "exit code: 3"],
    "process_tree.py": [r"\d+ native .* bash -c", r"\d+ python .*   python3 -c", r"\d+ native .*     sh -c"],
    "files.py": [r"\['data.bin', 'today.txt'\]", "\n256\n", r"33554432 33554432 32 MiB", "FileMissing"],
    "sync_quickstart.py": ["hello from agentos", r"stdout b'1\\n", "exit code: 0", r"b'hi\\n'"],
}


def run(path: Path) -> str:
    """What a program prints; it must end well and say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(name: str) -> None:
    """And prints what it is an example of."""
    printed = run(EXAMPLES / name)
    for pattern in EXPECTED[name]:
        assert re.search(pattern, printed), f"{pattern!r} not in:\n{printed}"


def test_the_readme_runs(tmp_path: Path) -> None:
    """Each block of Python in it is a whole program."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        program = tmp_path / f"block{number}.py"
        program.write_text(block)
        expected = re.findall(r"#: (.*)", block)
        assert expected, "a block says with `#:` what it prints"
        printed = run(program)
        for line in expected:
            assert line in printed, f"{line!r} not in:\n{printed}"
