"""The load run in short: many clients on many VMs, every byte checked, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("cut", [False, True], ids=["undisturbed", "connections cut"])
def test_no_byte_is_lost_or_doubled(tmp_path: Path, cut: bool) -> None:
    """Mixed verbs of 40 clients on 20 VMs; the same while their connections are reset at random."""
    out = tmp_path / "load.json"
    command = [sys.executable, "-m", "bench.load", "--seconds", "10", "--clients", "40", "--vms", "20"]
    done = subprocess.run(
        [*command, *(["--cut"] if cut else []), "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=220, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())["cut" if cut else "plain"]
    assert result["problems"] == []
    assert result["calls"] > 100
    assert (result.get("proxy", {}).get("cuts", 0) > 10) is cut
    assert bool(result["unanswered, not asked again"]) <= cut
