"""A shell: a program on a pseudoterminal, with its scrollback as a log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from agentos.errors import ShellClosed, StdinClosed, WaitTimeout
from agentos.linux import pty
from agentos.machine.jobs import Program, check_key, exit_status, lost_at_start, spawn_failed
from agentos.machine.launcher import ExitEvent, Launch
from agentos.machine.link import Link
from agentos.machine.once import WrittenOnce
from agentos.machine.output import DEFAULT_PAGE_BYTES, OutputLog, check_page
from agentos.machine.pipes import Reader, Writer
from agentos.model import (
    ExitStatus,
    Limits,
    OutputChunk,
    OutputPage,
    ShellInfo,
    TermSize,
    check_count,
    check_data,
    check_seconds,
)

if TYPE_CHECKING:
    from agentos.machine.verbs.shells import ShellVerbs

HANG_UP_SECONDS = 2.0
"""How long a shell may take to end after its terminal is closed, before it is killed."""
FINISH_SECONDS = 1.0
"""From when something was typed: how long a shell that is being closed has to finish it."""
_END_OF_INPUT = b"\x04"
_MOST_TOLD = 16


class Shell:
    """An open shell of a VM. Its verbs are the VM's, with the shell's id filled in."""

    def __init__(
        self, vm: ShellVerbs, shell_id: str, program: Program, size: TermSize, scrollback_bytes: int
    ) -> None:
        self.shell_id = shell_id
        self.pid = 0
        self.size = size
        self.log = OutputLog(scrollback_bytes)
        self.status: ExitStatus | None = None
        self._vm = vm
        self._program = program
        self._start_time = time.time()
        self._launch: Launch | None = None
        self._reader: Reader | None = None
        self._writer: Writer | None = None
        self._master_fd = -1
        self._slave_fd = -1
        self._exited: asyncio.Future[None] | None = None
        self._finished: asyncio.Future[ExitStatus] | None = None
        self._hang_up_timer: asyncio.TimerHandle | None = None
        self._typed_at = -FINISH_SECONDS
        self._once = WrittenOnce()

    def __repr__(self) -> str:
        state = "running" if self.status is None else f"exit code {self.status.exit_code}"
        return f"<Shell {self.shell_id} pid={self.pid} {state}>"

    @property
    def boot_id(self) -> str:
        """The boot of the VM in which it was opened: in another one, its id is another shell's."""
        return self._vm.boot_id

    @property
    def running(self) -> bool:
        """Whether its end has not been reported."""
        return self.status is None

    @property
    def exit_code(self) -> int | None:
        """Its exit code (128 + n after signal n), None while it runs."""
        return self.status.exit_code if self.status else None

    def info(self) -> ShellInfo:
        """What there is to know of it now."""
        return ShellInfo(
            shell_id=self.shell_id, pid=self.pid, command=self._program.argv[0], args=tuple(self._program.argv[1:]),
            cols=self.size.cols, rows=self.size.rows, running=self.running, exit_code=self.exit_code,
            start_time=self._start_time,
        )  # fmt: skip

    def output(self, cursor: int = 0) -> AsyncIterator[OutputChunk]:
        """What the terminal shows, from `cursor` on, to the shell's end. Cursor 0: with the retained scrollback."""
        return self.log.follow(check_count("cursor", cursor))

    async def read(
        self, cursor: int = 0, *, max_bytes: int = DEFAULT_PAGE_BYTES, wait: float = 0.0
    ) -> OutputPage:
        """A page of its output from `cursor`; waits up to `wait` seconds where there is nothing yet."""
        return await self.log.read_wait(cursor, max_bytes, check_page(cursor, max_bytes, wait))

    async def write(self, data: str | bytes, *, idempotency_key: str | None = None) -> None:
        """Type `data`. Waits while the terminal takes no more; ShellClosed when it has ended.

        A second call with the same `idempotency_key` types nothing, and returns once the first one's bytes are
        accepted; with other data it is an InvalidRequest. The newest 256 keys are remembered.
        """
        content, key = check_data("data", data), check_key(idempotency_key)
        await self._once.write(key, content, self._write)

    async def _write(self, content: bytes) -> None:
        self._typed_at = self._vm.link.loop.time()
        if self._writer is None:
            raise ShellClosed(f"shell {self.shell_id} has ended", shellId=self.shell_id)
        try:
            await self._writer.write(content)
        except StdinClosed:
            raise ShellClosed(f"shell {self.shell_id} has ended", shellId=self.shell_id) from None

    async def resize(self, cols: int, rows: int) -> None:
        """Change the terminal's size: the foreground program gets SIGWINCH. ShellClosed when it has ended."""
        size = TermSize(cols, rows)
        if self._master_fd < 0:
            raise ShellClosed(f"shell {self.shell_id} has ended", shellId=self.shell_id)
        pty.set_size(self._master_fd, size.rows, size.cols)
        self.size = size

    async def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when its output up to its end is in the log.

        WaitTimeout after `timeout` seconds: it goes on.
        """
        limit = check_seconds("timeout", timeout)
        if self.status is not None:
            return self.status.exit_code
        assert self._finished is not None
        try:
            async with asyncio.timeout(limit):
                return (await asyncio.shield(self._finished)).exit_code
        except TimeoutError:
            message = f"shell {self.shell_id} still runs after {timeout} s"
            raise WaitTimeout(message, shellId=self.shell_id, timeout=limit) from None

    async def close(self) -> None:
        """Hang up, as when a terminal window is closed, and wait until the shell has ended. No effect when it has.

        What was typed within the last FINISH_SECONDS may be finished within those: the shell is told that there is
        no more (ctrl-d), and hung up if it has not ended of that.
        """
        if self.status is None:
            await self._finish_what_was_typed()
            self.hang_up()
            assert self._finished is not None
            await asyncio.shield(self._finished)

    async def _finish_what_was_typed(self) -> None:
        end = self._typed_at + FINISH_SECONDS
        if self._writer is None or self._vm.link.loop.time() >= end:
            return
        assert self._finished is not None
        try:
            async with asyncio.timeout_at(end):
                # A program that is about to change the terminal's mode loses what was typed before; it then shows
                # something, such as a prompt, and is told once more.
                for _ in range(_MOST_TOLD):
                    shown = self.log.end
                    await self._writer.write(_END_OF_INPUT)
                    await self.log.read_wait(shown, 1, FINISH_SECONDS)
                    if self._writer is None:
                        break
                await asyncio.shield(self._finished)
        except (TimeoutError, StdinClosed):
            pass

    # -- its life

    async def start(self, link: Link, limits: Limits, *, reserve: bool) -> None:
        """Open the terminal and start the program. Raises SpawnFailed when that can not be done."""
        loop = link.loop
        job = self._program.job(pty=[self.size.rows, self.size.cols])
        launch = self._launch = link.launch(job, reserve=reserve)
        self._exited = loop.create_future()
        self._finished = loop.create_future()
        try:
            await asyncio.shield(launch.settling())
        except BaseException:
            link.take_back(launch)
            launch.settling().add_done_callback(lambda _: _close_master(launch))
            raise
        master, launch.master_fd = launch.master_fd, -1
        if launch.error is not None or master < 0:
            if master >= 0:
                os.close(master)
            if link.ended.done():
                raise link.stopped_error()
            if launch.pid:
                link.take_back(launch)
            raise spawn_failed(launch.error or lost_at_start(), self._program)
        self.pid = launch.pid
        self._master_fd = master
        os.set_blocking(master, False)
        # Until the program's end its terminal has an end that is open: many close their own first, and a master that
        # were closed then would send SIGHUP to a program which is about to end well.
        with contextlib.suppress(OSError):  # a program can forbid it (TIOCEXCL)
            self._slave_fd = pty.open_slave(master)
        self._writer = Writer(loop, master, limits.stdin_bytes, duplicate=True, what="the terminal")
        self._reader = Reader(loop, master, self._output, self._terminal_ended)
        launch.exited.add_done_callback(self._leader_exited)

    def _output(self, data: bytes) -> None:
        self.log.append("stdout", data)

    def hang_up(self) -> None:
        """Close the terminal: the kernel sends SIGHUP. A shell that does not end of it is killed, with all its own."""
        self._close_terminal()
        if self.status is None and self._hang_up_timer is None and self._launch is not None:
            self._hang_up_timer = self._vm.link.loop.call_later(
                HANG_UP_SECONDS, self._vm.link.kill_soon, self._launch
            )

    def _release_slave(self) -> None:
        if self._slave_fd >= 0:
            os.close(self._slave_fd)
            self._slave_fd = -1

    def _terminal_ended(self) -> None:
        """No program has the terminal open any more."""
        if self._writer:
            self._writer.close()
            self._writer = None
        self._master_fd = -1
        self._settle()

    def _close_terminal(self) -> None:
        self._release_slave()
        if self._reader and self._reader.open:
            self._reader.drain_terminal()
            self._reader.close()
        self._terminal_ended()

    def _leader_exited(self, exited: asyncio.Future[ExitEvent]) -> None:
        assert self._launch is not None
        assert self._exited is not None
        error = self._launch.exited.exception()
        if error is None:
            self._status = exit_status(self._launch.exited.result(), stopped=None, oom=False)
        else:
            self._status = ExitStatus(137, "SIGKILL", "vmStopped")
            self._close_terminal()
        self._exited.set_result(None)
        self._release_slave()
        if self._hang_up_timer:
            self._hang_up_timer.cancel()
        self._vm.link.release(self._launch)
        if self._reader and self._reader.open:
            # The end of a session's leader hangs up its terminal, so what is left to read ends by itself.
            self._reader.drain_terminal()
        self._settle()

    def _settle(self) -> None:
        """Ended is who has exited and whose terminal has said its last word."""
        if self.status is None and self._exited and self._exited.done() and self._master_fd < 0:
            self.status = self._status
            self.log.finish()
            if self._finished and not self._finished.done():
                self._finished.set_result(self.status)
            self._vm.shell_ended(self)


def _close_master(launch: Launch) -> None:
    """Of a terminal that nobody waits for any more, when it has come."""
    master, launch.master_fd = launch.master_fd, -1
    if master >= 0:
        os.close(master)
