"""`agentos shell`: a shell of a VM in this terminal, which can be left and come back to."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from agentos.commands.remote import add_key, add_vm_options, table, with_agent
from agentos.errors import InvalidRequest, ShellClosed, ShellNotFound

if TYPE_CHECKING:
    from agentos.client.aio import Agent, RemoteShell

DETACH: Final = b"\x10\x11"
"""ctrl-p ctrl-q, as in docker."""
_READ: Final = 64 * 1024


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "shell", help="a shell of a VM, in this terminal",
        description="Open a shell of a VM, which is made if need be. ctrl-p ctrl-q leaves it running.",
    )  # fmt: skip
    add_vm_options(parser)
    parser.add_argument("--attach", metavar="SHELL", help="come back to this one, with what it has shown")
    parser.add_argument("--list", action="store_true", help="the shells there are")
    parser.add_argument("--user", "-u", help="agentos or root")
    parser.add_argument("--cwd", help="directory in the VM")
    add_key(parser)
    parser.add_argument(
        "words", metavar="COMMAND", nargs="*", default=[], help="a program instead of bash, after --"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Be the shell's terminal. Returns its exit code; 0 when it was left."""
    if arguments.list:
        return with_agent(arguments, _list)
    if not (os.isatty(0) and os.isatty(1)):
        raise InvalidRequest("a shell needs a terminal", remedy="use `agentos exec` in scripts and pipes")
    return with_agent(arguments, lambda agent: _shell(agent, arguments), create=arguments.attach is None)


async def _list(agent: Agent) -> int:
    shells = await agent.list_shells()
    rows = [
        [one.shell_id, str(one.pid), "running" if one.running else f"exited {one.exit_code}",
         f"{one.cols}x{one.rows}", " ".join([one.command, *one.args])]
        for one in shells
    ]  # fmt: skip
    print(table(["SHELL", "PID", "STATE", "SIZE", "COMMAND"], rows))
    return 0


async def _shell(agent: Agent, arguments: argparse.Namespace) -> int:
    size = os.get_terminal_size(1)
    cols, rows = size.columns or 80, size.lines or 24
    if arguments.attach is not None:
        shell = agent.shell(arguments.attach)
        if not (await shell.info()).running:
            raise ShellNotFound(f"shell {arguments.attach} has ended", shellId=arguments.attach)
        await shell.resize(cols, rows)
    else:
        words = arguments.words
        shell = await agent.open_shell(
            words[0] if words else None, words[1:], cols=cols, rows=rows, user=arguments.user, cwd=arguments.cwd,
            env={"TERM": os.environ.get("TERM", "xterm-256color")},
        )  # fmt: skip
    with _raw_terminal():
        left = await _Terminal(shell).run()
    if left:
        print(f"left running: agentos shell {arguments.key} --attach {shell.shell_id}", file=sys.stderr)
        return 0
    return await shell.wait()


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


class _Terminal:
    """The person's end of one shell."""

    def __init__(self, shell: RemoteShell) -> None:
        self._shell = shell
        self._typed: asyncio.Queue[bytes] = asyncio.Queue()
        self._held = b""
        self._detached = asyncio.Event()
        self._resized = asyncio.Event()

    async def run(self) -> bool:
        """Show and type until the shell ends (False) or is left (True)."""
        loop = asyncio.get_running_loop()
        loop.add_reader(0, self._read)
        loop.add_signal_handler(signal.SIGWINCH, self._resized.set)
        tasks = [asyncio.create_task(work) for work in (self._type(), self._resize())]
        showing = asyncio.create_task(self._show())
        leaving = asyncio.create_task(self._detached.wait())
        try:
            await asyncio.wait({showing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if showing.done():
                showing.result()
            return not showing.done()
        finally:
            loop.remove_reader(0)
            loop.remove_signal_handler(signal.SIGWINCH)
            for task in (*tasks, showing, leaving):
                task.cancel()
            await asyncio.gather(*tasks, showing, leaving, return_exceptions=True)

    def _read(self) -> None:
        data = os.read(0, _READ)
        if not data:  # the terminal is gone
            self._detached.set()
            return
        data = self._held + data
        before, found, _ = data.partition(DETACH)
        # The first of the two keys waits for the next one, which decides.
        self._held = DETACH[:1] if not found and data.endswith(DETACH[:1]) else b""
        typed = before.removesuffix(self._held) if self._held else before
        if typed:
            self._typed.put_nowait(typed)
        if found:
            self._detached.set()

    async def _type(self) -> None:
        with contextlib.suppress(ShellClosed):
            while True:
                data = await self._typed.get()
                while not self._typed.empty():
                    data += self._typed.get_nowait()
                await self._shell.write(data)

    async def _resize(self) -> None:
        with contextlib.suppress(ShellClosed):
            while True:
                await self._resized.wait()
                self._resized.clear()
                size = os.get_terminal_size(1)
                await self._shell.resize(size.columns or 80, size.lines or 24)

    async def _show(self) -> None:
        async for chunk in self._shell.output():
            data = memoryview(chunk.data)
            while data:
                data = data[os.write(1, data) :]
