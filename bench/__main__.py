"""What it costs, beside what a reader knows: `subprocess.run` on the host, bubblewrap, and the original.

Every figure is taken in turn with what it is compared to, so that the ratios hold on a machine whose speed
drifts. Writes results.json and results.png; with --only, the other subjects' results stay as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from agentos import Limits
from bench.figures import Bar, Options, Result
from bench.plot import plot

SUBJECTS = {
    "exec": "commands",
    "create": "creation",
    "throughput": "throughput",
    "terminal": "terminal",
    "newkey": "newkey",
    "network": "network",
    "neighbour": "neighbour",
    "hardening": "hardening",
    "many": "density",
    "original": "original",
}
"""Name in results.json -> module of this package, with `await measure(options)` and `bars(result)` for the plot."""

HERE = Path(__file__).resolve().parent


def subject(name: str) -> Any:
    """The module that measures `name`."""
    return importlib.import_module(f"bench.{SUBJECTS[name]}")


def machine() -> Result:
    """What the figures were taken on."""
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "limits": str(Limits()),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples")
    parser.add_argument("--only", action="append", choices=SUBJECTS, help="measure this alone (repeatable)")
    parser.add_argument(
        "--vms", type=int, default=1000, help="live VMs where many are measured (default 1000)"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and results.png")
    parser.add_argument("--attack", action="append", default=[], help="of neighbour, this alone (repeatable)")
    parser.add_argument("--original", help="a folder where the original is, or is to be, installed by npm")
    arguments = parser.parse_args()
    options = Options(
        quick=arguments.quick,
        vms=arguments.vms,
        attacks=tuple(arguments.attack),
        original=arguments.original,
    )
    kept = arguments.out / "results.json"
    results: Result = json.loads(kept.read_text()) if arguments.only and kept.exists() else {}
    for name in arguments.only or SUBJECTS:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        measured = asyncio.run(subject(name).measure(options))
        if name == "neighbour" and options.attacks:
            measured = subject(name).merged(results.get(name, {}), measured)
        results[name] = measured
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    results["machine"] = machine()
    bars: list[Bar] = [
        bar for name in SUBJECTS if results.get(name) for bar in subject(name).bars(results[name])
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(results, indent=2) + "\n")
    if bars:
        plot(bars, arguments.out / "results.png")


if __name__ == "__main__":
    main()
