"""Processes: those that spawn starts in the background, and every process that the VM has."""

from __future__ import annotations

import contextlib
import signal as signals
from collections.abc import Callable, Mapping, Sequence

from agentos.machine.jobs import Program, check_key, check_program, check_signal
from agentos.machine.output import DEFAULT_PAGE_BYTES, check_page
from agentos.machine.process import Process
from agentos.machine.table import process_info, tree_of
from agentos.machine.verbs.parts import VmParts
from agentos.model import (
    OutputPage,
    ProcessInfo,
    ProcessTreeNode,
    SpawnedProcess,
    check_count,
    check_data,
    check_flag,
    check_moment,
    check_seconds,
)
from agentos.nested import ProcessVerbs

_TABLE_ENTRIES_PER_PROCESS = 4
"""The limit holds for each of the VM's two users; what is more than that cannot be the process table."""
_END_SECONDS = 1.0
"""What the status of a process that was killed is waited for: when the kill returns, it is there."""


class BackgroundVerbs(VmParts):
    """What is started and lives on, and what can be asked of any process."""

    on_process: Callable[[Process], None] | None
    on_process_end: Callable[[Process], None] | None

    async def spawn(
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        lossless: bool = False,
    ) -> Process:
        """Start the program `command` with `args` in the background, with pipes for stdin, stdout and stderr.

        `timeout` seconds later it is killed with all its descendants, if it still runs. A second call with
        the same `idempotency_key` starts nothing and returns the first call's process; it is an InvalidRequest
        where it asks for anything else than the first. With `lossless` the process waits where its output has
        not been read, instead of the oldest output being dropped.
        Raises SpawnFailed when there is no such program, or it can not be run.
        """
        program = check_program(self.spec, command, args, cwd=cwd, env=env, user=user)
        limit = check_seconds("timeout", timeout)
        check_flag("lossless", lossless)
        key = check_key(idempotency_key)
        asked = key and (program.asked(), limit, lossless)
        return await self._spawned.once.start(key, asked, lambda: self._spawn(program, limit, lossless))

    async def _spawn(self, program: Program, timeout: float | None, lossless: bool) -> Process:
        self._check_running()
        starts = self._starts
        process = Process(self, program, program.argv[0], tuple(program.argv[1:]))
        starts.begin()
        try:
            await starts.insist(lambda reserve: process.start(
                self.link, self.spec.limits, starts.oom_kills, self._spawned.retention,
                timeout=timeout, lossless=lossless, reserve=reserve,
            ))  # fmt: skip
        except BaseException:
            starts.end()
            raise
        self._spawned.add(process)
        if self.on_process:
            self.on_process(process)
        return process

    def process_ended(self, process: Process) -> None:
        """A spawned process has ended: remember it, and forget the oldest beyond the limit."""
        self._starts.end()
        self._starts.note_end(process.status.reason if process.status else None, process.pid, process.program)
        self._spawned.ended(process)
        if self.on_process_end:
            self.on_process_end(process)

    @property
    def process(self) -> ProcessVerbs[Process]:
        """`process(pid)` is the handle of a spawned process; `process.exec` and the like are nested names of verbs."""
        return ProcessVerbs(self, self._process)

    def _process(self, pid: int) -> Process:
        """The handle of a spawned process. ProcessNotFound when there is none of that pid."""
        _ = self.link  # VmStopped before the start
        return self._spawned.get(check_count("pid", pid))

    async def write_process_stdin(
        self, pid: int, data: str | bytes, *, idempotency_key: str | None = None
    ) -> None:
        """Write to a process's stdin: see Process.write_stdin."""
        given, key = check_data("data", data), check_key(idempotency_key)
        await self._process(pid).write_stdin(given, idempotency_key=key)

    async def close_process_stdin(self, pid: int) -> None:
        """Close a process's stdin once all that was written has been taken."""
        await self._process(pid).close_stdin()

    async def wait_process(self, pid: int, *, timeout: float | None = None) -> int:
        """A process's exit code: see Process.wait."""
        limit = check_seconds("timeout", timeout)
        return await self._process(pid).wait(limit)

    async def list_processes(self) -> list[SpawnedProcess]:
        """The processes that were started with spawn, running or exited and remembered, oldest first."""
        self._check_running()
        return self._spawned.infos()

    async def get_process(self, pid: int) -> SpawnedProcess:
        """One of them. ProcessNotFound when there is none of that pid."""
        return self._process(pid).info()

    async def signal_process(self, pid: int, signal: str | int) -> None:
        """Send a signal to a spawned process. No effect when it has exited."""
        number = check_signal(signal)
        self._process(pid).signal_leader(number)

    async def stop_process(self, pid: int, *, kill_after: float | None = None) -> None:
        """SIGTERM to a spawned process's group; `kill_after` seconds later, if it still runs, `kill_process`."""
        grace = check_seconds("kill_after", kill_after)
        process = self._process(pid)
        if not process.running:
            return
        process.signal_leader(signals.SIGTERM, group=True)
        if grace is not None:
            try:
                await process.wait_status(grace)
            except TimeoutError:
                await self.kill_process(pid)

    async def kill_process(self, pid: int) -> None:
        """SIGKILL to a spawned process and every descendant, setsid and double fork included; then all are dead."""
        process = self._process(pid)
        if process.running:
            await process.kill_lineage()
            # Its end is told by another than the kill's: a spawner, which a guest may have stopped.
            with contextlib.suppress(TimeoutError):
                await process.wait_status(_END_SECONDS)

    async def read_process_output(
        self,
        pid: int,
        cursor: int = 0,
        *,
        max_bytes: int = DEFAULT_PAGE_BYTES,
        wait: float = 0.0,
        since: float | None = None,
    ) -> OutputPage:
        """A page of a process's output from `cursor`: see Process.read_output."""
        check_page(cursor, max_bytes, wait)
        check_moment("since", since)
        return await self._process(pid).read_output(cursor, max_bytes=max_bytes, wait=wait, since=since)

    # -- every process

    async def all_processes(self) -> list[ProcessInfo]:
        """Every process of the VM, whoever started it, as its own /proc shows it. init is not shown."""
        self._check_running()
        entries = await self.link.processes(_TABLE_ENTRIES_PER_PROCESS * self.spec.limits.processes)
        managed: dict[int, str | None] = {one.pid: None for one in self._spawned.running()}
        managed |= self._shells.running()
        try:
            return [process_info(entry, managed) for entry in entries]
        except (KeyError, TypeError, ValueError, OverflowError):
            self.link.distrust()
            raise self.link.stopped_error() from None

    async def process_tree(self) -> list[ProcessTreeNode]:
        """The same as a forest by parent."""
        return tree_of(await self.all_processes())
