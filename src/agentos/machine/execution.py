"""One exec: run a program to the end of its leader and collect what it wrote.

The result is there when the leader has exited and what it had written by then is read. A child that it
left behind may hold the pipes open for ever: it is named in the result, and its output goes on being read
(and dropped), so that it does not die of a closed pipe.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from agentos.errors import VmStopped
from agentos.machine.capture import Capture
from agentos.machine.deadlines import Deadlines
from agentos.machine.jobs import Program, exit_status, spawn_failed
from agentos.machine.launcher import Launch
from agentos.machine.link import Link
from agentos.machine.pipes import Reader, Writer
from agentos.model import Encoding, ExecResult, ExitStatus, OnLeaderExit, Orphan, Reason

_LIMIT_OF = {"oom": "memory_bytes", "outputLimit": "runaway_bytes"}


class ExecOptions(NamedTuple):
    """The checked options of one exec."""

    stdin: bytes | None
    timed: bool
    """Whether one of these is set."""
    timeout: float | None
    idle_timeout: float | None
    cpu_timeout: float | None
    max_output_bytes: int
    runaway_bytes: int
    encoding: Encoding
    on_leader_exit: OnLeaderExit


class Execution:
    """The state of one running exec. `keep` takes over pipes that children still hold at its end."""

    _captures: tuple[Capture, ...] = ()
    _writer: Writer | None = None
    _deadlines: Deadlines | None = None
    _launch: Launch | None = None
    _stopped: Reason | None = None

    def __init__(
        self,
        link: Link,
        program: Program,
        options: ExecOptions,
        oom_kills: Callable[[], int],
        keep: Callable[[Reader], None],
    ) -> None:
        self._link = link
        self._program = program
        self._options = options
        self._oom_kills = oom_kills
        self._keep = keep
        self._began = time.monotonic()

    async def run(self, reserve: bool) -> ExecResult:
        """Run to the end, started by the reserve or not. Again where nothing was started: in the time that is left."""
        began, options, loop = self._began, self._options, self._link.loop
        launch = self._launch = self._start(reserve)
        self._stopped = None
        captures = self._captures
        try:
            ooms = self._oom_kills()
            # Most commands have ended before, with all that they wrote still in the pipes: one wakeup instead of five.
            launch.on_started = self._listen
            if options.timed:
                wall = options.timeout and max(0.0, options.timeout - (time.monotonic() - began))
                self._deadlines = Deadlines(
                    loop, self._stop, wall=wall, idle=options.idle_timeout,
                    cpu=options.cpu_timeout, cpu_used=self._cpu_used,
                )  # fmt: skip
            if self._writer is not None:
                await self._feed_stdin()
            event = await launch.exited
            if launch.error:
                raise spawn_failed(launch.error, self._program)
            for capture in captures:
                capture.drain(loop, complete=not event.orphans)
            if captures[0].total > options.runaway_bytes or captures[1].total > options.runaway_bytes:
                self._stop("outputLimit")
            oom = event.status != 0 and not self._stopped and self._oom_kills() > ooms
            status = exit_status(event, stopped=self._stopped, oom=oom)
            if event.orphans or self._stopped:
                orphans, status = await self._see_to_orphans(launch, event.orphans, status)
                return self._result(status, orphans, time.monotonic() - began)
            return self._result(status, (), time.monotonic() - began)
        except VmStopped:
            for capture in captures:
                capture.drain(loop, complete=False)
            return self._result(ExitStatus(137, "SIGKILL", "vmStopped"), (), time.monotonic() - began)
        except BaseException:
            self._link.kill_soon(launch)
            raise
        finally:
            self._link.release(launch)
            if self._deadlines:
                self._deadlines.cancel()
            if self._writer:
                self._writer.close()
            for capture in captures:
                if not capture.ended:
                    self._keep(capture.reader(loop))

    def _start(self, reserve: bool) -> Launch:
        options = self._options
        stdout, stdout_end = os.pipe2(os.O_CLOEXEC)
        stderr, stderr_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(stdout, False)
        os.set_blocking(stderr, False)
        theirs = [stdout_end, stderr_end]
        if options.stdin is not None:
            stdin_end, ours = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(ours, False)
            self._writer = Writer(self._link.loop, ours, len(options.stdin) + 1)
            theirs.insert(0, stdin_end)
        try:
            launch = self._link.launch(self._program.job(quiet=True), theirs, reserve=reserve)
        except BaseException:
            os.close(stdout)
            os.close(stderr)
            if self._writer:
                self._writer.close()
            raise
        most = options.max_output_bytes
        self._captures = (Capture(stdout, most), Capture(stderr, most))
        return launch

    def _listen(self) -> None:
        for capture in self._captures:
            capture.listen(self._link.loop, self._noticed)

    async def _feed_stdin(self) -> None:
        if self._writer is None or self._options.stdin is None:
            return
        try:
            await self._writer.write(self._options.stdin)
        except BrokenPipeError:
            pass  # as with a shell's pipeline, a program need not read what it is given
        self._writer.finish()

    def _noticed(self) -> None:
        if self._deadlines:
            self._deadlines.touch()
        if any(capture.total > self._options.runaway_bytes for capture in self._captures):
            self._stop("outputLimit")

    def _stop(self, reason: Reason) -> None:
        if self._stopped is None and self._launch is not None:
            self._stopped = reason
            self._link.kill_soon(self._launch)

    async def _cpu_used(self) -> float:
        assert self._launch is not None
        await self._link.started(self._launch)
        answer = await self._link.request("usage", mark=self._launch.mark)
        return float(answer["cpu_ms"]) / 1000

    async def _see_to_orphans(
        self, launch: Launch, left: tuple[tuple[int, str], ...], status: ExitStatus
    ) -> tuple[tuple[Orphan, ...], ExitStatus]:
        orphans = tuple(Orphan(pid, command) for pid, command in left)
        if self._stopped or (orphans and self._options.on_leader_exit == "kill"):
            # Wait for the kill to be complete: when the result is there, no descendant is.
            await self._link.kill(launch)
            orphans = ()
        elif orphans and self._options.on_leader_exit == "wait":
            await self._link.lineage_ended(launch)
            orphans = ()
            if self._stopped:
                status = ExitStatus(status.exit_code, status.signal, self._stopped, status.usage)
        if not orphans:
            for capture in self._captures:
                capture.drain(self._link.loop, complete=False)
        return orphans, status

    def _result(self, status: ExitStatus, orphans: tuple[Orphan, ...], seconds: float) -> ExecResult:
        out, err = self._captures
        encoding, most = self._options.encoding, self._options.max_output_bytes
        return ExecResult(
            exit_code=status.exit_code,
            stdout=out.value(encoding),
            stderr=err.value(encoding),
            signal=status.signal,
            reason=status.reason,
            stdout_truncated=out.total > most,
            stderr_truncated=err.total > most,
            duration_ms=seconds * 1000,
            usage=status.usage,
            orphans=orphans,
            limit=_LIMIT_OF.get(status.reason),
        )
