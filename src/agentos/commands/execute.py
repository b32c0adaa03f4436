"""`agentos exec` and `spawn`: a command in a VM; exec as if it ran here: its output, stdin, signals and exit code."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from agentos.commands.moments import seconds
from agentos.commands.remote import add_key, add_vm_options, say, tell, with_agent
from agentos.commands.stdio import forward_signals, is_terminal, pipe_stdin, read_stdin, write_chunk
from agentos.conversions import write_value
from agentos.errors import AgentOSError, InvalidRequest, SpawnFailed

if TYPE_CHECKING:
    from agentos.client.aio import Agent, RemoteProcess

FAILED = 125
"""Our own failure, as docker has it: a command's exit code it is not likely to be."""
NOT_EXECUTABLE = 126
NOT_FOUND = 127


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    parser = subparsers.add_parser(
        "exec", help="run a command in a VM",
        usage="agentos exec [options] KEY [--] COMMAND [ARG ...]",
        description="Run a command in a VM, which is made if need be, as if it ran here: its output comes as it is "
        "written, stdin is piped through, signals such as ctrl-c reach it, and its exit code is ours. One word is a "
        "line for bash; several are a program and its arguments, which no shell looks at.",
        epilog="Exit codes: the command's own; 125 when agentos itself failed, 126 when the command may not be run, "
        "127 when there is none of that name. Example: agentos exec my-agent 'ls | wc -l'",
    )  # fmt: skip
    add_vm_options(parser)
    add_program_options(parser)
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="give it stdin also where that is a terminal"
    )
    parser.add_argument("-t", "--tty", action="store_true", help="run it in a terminal; with -i, this one")
    add_timeout(parser)
    parser.add_argument("--json", action="store_true", help="the whole result as one JSON object, at the end")
    add_key(parser)
    add_words(parser)
    parser.set_defaults(run=run, failed=FAILED)

    spawn = subparsers.add_parser(
        "spawn", help="start a command in a VM and leave it running",
        usage="agentos spawn [options] KEY [--] COMMAND [ARG ...]",
        description="Start a command in the background of a VM, which is made if need be, and print its pid. "
        "`agentos logs` shows what it writes, `agentos kill` ends it. One word is a line for bash; several are a "
        "program and its arguments.",
    )  # fmt: skip
    add_vm_options(spawn)
    add_program_options(spawn)
    add_timeout(spawn)
    spawn.add_argument("--json", action="store_true", help='print {"pid": PID}')
    add_key(spawn)
    add_words(spawn)
    spawn.set_defaults(run=run_spawn, failed=FAILED)


def add_program_options(parser: argparse.ArgumentParser) -> None:
    """Declare where, as whom and in which environment a program runs."""
    parser.add_argument("--cwd", "-w", "--workdir", metavar="DIR", help="directory in the VM")
    parser.add_argument(
        "--env", "-e", action="append", default=[], metavar="NAME[=VALUE]",
        help="added to the environment; without a value, the one here",
    )  # fmt: skip
    parser.add_argument("--user", "-u", help="agentos or root")


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Declare how long it may take."""
    parser.add_argument(
        "--timeout", type=seconds, metavar="TIME", help="after which it is killed: seconds, or 90s, 1h30m"
    )


def add_words(parser: argparse.ArgumentParser) -> None:
    """Declare the command, which is everything after the key."""
    parser.add_argument(
        "words", metavar="COMMAND", nargs=argparse.REMAINDER, help="and its arguments, after the key"
    )


def program_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_program_options` declared, as the verbs take it."""
    env: dict[str, str] = {}
    for one in arguments.env:
        name, equals, value = one.partition("=")
        if not name:
            raise InvalidRequest.argument("--env", one, "NAME=VALUE")
        if equals or name in os.environ:
            env[name] = value if equals else os.environ[name]
    return {"cwd": arguments.cwd, "user": arguments.user, "env": env or None}


def _program(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    words: list[str] = arguments.words
    if not words:
        raise InvalidRequest(
            "no command is given", remedy=f"agentos {arguments.command} {arguments.key} -- COMMAND"
        )
    if len(words) > 1:
        return words[0], words[1:]
    # A line may look like an option of bash.
    return "bash", ["-c", "--", *words] if words[0].startswith(("-", "+")) else ["-c", *words]


def run(arguments: argparse.Namespace) -> int:
    """Run it. Returns its exit code."""
    command, args = _program(arguments)
    options = {**program_options(arguments), "timeout": arguments.timeout}
    try:
        if arguments.tty:
            return _in_terminal(arguments, command, args)
        if arguments.json:
            return with_agent(arguments, lambda agent: _whole(agent, command, args, options), create=True)
        wanted = arguments.interactive or not is_terminal(0)
        return with_agent(
            arguments, lambda agent: _streamed(agent, command, args, options, stdin=wanted), create=True
        )
    except SpawnFailed as error:
        return cannot_start(error, as_json=arguments.json)


def run_spawn(arguments: argparse.Namespace) -> int:
    """Start it and say its pid."""
    command, args = _program(arguments)
    options = {**program_options(arguments), "timeout": arguments.timeout}

    async def spawn(agent: Agent) -> int:
        process = await agent.spawn(command, args, **options)
        print(json.dumps({"pid": process.pid}) if arguments.json else process.pid)
        return 0

    try:
        return with_agent(arguments, spawn, create=True)
    except SpawnFailed as error:
        return cannot_start(error, as_json=arguments.json)


def cannot_start(error: SpawnFailed, *, as_json: bool) -> int:
    """Tell it. Returns the exit code that says whether there is no such program or it may not be run."""
    tell(error, as_json=as_json)
    missing = error.details.get("step") == "exec" and isinstance(error, OSError) and error.os_errno == 2
    return NOT_FOUND if missing else NOT_EXECUTABLE


def _in_terminal(arguments: argparse.Namespace, command: str, args: list[str]) -> int:
    from agentos.commands.terminal import in_terminal

    if arguments.json or arguments.timeout is not None:
        raise InvalidRequest("-t goes with neither --json nor --timeout")
    if arguments.interactive and not is_terminal(0):
        raise InvalidRequest("stdin is not a terminal", remedy="leave out -t where input is piped")
    options = program_options(arguments)
    return with_agent(
        arguments,
        lambda agent: in_terminal(
            agent, command, args, options, key=arguments.key, typing=arguments.interactive
        ),
        create=True,
    )


async def _whole(agent: Agent, command: str, args: list[str], options: dict[str, Any]) -> int:
    stdin = b"" if is_terminal(0) else await asyncio.to_thread(read_stdin)
    result = await agent.exec_file(command, args, stdin=stdin, **options)
    print(json.dumps(write_value(result)))
    return result.exit_code


async def _streamed(
    agent: Agent, command: str, args: list[str], options: dict[str, Any], *, stdin: bool
) -> int:
    # Lossless: what reads our output may be slower than the command, and is to get all of it.
    process = await agent.spawn(command, args, lossless=True, **options)
    feeding = asyncio.create_task(pipe_stdin(process) if stdin else process.close_stdin())
    ended = False
    try:
        with forward_signals(agent, process, options["user"]):
            await copy_output(process)
            code = await process.wait()
        ended = True
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        if not ended:
            try:
                await asyncio.shield(process.kill())
            except AgentOSError:
                pass  # what ended this is told, not what came of it
    if code == 137 and options["timeout"] is not None and (await process.info()).reason == "timeout":
        say(f"killed after {options['timeout']:g} s")
    return code


async def copy_output(process: RemoteProcess, cursor: int = 0) -> None:
    """What it writes, to our own stdout and stderr, until it ends."""
    async for chunk in process.output(cursor):
        write_chunk(chunk.stream, chunk.data, chunk.skipped)
    sys.stdout.flush()
