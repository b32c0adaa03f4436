"""A process started with spawn: its output as a log, its stdin, its end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from agentos.errors import StdinClosed, WaitTimeout
from agentos.machine.deadlines import Deadlines
from agentos.machine.jobs import Program, check_key, exit_status, lost_at_start, spawn_failed
from agentos.machine.launcher import ExitEvent, Launch
from agentos.machine.link import Link
from agentos.machine.once import WrittenOnce
from agentos.machine.output import DEFAULT_PAGE_BYTES, OutputLog, check_page
from agentos.machine.pipes import Reader, Writer
from agentos.machine.retention import Retention
from agentos.model import (
    ExitStatus,
    Limits,
    OutputChunk,
    OutputPage,
    Reason,
    SpawnedProcess,
    check_count,
    check_data,
    check_moment,
    check_seconds,
)

if TYPE_CHECKING:
    from agentos.machine.verbs.processes import BackgroundVerbs


class Process:
    """A spawned process of a VM. Its verbs are the VM's, with the pid filled in.

    It stays usable after its end, until the VM forgets it (limit exited_processes): output and exit code
    can be asked for late.
    """

    def __init__(self, vm: BackgroundVerbs, program: Program, command: str, args: tuple[str, ...]) -> None:
        self.pid = 0
        self.command = command
        self.args = args
        self.log: OutputLog
        self.status: ExitStatus | None = None
        self._vm = vm
        self.program = program
        self._start_time = time.time()
        self._exit_time: float | None = None
        self._launch: Launch | None = None
        self._readers: list[Reader] = []
        self._writer: Writer | None = None
        self._once = WrittenOnce()
        self._deadlines: Deadlines | None = None
        self._stopped: Reason | None = None
        self._finished: asyncio.Future[ExitStatus] | None = None
        self._ooms = 0

    def __repr__(self) -> str:
        state = "running" if self.status is None else f"exit code {self.status.exit_code}"
        return f"<Process pid={self.pid} {self.command!r} {state}>"

    # -- what a caller may ask

    @property
    def boot_id(self) -> str:
        """The boot of the VM in which it started: in another one, its pid is another process's."""
        return self._vm.boot_id

    @property
    def running(self) -> bool:
        """Whether its end has not been reported."""
        return self.status is None

    @property
    def exit_code(self) -> int | None:
        """Its exit code (128 + n after signal n), None while it runs."""
        return self.status.exit_code if self.status else None

    def info(self) -> SpawnedProcess:
        """What there is to know of it now."""
        status = self.status
        return SpawnedProcess(
            pid=self.pid, command=self.command, args=self.args, running=status is None,
            exit_code=status.exit_code if status else None, signal=status.signal if status else None,
            reason=status.reason if status else None, start_time=self._start_time, exit_time=self._exit_time,
            usage=status.usage if status else None,
        )  # fmt: skip

    def output(self, cursor: int = 0) -> AsyncIterator[OutputChunk]:
        """Its output from `cursor` on, both streams in the order of arrival, to its end, then stops.

        What the log has dropped before the reader came to it is counted in the next chunk's `skipped`.
        """
        return self.log.follow(check_count("cursor", cursor))

    async def read_output(
        self,
        cursor: int = 0,
        *,
        max_bytes: int = DEFAULT_PAGE_BYTES,
        wait: float = 0.0,
        since: float | None = None,
    ) -> OutputPage:
        """A page of its output from `cursor`; waits up to `wait` seconds where there is nothing yet.

        `since`, in seconds since the epoch: what arrived more than a second before that is passed by.
        """
        patience = check_page(cursor, max_bytes, wait)
        return await self.log.read_wait(cursor, max_bytes, patience, check_moment("since", since))

    async def write_stdin(self, data: str | bytes, *, idempotency_key: str | None = None) -> None:
        """Write to its stdin; returns once the bytes are accepted, in order. StdinClosed when nobody can read them.

        A second call with the same `idempotency_key` writes nothing, and returns once the first one's bytes are
        accepted; with other data it is an InvalidRequest. The newest 256 keys are remembered.
        """
        content, key = check_data("data", data), check_key(idempotency_key)
        await self._once.write(key, content, self._write)

    async def _write(self, content: bytes) -> None:
        if self._writer is None:
            raise StdinClosed("the process has exited", pid=self.pid)
        try:
            await self._writer.write(content)
        except StdinClosed as error:
            raise StdinClosed(error.message, pid=self.pid) from None

    async def close_stdin(self) -> None:
        """Close its stdin once all that was written has been taken. No effect when it is closed already."""
        if self._writer is not None:
            self._writer.finish()

    async def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when its output up to its end is in the log.

        WaitTimeout after `timeout` seconds: it goes on.
        """
        return (await self.wait_status(timeout)).exit_code

    async def wait_status(self, timeout: float | None = None) -> ExitStatus:
        """As `wait`, with signal, reason and usage."""
        limit = check_seconds("timeout", timeout)
        if self.status is not None:
            return self.status
        assert self._finished is not None
        try:
            async with asyncio.timeout(limit):
                return await asyncio.shield(self._finished)
        except TimeoutError:
            raise WaitTimeout(
                f"process {self.pid} still runs after {timeout} s", pid=self.pid, timeout=limit
            ) from None

    async def signal(self, signal: str | int) -> None:
        """Send it a signal. No effect when it has exited."""
        await self._vm.signal_process(self.pid, signal)

    async def stop(self, *, kill_after: float | None = None) -> None:
        """SIGTERM to its process group; SIGKILL to all its descendants `kill_after` seconds later if it still runs."""
        await self._vm.stop_process(self.pid, kill_after=kill_after)

    async def kill(self) -> None:
        """SIGKILL to it and to every descendant, whatever session it moved to. No effect when it has exited."""
        await self._vm.kill_process(self.pid)

    # -- its life

    async def start(
        self,
        link: Link,
        limits: Limits,
        oom_kills: Callable[[], int],
        retention: Retention,
        *,
        timeout: float | None,
        lossless: bool,
        reserve: bool,
    ) -> None:
        """Start the program. Raises SpawnFailed when that can not be done; nothing is left then."""
        loop = link.loop
        self._ooms = oom_kills()
        self.log = OutputLog(limits.log_bytes, lossless=lossless, retention=retention)
        (in_read, in_write), (out_read, out_write), (err_read, err_write) = (
            os.pipe2(os.O_CLOEXEC) for _ in range(3)
        )
        for fd in (in_write, out_read, err_read):
            os.set_blocking(fd, False)
        try:
            launch = self._launch = link.launch(
                self.program.job(), [in_read, out_write, err_write], reserve=reserve
            )
        except BaseException:
            for fd in (in_write, out_read, err_read):
                os.close(fd)
            raise
        # Who is lossless writes no faster than it is read. Another may write for nobody, and is read in small pieces:
        # whoever else is served would wait for large ones.
        room = self.log.room if lossless else None
        self._readers = [
            Reader(loop, out_read, self._stdout, _nothing, room=room),
            Reader(loop, err_read, self._stderr, _nothing, room=room),
        ]
        self.log.on_room = self._resume
        self._writer = Writer(loop, in_write, limits.stdin_bytes)
        self._finished = loop.create_future()
        try:
            await asyncio.shield(launch.settling())
        except BaseException:
            link.take_back(launch)
            self._close()
            raise
        if launch.error is not None or not launch.pid:
            self._close()
            if link.ended.done():
                raise link.stopped_error()
            raise spawn_failed(launch.error or lost_at_start(), self.program)
        self.pid = launch.pid
        if timeout is not None:
            self._deadlines = Deadlines(loop, self._out_of_time, wall=timeout)
        launch.exited.add_done_callback(lambda exited: self._leader_exited(exited, oom_kills))

    def _stdout(self, data: bytes) -> None:
        self.log.append("stdout", data)

    def _stderr(self, data: bytes) -> None:
        self.log.append("stderr", data)

    def _resume(self) -> None:
        for reader in self._readers:
            reader.resume()

    def _out_of_time(self, reason: Reason) -> None:
        self.end("timeout")

    def end(self, reason: Reason | None) -> None:
        """Kill the whole lineage; `reason`, if any, is what its status will say."""
        if self.status is None and self._launch is not None:
            self._stopped = self._stopped or reason
            self._vm.link.kill_soon(self._launch)

    def signal_leader(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to the group that it leads. No effect when it has exited."""
        if self.status is None and self._launch is not None:
            self._vm.link.signal(self._launch, number, group=group)

    async def kill_lineage(self) -> None:
        """SIGKILL to it and every descendant; returns when all are dead."""
        if self._launch is not None:
            await self._vm.link.kill(self._launch)

    def _leader_exited(self, exited: asyncio.Future[ExitEvent], oom_kills: Callable[[], int]) -> None:
        assert self._launch is not None
        error = self._launch.exited.exception()
        if error is not None:
            status = ExitStatus(137, "SIGKILL", "vmStopped")
        else:
            event = self._launch.exited.result()
            for reader in self._readers:
                reader.drain()
            oom = not self._stopped and event.status != 0 and oom_kills() > self._ooms
            status = exit_status(event, stopped=self._stopped, oom=oom)
        self.status = status
        self._exit_time = time.time()
        self._vm.link.release(self._launch)
        if self._deadlines:
            self._deadlines.cancel()
        for reader in self._readers:
            if reader.open and error is None:
                self._vm.keep_draining(reader)
            else:
                reader.close()
        self._readers = []
        if self._writer:
            self._writer.close()
            self._writer = None
        self.log.finish()
        if self._finished and not self._finished.done():
            self._finished.set_result(status)
        self._vm.process_ended(self)

    def _close(self) -> None:
        for reader in self._readers:
            reader.close()
        if self._writer:
            self._writer.close()


def _nothing() -> None:
    """A pipe's end: the process's end is what counts."""
