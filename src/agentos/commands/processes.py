"""`agentos ps`, `logs`, `wait` and `kill`: the processes of a VM."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from agentos.actions import BY_METHOD
from agentos.commands.execute import copy_output
from agentos.commands.moments import parse_moment, seconds
from agentos.commands.remote import add_key, add_vm_options, say, table, tell, with_agent
from agentos.commands.stdio import write_chunk
from agentos.conversions import write_value
from agentos.errors import InvalidRequest, ProcessNotFound, WaitTimeout
from agentos.model import OutputChunk, ProcessInfo, ProcessTreeNode, SpawnedProcess

if TYPE_CHECKING:
    from agentos.client.aio import Agent, RemoteProcess


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    ps = subparsers.add_parser(
        "ps", help="the processes of a VM",
        description="List every process of a VM, whoever started it.",
    )  # fmt: skip
    add_vm_options(ps)
    ps.add_argument(
        "--all", "-a", action="store_true",
        help="also the spawned ones that have ended, as far as they are remembered, with their exit codes",
    )  # fmt: skip
    ps.add_argument("--tree", action="store_true", help="by parent")
    ps.add_argument("--json", action="store_true", help="for programs")
    add_key(ps)
    ps.set_defaults(run=lambda arguments: with_agent(
        arguments, lambda agent: _ps(agent, arguments)))  # fmt: skip
    logs = subparsers.add_parser(
        "logs", help="what a spawned process has written",
        description="Print what a spawned process has written, its stdout to stdout and its stderr to stderr, as far "
        "as the VM keeps it (the newest 4 MiB unless its limit says otherwise).",
    )  # fmt: skip
    add_vm_options(logs)
    logs.add_argument("--follow", "-f", action="store_true", help="go on until it ends")
    logs.add_argument(
        "--since", metavar="TIME",
        help="not what came before: 10m or 1h30m ago, 2026-11-24T17:00:00Z, or seconds since the epoch",
    )  # fmt: skip
    logs.add_argument(
        "--after", type=int, default=0, metavar="CURSOR",
        help="begin behind this many bytes of its output, as --cursor printed them",
    )  # fmt: skip
    logs.add_argument(
        "--tail", "-n", type=int, metavar="LINES", help="of what there is already, only the last lines"
    )
    logs.add_argument(
        "--cursor", action="store_true", help="say at the end, on stderr, where --after goes on"
    )
    add_key(logs)
    logs.add_argument("pid", metavar="PID", type=process_id)
    logs.set_defaults(run=lambda arguments: with_agent(arguments, lambda agent: _logs(agent, arguments)))
    wait = subparsers.add_parser(
        "wait", help="wait for the end of spawned processes",
        description="Wait until spawned processes have ended, and print their exit codes, one a line (128 + n after "
        "signal n).",
    )  # fmt: skip
    add_vm_options(wait)
    wait.add_argument(
        "--timeout", type=seconds, metavar="TIME", help="how long at most, for each: seconds, or 90s, 1h30m"
    )
    wait.add_argument(
        "--json", action="store_true", help="with signals, reasons and what they used, for programs"
    )
    add_key(wait)
    wait.add_argument("pids", metavar="PID", type=process_id, nargs="+")
    wait.set_defaults(run=lambda arguments: with_agent(
        arguments, lambda agent: _wait(agent, arguments.pids, arguments.timeout, as_json=arguments.json),
    ))  # fmt: skip
    kill = subparsers.add_parser(
        "kill", help="end processes of a VM, or send them another signal",
        usage="agentos kill [options] [-SIGNAL] KEY PID [PID ...]",
        description="End processes of a VM, those too that were not started through the server. SIGTERM goes to the "
        "process's group; SIGKILL takes all its descendants with it.",
    )  # fmt: skip
    add_vm_options(kill)
    kill.add_argument(
        "--signal", "-s", default="TERM", help="such as INT, SIGINT or 2; also -INT or -2 (default: TERM)"
    )
    add_key(kill)
    kill.add_argument("pids", metavar="PID", type=process_id, nargs="+")
    kill.set_defaults(run=lambda arguments: with_agent(
        arguments, lambda agent: _kill_all(agent, arguments.pids, arguments.signal)))  # fmt: skip


def process_id(text: str) -> int:
    """The pid of a VM's process, as an argument type for argparse."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"wanted a pid, got {text!r}")
    return int(text)


async def _ps(agent: Agent, arguments: argparse.Namespace) -> int:
    ended = [one for one in await agent.list_processes() if not one.running] if arguments.all else []
    if arguments.tree:
        forest = await agent.process_tree()
        found, rows = BY_METHOD["process_tree"].result.write(forest), list(_branches(forest, 0))
    else:
        processes = await agent.all_processes()
        found, rows = write_value(processes), [_row(one) for one in processes]
    if arguments.json:
        print(json.dumps([*found, *({**write_value(one), "status": "exited"} for one in ended)]))
    else:
        heads = ["PID", "PPID", "USER", "STATE", "CPU", "RSS", "DRIVER", "COMMAND"]
        rows += [_ended_row(one) for one in ended]
        print(table(heads, rows, right=("PID", "PPID", "CPU", "RSS")))
    return 0


async def _wait(agent: Agent, pids: list[int], timeout: float | None, *, as_json: bool) -> int:
    code = 0
    ended: list[SpawnedProcess] = []
    for pid in pids:
        try:
            exit_code = await agent.wait_process(pid, timeout=timeout)
            if as_json:
                ended.append(await agent.get_process(pid))
            else:
                print(exit_code, flush=True)
        except (ProcessNotFound, WaitTimeout) as error:
            tell(error, as_json=as_json)
            code = 1
    if as_json:
        print(json.dumps(write_value(ended)))
    return code


def command_line(one: ProcessInfo) -> str:
    """What it was started with."""
    return " ".join(one.args if one.args[:1] == (one.command,) else [one.command, *one.args])


def _row(one: ProcessInfo, level: int = 0) -> list[str]:
    line = command_line(one)
    return [
        str(one.pid), str(one.ppid), one.user or "?", one.state or "?", f"{(one.cpu_ms or 0) / 1000:.2f}s",
        f"{(one.rss_bytes or 0) / 1_048_576:.1f}M", one.driver, "  " * level + line.replace("\n", "\\n"),
    ]  # fmt: skip


def _ended_row(one: SpawnedProcess) -> list[str]:
    line = " ".join([one.command, *one.args])
    said = f"exited {one.exit_code}" if one.reason in (None, "exited") else f"{one.reason} {one.exit_code}"
    return [str(one.pid), "-", "-", said, "-", "-", "-", line.replace("\n", "\\n")]


def _branches(nodes: Iterable[ProcessTreeNode], level: int) -> Iterable[list[str]]:
    for node in nodes:
        yield _row(node.process, level)
        yield from _branches(node.children, level + 1)


async def _logs(agent: Agent, arguments: argparse.Namespace) -> int:
    process = agent.process(arguments.pid)
    cursor = arguments.after
    if cursor < 0:
        raise InvalidRequest.argument("--after", cursor, "a number of bytes, 0 or more")
    if arguments.since is not None:
        since = parse_moment("--since", arguments.since)
        page = await process.read_output(cursor, max_bytes=1, since=since)
        cursor = page.cursor - sum(len(chunk.data) for chunk in page.events)
    if arguments.tail is not None:
        if arguments.tail < 0:
            raise InvalidRequest.argument("--tail", arguments.tail, "a number of lines, 0 or more")
        cursor, newest = await _last_lines(process, cursor, arguments.tail)
        for chunk in newest:
            write_chunk(chunk.stream, chunk.data, 0)
    if arguments.follow:
        await copy_output(process, cursor)
        return 0
    while True:
        page = await process.read_output(cursor)
        for chunk in page.events:
            write_chunk(chunk.stream, chunk.data, chunk.skipped)
        cursor = page.cursor
        if page.exited or not page.events:
            break
    if arguments.cursor:
        say(f"--after {cursor}")
    return 0


async def _last_lines(process: RemoteProcess, cursor: int, lines: int) -> tuple[int, Iterable[OutputChunk]]:
    """The chunks with the last lines of what there is, and the cursor behind them. Holds no more than those."""
    kept: deque[OutputChunk] = deque()
    seen = 0
    while True:
        page = await process.read_output(cursor)
        for chunk in page.events:
            for line in chunk.data.splitlines(keepends=True):
                kept.append(OutputChunk(chunk.stream, line, chunk.offset))
                seen += line.endswith(b"\n")
        # A line may come in pieces: whole ones are counted, and the pieces before the first that is wanted go.
        unfinished = bool(kept) and not kept[-1].data.endswith(b"\n")
        while kept and (seen + unfinished > lines or lines == 0):
            seen -= kept.popleft().data.endswith(b"\n")
        cursor = page.cursor
        if page.exited or not page.events:
            return cursor, kept


async def _kill_all(agent: Agent, pids: list[int], signal: str) -> int:
    code = 0
    for pid in pids:
        try:
            await _kill(agent, pid, signal)
        except ProcessNotFound as error:
            say(error.message)
            code = 1
    return code


async def _kill(agent: Agent, pid: int, signal: str) -> None:
    name = signal.upper().removeprefix("SIG")
    try:
        if name in ("KILL", "9"):
            await agent.kill_process(pid)
        elif name in ("TERM", "15"):
            await agent.stop_process(pid)
        else:
            await agent.signal_process(pid, int(name) if name.isdigit() else f"SIG{name}")
    except ProcessNotFound:
        if pid == 1:
            raise InvalidRequest("pid 1 is the VM itself", remedy="`agentos rm` ends a VM") from None
        # `ps` shows those too that were not started through the server
        done = await agent.exec_file(
            "/bin/bash", ["-c", 'kill -s "$1" -- "$2"', "kill", name, str(pid)], user="root"
        )
        if not done.ok:
            raise
