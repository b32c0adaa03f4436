"""This process's own stdin, stdout and signals, and a command in a VM that is to have them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from agentos.commands.remote import say
from agentos.errors import AgentOSError, StdinClosed

if TYPE_CHECKING:
    from agentos.client.aio import Agent, RemoteProcess

_PIECE: Final = 64 * 1024
_QUEUED: Final = 4
_FORWARDED: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_PATIENCE: Final = 3
"""Interrupts, of which the last one does not ask any more."""


def is_terminal(fd: int) -> bool:
    """Whether a descriptor is open, and a terminal."""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def read_stdin() -> bytes:
    """All of stdin; nothing where it is closed."""
    return sys.stdin.buffer.read() if sys.stdin is not None else b""


def write_chunk(stream: str, data: bytes, skipped: int) -> None:
    """Write output where it belongs."""
    if skipped:
        say(f"{skipped} bytes of output are missing here")
    target = sys.stdout if stream == "stdout" else sys.stderr
    target.buffer.write(data)
    target.buffer.flush()


@contextlib.contextmanager
def forward_signals(agent: Agent, process: RemoteProcess, user: str | None) -> Iterator[None]:
    """Signals to us go to the command, as a terminal sends them: to its process group. The third interrupt kills."""
    loop = asyncio.get_running_loop()
    interrupts = 0
    sending: set[asyncio.Task[None]] = set()

    def received(name: str) -> None:
        nonlocal interrupts
        interrupts += name == "SIGINT"
        work = process.kill() if interrupts >= _PATIENCE else _signal_group(agent, process.pid, name, user)
        task = asyncio.ensure_future(work)
        sending.add(task)
        task.add_done_callback(sending.discard)

    for name in _FORWARDED:
        loop.add_signal_handler(getattr(signal, name), received, name)
    try:
        yield
    finally:
        for name in _FORWARDED:
            loop.remove_signal_handler(getattr(signal, name))
        for task in sending:
            task.cancel()


async def _signal_group(agent: Agent, pid: int, name: str, user: str | None) -> None:
    try:
        line = 'kill -s "$1" -- "-$2"'
        await agent.exec_file("bash", ["-c", line, "kill", name, str(pid)], user=user)
    except AgentOSError as error:
        say(f"{name} did not reach the command: {error.message}")


async def pipe_stdin(process: RemoteProcess) -> None:
    """All of our stdin to the command's, to the end."""
    pieces: asyncio.Queue[bytes] = asyncio.Queue(_QUEUED)
    # A thread that ends with the process: who writes to our stdin may never do so again.
    loop = asyncio.get_running_loop()
    threading.Thread(target=_read, args=(loop, pieces), daemon=True).start()
    try:
        while data := await pieces.get():
            await process.write_stdin(data)
        await process.close_stdin()
    except StdinClosed:
        pass  # it does not read more, as `head` does not
    except AgentOSError as error:
        say(f"stdin: {error.message}")


def _read(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[bytes]) -> None:
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
