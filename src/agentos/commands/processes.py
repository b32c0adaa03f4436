"""`agentos ps`, `logs` and `kill`: the processes of a VM."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from agentos.actions import BY_METHOD
from agentos.commands.execute import copy_output, write_chunk
from agentos.commands.remote import add_key, add_vm_options, table, with_agent
from agentos.conversions import write_value
from agentos.errors import ProcessNotFound
from agentos.model import ProcessInfo, ProcessTreeNode

if TYPE_CHECKING:
    from agentos.client.aio import Agent


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    ps = subparsers.add_parser("ps", help="the processes of a VM")
    add_vm_options(ps)
    ps.add_argument("--tree", action="store_true", help="by parent")
    ps.add_argument("--json", action="store_true", help="for programs")
    add_key(ps)
    ps.set_defaults(run=lambda arguments: with_agent(
        arguments, lambda agent: _ps(agent, tree=arguments.tree, as_json=arguments.json)))  # fmt: skip
    logs = subparsers.add_parser("logs", help="what a spawned process has written")
    add_vm_options(logs)
    logs.add_argument("--follow", "-f", action="store_true", help="go on until it ends")
    add_key(logs)
    logs.add_argument("pid", metavar="PID", type=int)
    logs.set_defaults(run=lambda arguments: with_agent(
        arguments, lambda agent: _logs(agent, arguments.pid, follow=arguments.follow)))  # fmt: skip
    kill = subparsers.add_parser("kill", help="end a process of a VM, or send it another signal")
    add_vm_options(kill)
    kill.add_argument(
        "--signal", "-s", default="TERM",
        help="such as INT (default: TERM; KILL ends its descendants too)",
    )  # fmt: skip
    add_key(kill)
    kill.add_argument("pid", metavar="PID", type=int)
    kill.set_defaults(run=lambda arguments: with_agent(
        arguments, lambda agent: _kill(agent, arguments.pid, arguments.signal)))  # fmt: skip


async def _ps(agent: Agent, *, tree: bool, as_json: bool) -> int:
    heads = ["PID", "PPID", "USER", "STATE", "CPU", "RSS", "DRIVER", "COMMAND"]
    if tree:
        forest = await agent.process_tree()
        if as_json:
            print(json.dumps(BY_METHOD["process_tree"].result.write(forest)))
        else:
            print(table(heads, list(_branches(forest, 0))))
    else:
        processes = await agent.all_processes()
        if as_json:
            print(json.dumps(write_value(processes)))
        else:
            print(table(heads, [_row(one) for one in processes]))
    return 0


def _row(one: ProcessInfo, level: int = 0) -> list[str]:
    line = " ".join([one.command, *one.args]) if one.args[:1] != (one.command,) else " ".join(one.args)
    return [
        str(one.pid), str(one.ppid), one.user or "?", one.state or "?", f"{(one.cpu_ms or 0) / 1000:.2f}s",
        f"{(one.rss_bytes or 0) / 1_048_576:.1f}M", one.driver, "  " * level + line.replace("\n", "\\n"),
    ]  # fmt: skip


def _branches(nodes: Iterable[ProcessTreeNode], level: int) -> Iterable[list[str]]:
    for node in nodes:
        yield _row(node.process, level)
        yield from _branches(node.children, level + 1)


async def _logs(agent: Agent, pid: int, *, follow: bool) -> int:
    process = agent.process(pid)
    if follow:
        await copy_output(process)
        return 0
    cursor = 0
    while True:
        page = await process.read_output(cursor)
        for chunk in page.events:
            write_chunk(chunk.stream, chunk.data, chunk.skipped)
        cursor = page.cursor
        if page.exited or not page.events:
            return 0


async def _kill(agent: Agent, pid: int, signal: str) -> int:
    name = signal.upper().removeprefix("SIG")
    try:
        if name in ("KILL", "9"):
            await agent.kill_process(pid)
        elif name in ("TERM", "15"):
            await agent.stop_process(pid)
        else:
            await agent.signal_process(pid, int(name) if name.isdigit() else f"SIG{name}")
    except ProcessNotFound:
        # `ps` shows those too that were not started through the server
        done = await agent.exec_file(
            "/bin/bash", ["-c", 'kill -s "$1" "$2"', "kill", name, str(pid)], user="root"
        )
        if not done.ok:
            raise
    return 0
