"""The `agentos` command: parses, calls the command's module, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from agentos import __version__
from agentos.commands import copy, demo, doctor, execute, processes, serve, terminal, vms
from agentos.commands.remote import printable
from agentos.errors import AgentOSError

COMMANDS = (demo, serve, execute, terminal, processes, copy, vms, doctor)
"""Each has `add_parser(subparsers)`, which sets `run`: a function from the parsed arguments to an exit code."""

TAKE_WORDS = ("exec", "shell")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="agentos",
        description="An operating system for AI agents: isolated Linux VMs that boot in milliseconds.",
    )
    top.add_argument("--version", action="version", version=f"agentos {__version__}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments. What follows the first `--` is a command's words where it takes some, each as it is."""
    command = next((one for one in argv if not one.startswith("-")), None)
    if command not in TAKE_WORDS or "--" not in argv:
        return parser().parse_args(argv)
    at = argv.index("--")
    arguments = parser().parse_args(argv[:at])
    arguments.words += argv[at + 1 :]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code."""
    arguments = parse(sys.argv[1:] if argv is None else list(argv))
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except AgentOSError as error:
        message = "\n".join(map(printable, error.message.splitlines()))
        print(f"agentos: {message}", file=sys.stderr)
        remedy = error.details.get("remedy")
        if remedy:
            print(f"agentos: {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
