"""`agentos top`: what the running VMs use, and their processes; live in a terminal, once into a pipe."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from agentos.commands.moments import seconds
from agentos.commands.processes import command_line
from agentos.commands.remote import add_vm_options, say, table, vm_key, with_client
from agentos.commands.stdio import is_terminal
from agentos.conversions import write_value
from agentos.errors import AgentOSError, InvalidRequest, VmNotFound
from agentos.model import ProcessInfo
from agentos.printing import printable
from agentos.wire.keys import deserialize_key, serialize_key

if TYPE_CHECKING:
    from agentos.client.aio import Client, VmRecord

_AT_ONCE: Final = 32
"""VMs that are asked at the same time."""
_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_REST_OF_LINE: Final = "\x1b[K"
_REST_OF_SCREEN: Final = "\x1b[J"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "top", help="what the running VMs and their processes use",
        description="Show CPU and memory of the running VMs and their processes, busiest first: live in a terminal "
        "(q or ctrl-c ends it), one snapshot into a pipe. A VM that is watched does not fall asleep; one that "
        "sleeps is not woken.",
    )  # fmt: skip
    add_vm_options(parser)
    parser.add_argument(
        "--interval", "-d", type=seconds, default=2.0, metavar="TIME", help="between two looks (default: 2s)"
    )
    parser.add_argument("--once", action="store_true", help="one snapshot, in a terminal too")
    parser.add_argument("--json", action="store_true", help="one snapshot for programs")
    parser.add_argument("keys", metavar="KEY", type=vm_key, nargs="*", help="only these VMs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show it."""
    if not 0.1 <= arguments.interval <= 3600:
        raise InvalidRequest.argument("--interval", arguments.interval, "seconds, 0.1 to 3600")
    live = is_terminal(0) and is_terminal(1) and not (arguments.json or arguments.once)
    return with_client(
        arguments, lambda client: _live(client, arguments) if live else _once(client, arguments)
    )


@dataclass
class Usage:
    """One VM at one moment."""

    record: VmRecord
    processes: list[ProcessInfo]
    at: float
    cpu: dict[int, float] = field(default_factory=dict)
    """Share of one core by pid: since the look before, or since the process began."""

    @property
    def share(self) -> float:
        """Of the VM."""
        return sum(self.cpu.values())

    @property
    def rss(self) -> int:
        """Resident bytes of all processes; what they share counts for each."""
        return sum(one.rss_bytes for one in self.processes)


async def look(client: Client, arguments: argparse.Namespace, before: dict[str, Usage]) -> dict[str, Usage]:
    """The running VMs by id, busiest first."""
    keys = {deserialize_key(one) for one in arguments.keys}
    records = [one for one in await client.list(None if not keys else arguments.name) if one.running]
    wanted = [one for one in records if not keys or one.key in keys]
    room = asyncio.Semaphore(_AT_ONCE)

    async def ask(record: VmRecord) -> Usage | None:
        async with room:
            try:
                processes = await client.kind(record.name).get(record.key).all_processes()
            except AgentOSError:
                return None  # it has gone since
        return _compared(Usage(record, processes, time.time()), before.get(record.id))

    found = [one for one in await asyncio.gather(*map(ask, wanted)) if one is not None]
    found.sort(key=lambda one: (-one.share, -one.rss, one.record.key))
    return {one.record.id: one for one in found}


def _compared(now: Usage, before: Usage | None) -> Usage:
    known = {(one.pid, one.start_time): one for one in before.processes} if before else {}
    for one in now.processes:
        earlier = known.get((one.pid, one.start_time))
        spent = one.cpu_ms - (earlier.cpu_ms if earlier else 0)
        seconds = now.at - (before.at if before and earlier else one.start_time)
        now.cpu[one.pid] = max(0.0, spent / 1000 / max(seconds, 0.01))
    return now


async def _once(client: Client, arguments: argparse.Namespace) -> int:
    found = await look(client, arguments, {})
    if arguments.json:
        print(json.dumps([_tree(one) for one in found.values()]))
    else:
        print("\n".join(_lines(found)))
    shown = {one.record.key for one in found.values()}
    missing = [key for key in arguments.keys if deserialize_key(key) not in shown]
    if missing and arguments.json:
        raise VmNotFound(f"no running VM of the key {', '.join(map(repr, missing))}", keys=missing)
    for key in missing:
        say(f"no running VM of the key {key!r}")
    return 1 if missing else 0


def _tree(usage: Usage) -> dict[str, Any]:
    record = usage.record
    processes = [{**write_value(one), "cpu": round(usage.cpu[one.pid], 4)} for one in usage.processes]
    return {
        "id": record.id, "name": record.name, "key": list(record.key), "cpu": round(usage.share, 4),
        "rssBytes": usage.rss, "processes": processes,
    }  # fmt: skip


def _lines(found: dict[str, Usage]) -> list[str]:
    vms = [
        [serialize_key(one.record.key), one.record.name, _percent(one.share), _mib(one.rss), str(len(one.processes))]
        for one in found.values()
    ]  # fmt: skip
    processes = [
        [serialize_key(vm.record.key), str(one.pid), one.user or "?", one.state or "?", _percent(vm.cpu[one.pid]),
         _mib(one.rss_bytes), command_line(one)]
        for vm in found.values()
        for one in sorted(vm.processes, key=lambda one: (-vm.cpu[one.pid], one.pid))
    ]  # fmt: skip
    numbers = ("PID", "CPU", "RSS")
    lines = table(["KEY", "NAME", "CPU", "RSS", "PROCESSES"], vms, right=numbers).split("\n")
    if processes:
        heads = ["KEY", "PID", "USER", "STATE", "CPU", "RSS", "COMMAND"]
        lines += ["", *table(heads, processes, right=numbers).split("\n")]
    return lines


def _percent(share: float) -> str:
    return f"{share * 100:.1f}%"


def _mib(size: int) -> str:
    return f"{size / 1_048_576:.1f}M"


async def _live(client: Client, arguments: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    wake, ended = asyncio.Event(), asyncio.Event()

    def end() -> None:
        ended.set()
        wake.set()

    def typed() -> None:
        keys = os.read(0, 1024)
        if not keys or any(one in b"q\x03\x04" for one in keys):
            end()

    found: dict[str, Usage] = {}
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(one, end)
    loop.add_signal_handler(signal.SIGWINCH, wake.set)
    loop.add_reader(0, typed)
    try:
        with _screen():
            while not ended.is_set():
                wake.clear()
                found = await look(client, arguments, found)
                _draw(found, arguments.endpoint)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(arguments.interval):
                        await wake.wait()
    finally:
        loop.remove_reader(0)
    return 0


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """A screen of our own, with keys as they are typed; the one before comes back."""
    import termios
    import tty

    before = termios.tcgetattr(0)
    try:
        tty.setcbreak(0)
        sys.stdout.write(_ENTER)
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(0, termios.TCSADRAIN, before)


def _draw(found: dict[str, Usage], endpoint: str) -> None:
    cols, rows = os.get_terminal_size(1)
    vms = list(found.values())
    head = (
        f"{time.strftime('%H:%M:%S')}  {endpoint}  {len(vms)} running, {sum(len(vm.processes) for vm in vms)} "
        f"processes, {_percent(sum(vm.share for vm in vms))} CPU, {_mib(sum(vm.rss for vm in vms))}  (q ends)"
    )
    lines = [printable(head), "", *_lines(found)]
    shown = [line[:cols] + _REST_OF_LINE for line in lines[: max(rows - 1, 1)]]
    sys.stdout.write(_HOME + "\r\n".join(shown) + _REST_OF_SCREEN)
    sys.stdout.flush()
