"""`agentos demo`: boots a VM and does with it what the library is for, printing the calls and what they gave."""

from __future__ import annotations

import argparse
import asyncio


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("demo", help="boot a VM and show what it can do")
    parser.add_argument("--debug", action="store_true", help="print the steps that make the VM")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The whole walk-through. Returns the exit code."""
    from agentos.commands import walkthrough  # what boots VMs, which other commands do not wait for

    return asyncio.run(walkthrough.run(debug=arguments.debug))
