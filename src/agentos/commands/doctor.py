"""`agentos doctor`: what this host offers to VMs, found out by doing it, and what follows from that."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentos.commands.diagnosis import Check

_COLUMNS = 24


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("doctor", help="say what this host offers to VMs, and what it lacks")
    parser.add_argument("--json", action="store_true", help="as one JSON object, for programs")
    parser.set_defaults(run=lambda arguments: run(as_json=arguments.json))


def run(*, as_json: bool = False) -> int:
    """Check and report. Returns 1 when a VM can not be booted here."""
    from agentos.commands.diagnosis import examine  # what boots VMs, which other commands do not wait for

    checks = asyncio.run(examine())
    ok = all(one.ok for one in checks if one.required)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(one) for one in checks]}, indent=2))
        return 0 if ok else 1
    group = ""
    for one in checks:
        if one.group != group:
            group = one.group
            print(f"\n{group}" if one is not checks[0] else group)
        _print(one)
    print("\nVMs can be booted here." if ok else "\nVMs can not be booted here.")
    return 0 if ok else 1


def _print(check: Check) -> None:
    sign, colour = {True: ("ok", "32"), False: ("FAIL" if check.required else "no", "31"), None: ("", "0")}[
        check.ok
    ]
    shown = f"{sign:<4}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        shown = f"\x1b[{colour}m{shown}\x1b[0m"
    print(f"  {shown} {check.name + ':':<{_COLUMNS}} {check.detail}".rstrip())
    if check.remedy and not check.ok:
        print(f"       {'':<{_COLUMNS}} -> {check.remedy}")
