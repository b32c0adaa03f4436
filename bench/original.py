"""The original, an in-process kernel with WebAssembly commands, from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.figures import Bar, Options, Result, summary

PACKAGE = "@rivet-dev/agentos-core@0.2.21"
HERE = Path(__file__).resolve().parent


def _run(folder: str | None, rounds: int) -> Result | None:
    """Create, create and echo, warm echo, of @rivet-dev/agentos-core, where npm can install it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or scratch
        if not (Path(place) / "node_modules/@rivet-dev/agentos-core").is_dir():
            install = ["npm", "install", "--no-fund", "--no-audit", "--prefix", place, PACKAGE]
            if subprocess.run(install, capture_output=True).returncode:
                return None
        script = Path(place) / "original.mjs"
        shutil.copyfile(HERE / "original.mjs", script)
        done = subprocess.run(
            ["node", str(script), str(rounds)], capture_output=True, text=True, cwd=place, timeout=300
        )
    if done.returncode:
        return None
    data = json.loads(done.stdout.splitlines()[-1])
    return {name: summary([value / 1000 for value in values]) for name, values in data.items()}


async def measure(options: Options) -> Result | None:
    """As its own program: nothing else runs meanwhile. None where npm can not install it."""
    return _run(options.original, 5)


def bars(result: Result) -> list[Bar]:
    """For the plot."""
    return [
        Bar("original: warm echo", result["warmEcho"], "original"),
        Bar("original: new VM + echo", result["createEcho"], "original"),
    ]
