"""`agentos shell`: a shell of a VM in this terminal, which can be left and come back to."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from agentos.commands.execute import FAILED, add_program_options, add_words, cannot_start, program_options
from agentos.commands.remote import add_key, add_vm_options, table, with_agent
from agentos.commands.stdio import is_terminal
from agentos.conversions import write_value
from agentos.errors import InvalidRequest, ShellClosed, ShellNotFound, SpawnFailed

if TYPE_CHECKING:
    from agentos.client.aio import Agent, RemoteShell

DETACH: Final = b"\x10\x11"
"""ctrl-p ctrl-q, as in docker."""
_READ: Final = 64 * 1024


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "shell", help="a shell of a VM, in this terminal",
        usage="agentos shell [options] KEY [[--] COMMAND [ARG ...]]",
        description="Open a shell of a VM, which is made if need be: bash, or another program. ctrl-p ctrl-q, or the "
        "end of this terminal, leaves it running; --attach comes back to it.",
        epilog="Exit codes: the shell's own; 0 when it was left; 125 when agentos itself failed, 126 when the "
        "command may not be run, 127 when there is none of that name.",
    )  # fmt: skip
    add_vm_options(parser)
    add_program_options(parser)
    parser.add_argument("--attach", metavar="SHELL", help="come back to this one, with what it has shown")
    parser.add_argument("--list", action="store_true", help="the shells there are")
    parser.add_argument("--json", action="store_true", help="with --list: for programs")
    add_key(parser)
    add_words(parser)
    parser.set_defaults(run=run, failed=FAILED)


def run(arguments: argparse.Namespace) -> int:
    """Be the shell's terminal. Returns its exit code; 0 when it was left."""
    if arguments.list:
        return with_agent(arguments, lambda agent: _list(agent, as_json=arguments.json))
    if not (is_terminal(0) and is_terminal(1)):
        raise InvalidRequest("a shell needs a terminal", remedy="use `agentos exec` in scripts and pipes")
    if arguments.attach is not None:
        return with_agent(arguments, lambda agent: _attach(agent, arguments.attach, arguments.key))
    command, *args = arguments.words or ["bash"]
    options = program_options(arguments)
    try:
        return with_agent(
            arguments,
            lambda agent: in_terminal(
                agent, command, args, options, key=arguments.key, typing=True, keep=True
            ),
            create=True,
        )
    except SpawnFailed as error:
        return cannot_start(error, as_json=arguments.json)


async def _list(agent: Agent, *, as_json: bool) -> int:
    shells = await agent.list_shells()
    if as_json:
        print(json.dumps(write_value(shells)))
        return 0
    rows = [
        [one.shell_id, str(one.pid), "running" if one.running else f"exited {one.exit_code}",
         f"{one.cols}x{one.rows}", " ".join([one.command, *one.args])]
        for one in shells
    ]  # fmt: skip
    print(table(["SHELL", "PID", "STATE", "SIZE", "COMMAND"], rows))
    return 0


async def _attach(agent: Agent, shell_id: str, key: str) -> int:
    shell = agent.shell(shell_id)
    if not (await shell.info()).running:
        raise ShellNotFound(f"shell {shell_id} has ended", shellId=shell_id)
    await shell.resize(*_size())
    return await _be_its_terminal(shell, key, typing=True, keep=True)


async def in_terminal(
    agent: Agent,
    command: str,
    args: list[str],
    options: dict[str, Any],
    *,
    key: str,
    typing: bool,
    keep: bool = False,
) -> int:
    """Run a program in a terminal of the VM and show it here; with `typing`, what is typed here goes there.

    Returns its exit code, or 0 where it was left. `keep`: it goes on when this terminal ends.
    """
    env = {"TERM": os.environ.get("TERM", "xterm-256color"), **(options["env"] or {})}
    cols, rows = _size()
    shell = await agent.open_shell(command, args, cols=cols, rows=rows, **{**options, "env": env})
    return await _be_its_terminal(shell, key, typing=typing, keep=keep)


def _size() -> tuple[int, int]:
    for fd in (1, 0, 2):
        try:
            size = os.get_terminal_size(fd)
        except OSError:
            continue
        if size.columns and size.lines:
            return size.columns, size.lines
    return 80, 24


async def _be_its_terminal(shell: RemoteShell, key: str, *, typing: bool, keep: bool) -> int:
    terminal = _Terminal(shell)
    with _raw_terminal() if typing else contextlib.nullcontext():
        await terminal.run(typing=typing)
    if terminal.left is None:
        return await shell.wait()
    if keep and terminal.left == signal.SIGHUP:
        pass  # nobody is there to be told
    elif keep or not terminal.left:
        below = "\n" if terminal.within_line else ""
        print(f"{below}left running: agentos shell --attach {shell.shell_id} {key}", file=sys.stderr)
    else:
        await shell.close()
    return 128 + terminal.left if terminal.left else 0


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(0, termios.TCSADRAIN, before)


class _Terminal:
    """The person's end of one shell."""

    def __init__(self, shell: RemoteShell) -> None:
        self.left: int | None = None
        """Why it was left before its end: the signal that ended this terminal, or 0 where the person chose to."""
        self.within_line = False
        """Whether what it has shown last ended no line."""
        self._shell = shell
        self._typed: asyncio.Queue[bytes] = asyncio.Queue()
        self._held = b""
        self._leaving = asyncio.Event()
        self._resized = asyncio.Event()

    async def run(self, *, typing: bool) -> None:
        """Show and type until the shell ends or is left."""
        loop = asyncio.get_running_loop()
        if typing:
            loop.add_reader(0, self._read)
        loop.add_signal_handler(signal.SIGWINCH, self._resized.set)
        endings = [signal.SIGHUP, signal.SIGTERM, *([] if typing else [signal.SIGINT])]
        for one in endings:
            loop.add_signal_handler(one, self._leave, one)
        tasks = [asyncio.create_task(work) for work in (self._type(), self._resize())]
        showing = asyncio.create_task(self._show())
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait({showing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if showing.done():
                self.left = None
                showing.result()
        finally:
            if typing:
                loop.remove_reader(0)
            for one in (signal.SIGWINCH, *endings):
                loop.remove_signal_handler(one)
            for task in (*tasks, showing, leaving):
                task.cancel()
            await asyncio.gather(*tasks, showing, leaving, return_exceptions=True)

    def _leave(self, why: int) -> None:
        self.left = why
        self._leaving.set()

    def _read(self) -> None:
        try:
            data = os.read(0, _READ)
        except OSError:
            data = b""
        if not data:  # the terminal is gone
            self._leave(signal.SIGHUP)
            return
        data = self._held + data
        before, found, _ = data.partition(DETACH)
        # The first of the two keys waits for the next one, which decides.
        self._held = DETACH[:1] if not found and data.endswith(DETACH[:1]) else b""
        typed = before.removesuffix(self._held) if self._held else before
        if typed:
            self._typed.put_nowait(typed)
        if found:
            self._leave(0)

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
                await self._shell.resize(*_size())

    async def _show(self) -> None:
        async for chunk in self._shell.output():
            self.within_line = not chunk.data.endswith((b"\n", b"\r"))
            data = memoryview(chunk.data)
            while data:
                data = data[os.write(1, data) :]
