"""`agentos exec`: a command in a VM, as if it ran here: its output as it comes, stdin piped through, its exit code."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from agentos.commands.remote import add_key, add_vm_options, with_agent
from agentos.conversions import write_value
from agentos.errors import AgentOSError, InvalidRequest, StdinClosed

if TYPE_CHECKING:
    from agentos.client.aio import Agent, RemoteProcess

_PIECE: Final = 64 * 1024
_QUEUED: Final = 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "exec", help="run a command in a VM",
        description="Run a command in a VM, which is made if need be. One word is a line for bash; several are "
        "the program and its arguments, which no shell looks at.",
    )  # fmt: skip
    add_vm_options(parser)
    parser.add_argument("--cwd", help="directory in the VM")
    parser.add_argument(
        "--env", "-e", action="append", default=[], metavar="NAME=VALUE", help="added to the environment"
    )
    parser.add_argument("--user", "-u", help="agentos or root")
    parser.add_argument("--timeout", type=float, help="seconds, after which it is killed")
    parser.add_argument("--json", action="store_true", help="the whole result as one JSON object, at the end")
    # stdin is always piped through, and output is never that of a terminal
    parser.add_argument("-i", "--interactive", action="store_true", help=argparse.SUPPRESS)
    add_key(parser)
    parser.add_argument("words", metavar="COMMAND", nargs="*", default=[], help="after --")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it. Returns its exit code."""
    options: dict[str, Any] = {
        "cwd": arguments.cwd,
        "user": arguments.user,
        "timeout": arguments.timeout,
        "env": _environment(arguments.env),
    }
    words: list[str] = arguments.words
    if not words:
        raise InvalidRequest("no command is given", remedy=f"agentos exec {arguments.key} -- COMMAND")
    line = words[0] if len(words) == 1 else shlex.join(words)
    if arguments.json:
        return with_agent(arguments, lambda agent: _whole(agent, line, options), create=True)
    return with_agent(arguments, lambda agent: _streamed(agent, line, options), create=True)


def _environment(pairs: list[str]) -> dict[str, str] | None:
    for one in pairs:
        if "=" not in one:
            raise InvalidRequest.argument("--env", one, "NAME=VALUE")
    return dict(one.split("=", 1) for one in pairs) or None


async def _whole(agent: Agent, line: str, options: dict[str, Any]) -> int:
    stdin = b"" if _is_terminal() else await asyncio.to_thread(sys.stdin.buffer.read)
    result = await agent.exec(line, stdin=stdin, **options)
    print(json.dumps(write_value(result)))
    return result.exit_code


async def _streamed(agent: Agent, line: str, options: dict[str, Any]) -> int:
    # Lossless: what reads our output may be slower than the command, and is to get all of it.
    process = await agent.spawn("bash", ["-c", line], lossless=True, **options)
    stdin = asyncio.create_task(_pipe_stdin(process))
    ended = False
    try:
        await copy_output(process)
        code = await process.wait()
        ended = True
    finally:
        stdin.cancel()
        if not ended:
            try:
                await asyncio.shield(process.kill())
            except AgentOSError:
                pass  # what ended this is told, not what came of it
    if code == 137 and options["timeout"] is not None and (await process.info()).reason == "timeout":
        print(f"agentos: killed after {options['timeout']:g} s", file=sys.stderr)
    return code


async def copy_output(process: RemoteProcess) -> None:
    """What it writes, to our own stdout and stderr, until it ends."""
    async for chunk in process.output():
        write_chunk(chunk.stream, chunk.data, chunk.skipped)


def write_chunk(stream: str, data: bytes, skipped: int) -> None:
    """Write output where it belongs."""
    if skipped:
        print(f"agentos: {skipped} bytes of output are missing here", file=sys.stderr)
    target = sys.stdout if stream == "stdout" else sys.stderr
    target.buffer.write(data)
    target.buffer.flush()


def _is_terminal() -> bool:
    try:
        return os.isatty(0)
    except OSError:
        return False


async def _pipe_stdin(process: RemoteProcess) -> None:
    try:
        if not _is_terminal():
            pieces: asyncio.Queue[bytes] = asyncio.Queue(_QUEUED)
            # A thread that ends with the process: who writes to our stdin may never do so again.
            loop = asyncio.get_running_loop()
            threading.Thread(target=_read_stdin, args=(loop, pieces), daemon=True).start()
            while data := await pieces.get():
                await process.write_stdin(data)
        await process.close_stdin()
    except StdinClosed:
        pass  # it does not read more, as `head` does not
    except AgentOSError as error:
        print(f"agentos: stdin: {error.message}", file=sys.stderr)


def _read_stdin(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[bytes]) -> None:
    data = b"-"
    while data:
        try:
            data = os.read(0, _PIECE)
        except OSError:
            data = b""
        put = pieces.put(data)
        try:
            asyncio.run_coroutine_threadsafe(put, loop).result()
        except BaseException:  # the loop has ended, and with it who wanted it
            put.close()
            return
