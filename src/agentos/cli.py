"""The `agentos` command: parses, calls the command's module, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from agentos import __version__
from agentos.commands import copy, demo, doctor, execute, processes, serve, terminal, top, vms
from agentos.commands.remote import say, tell
from agentos.errors import AgentOSError

COMMANDS = (demo, serve, execute, terminal, processes, top, copy, vms, doctor)
"""Each has `add_parser(subparsers)`, which sets `run`: a function from the parsed arguments to an exit code."""

TAKE_WORDS = ("exec", "spawn", "shell")
"""Commands whose words after the key are a command's own."""

_END = "\0"
_SIGNAL = re.compile(r"-(\d{1,2}|[A-Z][A-Z0-9+-]*)")


class CommandParser(argparse.ArgumentParser):
    """A parser that says where more is said, with the exit code of the command's own failures."""

    def __init__(self, **options: Any) -> None:
        # Half an option's name may be another's, of a later version too.
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments, and end."""
        self.print_usage(sys.stderr)
        say(message)
        say(f"see `{self.prog} --help`")
        self.exit(self.get_default("failed") or 2)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = CommandParser(
        prog="agentos",
        description="An operating system for AI agents: isolated Linux VMs that boot in milliseconds.",
        epilog="With --json stdout has the result and nothing else, and what goes wrong is one JSON object on stderr: "
        "code, message, details. Exit codes are the same.",
    )
    top.add_argument("--version", action="version", version=f"agentos {__version__}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    top.set_defaults(parsers=subparsers.choices)
    return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments. Of `exec` and the like, our options may come before or after the key; then a command's words."""
    command = next((one for one in argv if not one.startswith("-")), None)
    if command not in TAKE_WORDS:
        return _parsed(_with_signal(argv) if command == "kill" else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    arguments = _parsed(argv[:at])
    words, behind = arguments.words, list(argv[at + 1 :])
    if words and words[0].startswith("-"):
        # No command begins with a dash: these are options, and what comes after them in the key's place is the command.
        key, before = arguments.key, argv[: at - len(words) - 1]
        arguments = _parsed([*before, *words, _END])
        words = [arguments.key, *arguments.words][:-1]
        arguments.key = key
    arguments.words = [*words, "--", *behind] if words and at < len(argv) else [*words, *behind]
    return arguments


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    arguments, unknown = parser().parse_known_args(argv)
    if unknown:
        arguments.parsers[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _with_signal(argv: Sequence[str]) -> list[str]:
    """`kill -9` and `kill -TERM`, as in a shell, are `--signal`."""
    return [f"--signal={found[1]}" if (found := _SIGNAL.fullmatch(one)) else one for one in argv]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    if not given:
        parser().print_help(sys.stderr)
        return 2
    arguments = parse(given)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except AgentOSError as error:
        tell(error, as_json=getattr(arguments, "json", False))
        return getattr(arguments, "failed", 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        _discard(sys.stdout)
        return 141
    except OSError as error:  # of what is printed to, such as a file on a full disk
        _discard(sys.stdout)
        path = f": {error.filename}" if error.filename else ""
        try:
            say(f"{error.strerror or error}{path}")
        except OSError:
            _discard(sys.stderr)
        return getattr(arguments, "failed", 1)


def _discard(stream: TextIO) -> None:
    """Let go of what is still to be written: Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
