"""The `agentos` command: parses, calls the command's module, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from agentos import __version__
from agentos.commands import copy, demo, doctor, execute, processes, serve, terminal, top, vms
from agentos.commands.remote import say
from agentos.errors import AgentOSError

COMMANDS = (demo, serve, execute, terminal, processes, top, copy, vms, doctor)
"""Each has `add_parser(subparsers)`, which sets `run`: a function from the parsed arguments to an exit code."""

TAKE_WORDS = ("exec", "spawn", "shell")
"""Commands whose words after the key are a command's own."""

_END = "\0"


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
    """The arguments. Of `exec` and the like, our options may come before or after the key; then a command's words."""
    command = next((one for one in argv if not one.startswith("-")), None)
    if command not in TAKE_WORDS:
        return parser().parse_args(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    arguments = parser().parse_args(argv[:at])
    words, behind = arguments.words, list(argv[at + 1 :])
    if words and words[0].startswith("-"):
        # No command begins with a dash: these are options, and what comes after them in the key's place is the command.
        key, before = arguments.key, argv[: at - len(words) - 1]
        arguments = parser().parse_args([*before, *words, _END])
        words = [arguments.key, *arguments.words][:-1]
        arguments.key = key
    arguments.words = [*words, "--", *behind] if words and at < len(argv) else [*words, *behind]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code."""
    arguments = parse(sys.argv[1:] if argv is None else list(argv))
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except AgentOSError as error:
        say(error.message)
        remedy = error.details.get("remedy")
        if remedy:
            say(str(remedy))
        return getattr(arguments, "failed", 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
