"""One exec: run a program to the end of its leader and collect what it wrote.

The result is there when the leader has exited and what it had written by then is read. A child that it
left behind may hold the pipes open for ever: it is named in the result, and its output goes on being read
(and dropped), so that it does not die of a closed pipe.
"""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from agentos.errors import VmStopped
from agentos.machine.deadlines import Deadlines
from agentos.machine.jobs import Program, exit_status, spawn_failed
from agentos.machine.link import Launch, Link
from agentos.machine.pipes import Reader, Writer
from agentos.model import Encoding, ExecResult, ExitStatus, OnLeaderExit, Orphan, Reason

_LIMIT_OF = {"oom": "memory_bytes", "outputLimit": "runaway_bytes"}


class ExecOptions(NamedTuple):
    """The checked options of one exec."""

    stdin: bytes | None
    timeout: float | None
    idle_timeout: float | None
    cpu_timeout: float | None
    max_output_bytes: int
    runaway_bytes: int
    encoding: Encoding
    on_leader_exit: OnLeaderExit


class Capture:
    """The first `limit` bytes of a stream, and how many there were."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self._parts: list[bytes] = []
        self._kept = 0

    def add(self, data: bytes) -> None:
        """The next bytes of the stream."""
        self.total += len(data)
        room = self.limit - self._kept
        if room > 0:
            self._parts.append(data if len(data) <= room else data[:room])
            self._kept += len(self._parts[-1])

    @property
    def truncated(self) -> bool:
        """Whether there was more than the limit."""
        return self.total > self._kept

    def value(self, encoding: Encoding) -> Any:
        """What was kept, as bytes or as text. A character that the limit cut in two is left out whole."""
        data = b"".join(self._parts)
        if encoding == "bytes":
            return data
        if self.truncated:
            # final=False leaves an incomplete last character out; what follows it was cut off, not wrong.
            return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=False)
        return data.decode("utf-8", "replace")


class Execution:
    """The state of one running exec."""

    def __init__(
        self, link: Link, options: ExecOptions, oom_kills: Callable[[], int], *, reserve: bool
    ) -> None:
        self._link = link
        self._reserve = reserve
        self._options = options
        self._oom_kills = oom_kills
        self._stopped: Reason | None = None
        self._captures = (Capture(options.max_output_bytes), Capture(options.max_output_bytes))
        self._deadlines: Deadlines | None = None
        self._launch: Launch | None = None
        self._readers: list[Reader] = []
        self._writer: Writer | None = None

    async def run(self, program: Program, *, keep: Callable[[Reader], None]) -> ExecResult:
        """Run to the end. `keep` takes over pipes that children still hold."""
        began, options = time.monotonic(), self._options
        launch = self._launch = self._start(program)
        try:
            # What follows runs beside the program's own start.
            ooms = self._oom_kills()
            # Most commands have ended before, with all that they wrote still in the pipes: one wakeup instead of five.
            launch.on_started = self._listen
            if (
                options.timeout is not None
                or options.idle_timeout is not None
                or options.cpu_timeout is not None
            ):
                self._deadlines = Deadlines(
                    self._link.loop, self._stop, wall=options.timeout, idle=options.idle_timeout,
                    cpu=options.cpu_timeout, cpu_used=self._cpu_used,
                )  # fmt: skip
            if self._writer is not None:
                await self._feed_stdin()
            event = await launch.exited
            if launch.error:
                raise spawn_failed(launch.error, program)
            for reader in self._readers:
                reader.drain(complete=not event.orphans)
            oom = not self._stopped and event.status != 0 and self._oom_kills() > ooms
            status = exit_status(event, stopped=self._stopped, oom=oom)
            orphans = tuple(Orphan(pid, command) for pid, command in event.orphans)
            if orphans or self._stopped:
                orphans, status = await self._see_to_orphans(launch, orphans, status)
            return self._result(status, orphans, time.monotonic() - began)
        except VmStopped:
            for reader in self._readers:
                reader.drain()
            return self._result(ExitStatus(137, "SIGKILL", "vmStopped"), (), time.monotonic() - began)
        except BaseException:
            self._link.kill_soon(launch)
            raise
        finally:
            self._clean_up(keep)

    def _start(self, program: Program) -> Launch:
        loop, stdin = self._link.loop, self._options.stdin
        stdout, stdout_end = os.pipe2(os.O_CLOEXEC)
        stderr, stderr_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(stdout, False)
        os.set_blocking(stderr, False)
        self._readers = [
            Reader(loop, stdout, self._stdout, _nothing, listen=False),
            Reader(loop, stderr, self._stderr, _nothing, listen=False),
        ]
        theirs = [stdout_end, stderr_end]
        if stdin is not None:
            stdin_end, ours = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(ours, False)
            self._writer = Writer(loop, ours, len(stdin) + 1)
            theirs.insert(0, stdin_end)
        try:
            return self._link.launch(program.job(quiet=True), theirs, reserve=self._reserve)
        except BaseException:
            for end in (*self._readers, *([self._writer] if self._writer else ())):
                end.close()
            raise

    def _listen(self) -> None:
        for reader in self._readers:
            reader.resume()

    async def _feed_stdin(self) -> None:
        if self._writer is None or self._options.stdin is None:
            return
        try:
            await self._writer.write(self._options.stdin)
        except BrokenPipeError:
            pass  # as with a shell's pipeline, a program need not read what it is given
        self._writer.finish()

    def _stdout(self, data: bytes) -> None:
        self._output(0, data)

    def _stderr(self, data: bytes) -> None:
        self._output(1, data)

    def _output(self, index: int, data: bytes) -> None:
        capture = self._captures[index]
        capture.add(data)
        if self._deadlines:
            self._deadlines.touch()
        if capture.total > self._options.runaway_bytes and not self._stopped:
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
        self, launch: Launch, orphans: tuple[Orphan, ...], status: ExitStatus
    ) -> tuple[tuple[Orphan, ...], ExitStatus]:
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
            for reader in self._readers:
                reader.drain()
        return orphans, status

    def _result(self, status: ExitStatus, orphans: tuple[Orphan, ...], seconds: float) -> ExecResult:
        out, err = self._captures
        encoding = self._options.encoding
        return ExecResult(
            exit_code=status.exit_code,
            stdout=out.value(encoding),
            stderr=err.value(encoding),
            signal=status.signal,
            reason=status.reason,
            stdout_truncated=out.truncated,
            stderr_truncated=err.truncated,
            duration_ms=seconds * 1000,
            usage=status.usage,
            orphans=orphans,
            limit=_LIMIT_OF.get(status.reason),
        )

    def _clean_up(self, keep: Callable[[Reader], None]) -> None:
        if self._launch:
            self._link.release(self._launch)
        if self._deadlines:
            self._deadlines.cancel()
        if self._writer:
            self._writer.close()
        for reader in self._readers:
            if reader.open:
                keep(reader)


def _nothing() -> None:
    """The end of a pipe tells nothing: a child may close it, or keep it."""
