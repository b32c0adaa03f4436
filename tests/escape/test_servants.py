"""A guest that has taken over a servant, or init itself, and says what it likes to the host.

A copy of the package has the servants of every VM named "evil" speak as `hostile` does. The host process must come to a
typed error within its own time limits, with its memory within a named bound, and the VM beside it works on.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from agentos.machine.link import INIT_FRAME_BYTES
from tests.escape.driver import FILE_BYTES
from tests.escape.hostile import WRONG
from tests.escape.mutations import SOURCE

HERE = Path(__file__).parent
GROWTH_BYTES = 2 * FILE_BYTES + 30 * INIT_FRAME_BYTES
"""What the host process may grow by at its peak: a frame as Python's objects, and a file that is read whole."""

LOST = "ExecResult(exit_code=137, stdout='', stderr='', signal='SIGKILL'"
ANY_CHANNEL = ["garbage", "zeros", "giant", "large", "deep", "brackets", "digits", "promises", "loose descriptors",
               "silent", "closes"]  # fmt: skip
CASES = [
    *[("spawner", mode, "exec") for mode in ANY_CHANNEL],
    *[("spawner", f"wrong {which}", "exec") for which in range(len(WRONG))],
    *[("spawner", mode, "spawn") for mode in ("wrong 0", "many", "no terminal")],
    *[("spawner", mode, "shell") for mode in ("no terminal", "wrong 0", "closes", "loose descriptors")],
    *[
        ("connect", mode, "connect")
        for mode in ("garbage", "giant", "silent", "closes", "no socket", "unasked", "wrong 0")
    ],
    *[("files", mode, "read") for mode in ("garbage", "giant", "silent", "closes", "data", "nested", "lies")],
    *[("files", mode, "list") for mode in ("names", "lies", "data")],
    *[("files", mode, "write") for mode in ("silent", "data", "closes")],
    *[("files", mode, "stat") for mode in ("lies", "names")],
    *[
        ("init", mode, "exec")
        for mode in ("garbage", "giant", "large", "brackets", "digits", "closes", "wrong 0")
    ],
    *[("init", mode, "processes") for mode in ("garbage", "wrong 0", "deep", "loose descriptors")],
]


def copy_with_hostile_servants(target: Path) -> None:
    """The package, in which servants of VMs with such a name are hostile."""
    package = target / "agentos"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(HERE / "hostile.py", package / "machine/hostile.py")
    takeovers = [
        ("machine/init.py", "        Init(BlockingChannel(socket.socket(fileno=channel_fd)), ", "'init'",
         "socket.socket(fileno=channel_fd)", "before"),
        ("machine/confinement.py", "        os.umask(0o022)\n", "kind", "channel.sock", "after"),
    ]  # fmt: skip
    for path, text, kind, sock, place in takeovers:
        source = (package / path).read_text(encoding="utf-8")
        assert source.count(text) == 1, f"{path}: {text}"
        hostile = f"        if hostile.takes_over({kind}):\n            return hostile.serve({sock})\n"
        source = source.replace(text, hostile + text if place == "before" else text + hostile)
        head = "from agentos.linux import "
        source = source.replace(head, f"from agentos.machine import hostile\n{head}", 1)
        (package / path).write_text(source, encoding="utf-8")


@functools.cache
def outcomes() -> dict[tuple[str, ...], dict[str, Any]]:
    """All cases, in one host process."""
    with tempfile.TemporaryDirectory(prefix="agentos-hostile-") as directory:
        os.chmod(directory, 0o755)
        copy_with_hostile_servants(Path(directory))
        ended = subprocess.run(
            ["timeout", "180", sys.executable, "-m", "tests.escape.driver", *map("/".join, CASES)],
            env={**os.environ, "PYTHONPATH": f"{directory}:{SOURCE.parents[1]}", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    lines = map(json.loads, ended.stdout.splitlines())
    found = {tuple(one["case"]): one for one in lines}
    return {case: found.get(case, {"outcome": f"broke down: {ended.stderr[-1500:]}"}) for case in CASES}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_the_host_is_unharmed(case: tuple[str, str, str]) -> None:
    """Whatever it says, or does not say."""
    seen = outcomes()[case]
    # Or the program is lost with the spawner that says it had started it.
    assert seen["outcome"].startswith(("AgentOSError ", LOST, "137")), seen
    assert seen["answers"] == ["ok\n"] * 6, seen
    assert seen["grown"] < GROWTH_BYTES, seen
    assert seen["left"] == {}, seen
    assert seen["problems"] == [], seen
