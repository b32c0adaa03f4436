"""One VM: all the verbs of the contract, on the event loop that started it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal as signals
import socket
import stat
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from agentos.errors import (
    BootFailed,
    InvalidRequest,
    LimitExceeded,
    ProcessNotFound,
    ShellNotFound,
    SpawnFailed,
    VmStopped,
)
from agentos.linux.cgroups import Cgroup
from agentos.machine.alarms import Alarms
from agentos.machine.execution import ExecOptions, Execution
from agentos.machine.factory import Factory
from agentos.machine.files import Files
from agentos.machine.footprint import Footprint
from agentos.machine.image import shell_of
from agentos.machine.jobs import BASH, Program, check_program, check_signal
from agentos.machine.link import Link, Port
from agentos.machine.outlets import PROXY_PORT, SERVICE, Ways
from agentos.machine.output import DEFAULT_PAGE_BYTES, check_page
from agentos.machine.pipes import Reader
from agentos.machine.plainwords import plain_words
from agentos.machine.plan import HOME, UIDS
from agentos.machine.pool import Pool, RawVm
from agentos.machine.process import Process
from agentos.machine.shell import Shell
from agentos.machine.table import process_info, tree_of
from agentos.model import (
    ExecResult,
    LimitReached,
    Limits,
    Mount,
    OutputPage,
    ProcessInfo,
    ProcessTreeNode,
    ShellInfo,
    SpawnedProcess,
    TermSize,
    VmSpec,
    check_count,
    check_data,
    check_env,
    check_seconds,
    check_text,
)
from agentos.nested import ProcessVerbs, TerminalVerbs
from agentos.network.rules import Network

if TYPE_CHECKING:
    from agentos.host import Host
    from agentos.network.egress import Egress

_T = TypeVar("_T")
_SPAWNER_TRIES = 5
_REFILL_SECONDS = 0.02
_TABLE_ENTRIES_PER_PROCESS = 4
"""The limit holds for each of the VM's two users; what is more than that cannot be the process table."""
_CONNECT_SECONDS = 25.0
"""A connector that has not answered by then is stuck, for instance stopped by the guest."""
_END_SECONDS = 2.0
"""An init that has not ended by then, when the VM was closed, is killed."""
_REMEMBERED_KEYS = 1024
"""Idempotency keys remembered for one VM, oldest forgotten first."""


class VM:
    """An isolated Linux VM in this process: `async with VM() as vm: await vm.exec("echo hello")`.

    Boots when entered (or with `start`), ends when left (or with `close`): every process in it is killed and
    its files are gone. Belongs to the event loop that started it.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        env: Mapping[str, str] | None = None,
        user: str = "agentos",
        hostname: str = "agentos",
        mounts: Sequence[Mount] = (),
        image: str | None = None,
        network: Network | str | Sequence[str] = "none",
        isolation: str = "namespaces",
        files: Mapping[str, str | bytes] | None = None,
        spec: VmSpec | None = None,
        host: Host | None = None,
    ) -> None:
        if spec is not None and not isinstance(spec, VmSpec):
            raise InvalidRequest.argument("spec", spec, "a VmSpec")
        if host is not None and not callable(getattr(host, "ready", None)):
            raise InvalidRequest.argument("host", host, "a Host")
        if not isinstance(mounts, Sequence):
            raise InvalidRequest.argument("mounts", mounts, "a list of Mount")
        self.spec = spec or VmSpec(
            limits=Limits() if limits is None else limits, env=check_env(env), user=user, hostname=hostname,
            mounts=tuple(mounts), image=image, network=Network.of(network), isolation=isolation,
        )  # fmt: skip
        self.boot_id: str = uuid.uuid4().hex
        """Names this boot: only within it a pid or a shell's id means the same process."""
        self._host = host
        self._seed = _check_files(files)
        self._link: Link | None = None
        self._gone: asyncio.Future[None] | None = None
        self._gone_fd = -1
        self._factory: Factory | None = None
        self._raw_name = ""
        self._end_timer: asyncio.TimerHandle | None = None
        self._cgroup: Cgroup | None = None
        self._files: Files | None = None
        self._footprint: Footprint | None = None
        self._processes: dict[int, Process] = {}
        self._exited: deque[int] = deque()
        self._shells: dict[str, Shell] = {}
        self._ended_shells: deque[str] = deque()
        self._shell_count = 0
        self._shell = BASH
        self._live = 0
        self._keys: OrderedDict[str, asyncio.Future[Process]] = OrderedDict()
        self._drained: deque[Reader] = deque()
        self._egress: Egress | None = None
        self.labels: dict[str, Any] = {}
        """What log lines about it say besides; to be set before the start."""
        self.on_process: Callable[[Process], None] | None = None
        """Called when a spawned process has started, before its pid is returned."""
        self.on_process_end: Callable[[Process], None] | None = None
        self.on_shell: Callable[[Shell], None] | None = None
        self.on_shell_end: Callable[[Shell], None] | None = None
        self.on_stopped: Callable[[], None] | None = None
        self.on_limit: Callable[[LimitReached], None] | None = None
        """Called when the VM has come to one of its limits: once for each burst, and once a second at most."""
        self._alarms = Alarms(self.spec.limits, self._limit_reached)

    def __repr__(self) -> str:
        state = "new" if self._link is None else "stopped" if self._link.ended.done() else "running"
        return f"<VM {self.spec.hostname} {state}>"

    # -- life

    async def __aenter__(self) -> VM:
        return await self.start()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def start(self) -> VM:
        """Boot. Raises BootFailed with the step, errno and remedy when the host does not allow it."""
        if self._link is not None:
            raise InvalidRequest("this VM was started already; make a new VM")
        if self._host is None:
            from agentos.host import default_host

            self._host = default_host()
        factory = self._factory = await self._host.ready()
        shell = BASH if self.spec.image is None else _shell_of(self.spec.image)
        raw = factory.pool.take(self.spec) or await _create(factory, self.spec)
        if shell != BASH:
            self._shell = shell
            self.spec = replace(self.spec, env={"SHELL": shell, **self.spec.env})
        self._attach(raw)
        try:
            booted = await asyncio.shield(self.link.booted)
            self._cgroup = Cgroup.from_dict(booted["cgroup"])
            if self.spec.network:
                self._begin_egress(self._host)
            self._alarms.start(asyncio.get_running_loop(), self._cgroup)
            if self.spec.storage is not None and not raw.has_disk:
                self._footprint = Footprint(
                    self.spec.storage, self.spec.limits, factory.measure, self._storage_exceeded
                )
                self.files.full = lambda: self._footprint.full if self._footprint else None
            # Not at once: the next VM's boot would compete with what this one was made for.
            asyncio.get_running_loop().call_later(_REFILL_SECONDS, self._alarms.listen)
            if factory.pool.lacking:
                asyncio.get_running_loop().call_later(_REFILL_SECONDS, _refill, factory.pool)
            for path, content in self._seed.items():
                await self.files.write_file(path, content)
        except BaseException:
            await self.close()
            raise
        self._host.vms.add(self)
        return self

    def _begin_egress(self, host: Host) -> None:
        # Not at the top: most VMs have no network, and their programs shall not pay for it.
        from agentos.network.egress import Egress, proxy_env

        outlets, self.link.outlets = self.link.outlets, {}
        if "proxy" not in outlets:
            raise VmStopped("the VM's init ended", reason="error")
        routes = outlets.pop("routes", None)
        ways = Ways(routes) if routes is not None else None
        self._egress = Egress(
            self.spec.network, outlets, most=self.spec.limits.network_connections,
            traffic=host.traffic, labels=self.labels, ways=ways,
            on_full=lambda: self._alarms.reached("network_connections"),
        )  # fmt: skip
        if "tcp" not in outlets:
            self.spec = replace(self.spec, env=proxy_env(SERVICE, PROXY_PORT) | dict(self.spec.env))

    def _attach(self, raw: RawVm) -> None:
        loop = asyncio.get_running_loop()
        self._gone = loop.create_future()
        self._gone_fd = raw.gone_fd
        loop.add_reader(raw.gone_fd, self._nothing_left)
        self._link = Link(loop, raw.sock)
        self._link.on_end = self._stopped
        self._raw_name = raw.name
        if raw.spawner is not None:
            self._link.take_spawner(UIDS[self.spec.user], *raw.spawner)
        self._files = Files(self._open_file_worker, limits=self.spec.limits, home=HOME)

    def _storage_exceeded(self, limit: str) -> None:
        self._alarms.reached(limit)
        with contextlib.suppress(VmStopped):
            self.link.send({"op": "kill_all"})

    def _nothing_left(self) -> None:
        """The zygote has closed its end: processes, mounts and cgroup are gone."""
        if self._gone_fd >= 0 and self._gone is not None:
            asyncio.get_running_loop().remove_reader(self._gone_fd)
            os.close(self._gone_fd)
            self._gone_fd = -1
            if not self._gone.done():
                self._gone.set_result(None)
            if self._end_timer is not None:
                self._end_timer.cancel()

    def _insist_on_end(self) -> None:
        """Init should have ended when its channel did. Whoever keeps it from that is killed with it."""
        if self._factory is not None and self._gone is not None and not self._gone.done():
            self._factory.end(self._raw_name)

    def _stopped(self) -> None:
        self._end_timer = self.link.loop.call_later(_END_SECONDS, self._insist_on_end)
        self._alarms.stop()
        if self._footprint is not None:
            self._footprint.stop()
        for reader in self._drained:
            reader.close()
        self._drained.clear()
        if self._files is not None:
            self._files.close()
        if self._egress is not None:
            self._egress.close()
        if self._host is not None:
            self._host.vms.discard(self)
        if self.on_stopped:
            self.on_stopped()

    async def close(self) -> None:
        """End the VM and wait until nothing of it is left. No effect when it has ended."""
        if self._link is None:
            return
        self._link.close(VmStopped("the VM was closed", reason="closed"))
        assert self._gone is not None
        await asyncio.shield(self._gone)

    @property
    def link(self) -> Link:
        """The channel to the VM. Raises VmStopped before `start`."""
        if self._link is None:
            raise VmStopped("the VM was not started", reason="new")
        return self._link

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._link is not None and not self._link.ended.done()

    @property
    def files(self) -> Files:
        """The file actions, streams included."""
        self._check_running()
        assert self._files is not None
        return self._files

    def _check_running(self) -> None:
        if not self.running:
            raise self.link.stopped_error()

    # -- exec

    async def exec(
        self,
        command: str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        cpu_timeout: float | None = None,
        max_output_bytes: int | None = None,
        encoding: str = "utf8",
        on_leader_exit: str = "drain",
    ) -> ExecResult:
        """Run `command` with bash (sh where an image has no bash) and return what it did, when it has exited.

        A background child that it leaves does not hold the result up: it is named in `orphans`, lives on
        (`on_leader_exit` "drain"), is waited for ("wait") or killed ("kill"). `timeout`, `idle_timeout` (no
        output) and `cpu_timeout` end the command with every descendant; the result has the output so far
        and the `reason`. Output beyond `max_output_bytes` of a stream is dropped, and said to be. stdin is
        empty unless given. A command that bash can not find has exit code 127.
        """
        check_text("command", command)
        shell = self._shell
        name = os.path.basename(shell)
        program = check_program(self.spec, name, ["-c", command], cwd=cwd, env=env, user=user)
        program = program._replace(path=shell)
        options = self._exec_options(
            stdin, timeout, idle_timeout, cpu_timeout, max_output_bytes, encoding, on_leader_exit
        )
        words = plain_words(command, program.env)
        if words is not None:
            try:
                return await self._execute(program._replace(argv=words, path=None, as_bash=True), options)
            except SpawnFailed as error:
                if error.details.get("step") != "exec":
                    raise
        return await self._execute(program, options)

    async def exec_file(
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        cpu_timeout: float | None = None,
        max_output_bytes: int | None = None,
        encoding: str = "utf8",
        on_leader_exit: str = "drain",
    ) -> ExecResult:
        """As `exec`, but runs the program `command` with `args`, which no shell looks at.

        Raises SpawnFailed when there is no such program.
        """
        program = check_program(self.spec, command, args, cwd=cwd, env=env, user=user)
        options = self._exec_options(
            stdin, timeout, idle_timeout, cpu_timeout, max_output_bytes, encoding, on_leader_exit
        )
        return await self._execute(program, options)

    def _exec_options(
        self,
        stdin: object,
        timeout: object,
        idle_timeout: object,
        cpu_timeout: object,
        max_output_bytes: object,
        encoding: object,
        on_leader_exit: object,
    ) -> ExecOptions:
        limits = self.spec.limits
        if encoding not in ("utf8", "bytes"):
            raise InvalidRequest.argument("encoding", encoding, "utf8 or bytes")
        if on_leader_exit not in ("drain", "wait", "kill"):
            raise InvalidRequest.argument("on_leader_exit", on_leader_exit, "drain, wait or kill")
        most = limits.output_bytes
        if max_output_bytes is not None:
            most = check_count("max_output_bytes", max_output_bytes)
            if most > limits.output_bytes:
                raise LimitExceeded.of("output_bytes", most, limits.output_bytes)
        return ExecOptions(
            stdin=None if stdin is None else check_data("stdin", stdin),
            timeout=check_seconds("timeout", timeout),
            idle_timeout=check_seconds("idle_timeout", idle_timeout),
            cpu_timeout=check_seconds("cpu_timeout", cpu_timeout),
            max_output_bytes=most,
            runaway_bytes=limits.runaway_bytes,
            encoding=encoding,
            on_leader_exit=on_leader_exit,
        )

    async def _execute(self, program: Program, options: ExecOptions) -> ExecResult:
        self._check_running()
        with self._one_more_alive():
            result = await self._insist(
                lambda reserve: Execution(self.link, options, self._oom_kills, reserve=reserve).run(
                    program, keep=self.keep_draining
                )
            )
        self._note_end(result.reason, None, program)
        return result

    async def _insist(self, start: Callable[[bool], Awaitable[_T]]) -> _T:
        """Begin again where a guest has killed the spawner, or left it no process, before anything was started.

        Then with the reserve: `start` is told whether to use that. LimitExceeded where it has no process left either.
        """
        limits, reserve = self.spec.limits, False
        for attempt in range(_SPAWNER_TRIES):
            try:
                return await start(reserve)
            except SpawnFailed as error:
                step, number = error.details.get("step"), error.os_errno
                if step == "pty" and number == errno.ENOSPC:
                    self._alarms.reached("terminals")
                    raise LimitExceeded.of(
                        "terminals",
                        limits.terminals + 1,
                        limits.terminals,
                        "all terminals of the VM are open",
                    ) from error
                if number == errno.EAGAIN:
                    self._alarms.reached("processes")
                    self._alarms.make_room()
                if number == errno.EAGAIN and reserve:
                    said = (
                        "the VM has as many processes as it may, and the reserve for commands is used up too"
                    )
                    raise LimitExceeded.of(
                        "processes", limits.processes + 1, limits.processes, said
                    ) from error
                if attempt == _SPAWNER_TRIES - 1 or not (step == "spawner" or number == errno.EAGAIN):
                    raise
                reserve = number == errno.EAGAIN or attempt > 0
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _one_more_alive(self) -> Any:
        limit = self.spec.limits.live_processes
        self._check_live(limit)
        self._live += 1
        try:
            yield
        finally:
            self._live -= 1

    def _check_live(self, limit: int) -> None:
        if self._live >= limit:
            self._alarms.reached("live_processes")
            raise LimitExceeded.of("live_processes", self._live + 1, limit, f"{limit} processes run already")

    def _note_end(self, reason: str | None, pid: int | None, program: Program) -> None:
        """A program has ended: of one of the VM's limits, perhaps."""
        if reason == "oom":
            self._alarms.killed(pid, program.argv[0])
        elif reason == "outputLimit":
            self._alarms.reached("runaway_bytes", pid=pid, command=program.argv[0])
        self._alarms.settle()

    @property
    def limits_hit(self) -> Mapping[str, int]:
        """How often the VM came to each of its limits: those that it came to, by their names in Limits."""
        return dict(self._alarms.hits)

    def _limit_reached(self, reached: LimitReached) -> None:
        if self.on_limit:
            self.on_limit(reached)

    def _oom_kills(self) -> int:
        return self._cgroup.oom_kills() if self._cgroup is not None else 0

    def keep_draining(self, reader: Reader) -> None:
        """Go on reading a pipe that a background child holds, so that the child can go on writing."""
        if not self.running:
            reader.close()
            return
        reader.discard()
        self._drained.append(reader)
        while len(self._drained) > self.spec.limits.background_pipes:
            self._drained.popleft().close()
        while self._drained and not self._drained[0].open:
            self._drained.popleft()

    # -- spawned processes

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
        the same `idempotency_key` starts nothing and returns the first call's process. With `lossless` the
        process waits where its output has not been read, instead of the oldest output being dropped.
        Raises SpawnFailed when there is no such program, or it can not be run.
        """
        program = check_program(self.spec, command, args, cwd=cwd, env=env, user=user)
        limit = check_seconds("timeout", timeout)
        if not isinstance(lossless, bool):
            raise InvalidRequest.argument("lossless", lossless, "True or False")
        if idempotency_key is None:
            return await self._spawn(program, limit, lossless)
        key = check_text("idempotency_key", idempotency_key, empty=False)
        if len(key) > 256:
            raise InvalidRequest.argument("idempotency_key", key, "at most 256 characters")
        return await self._spawn_once(key, program, limit, lossless)

    async def _spawn_once(self, key: str, program: Program, timeout: float | None, lossless: bool) -> Process:
        spawning = self._keys.get(key)
        if spawning is None:
            # A task of its own: who asks again must not be cancelled with the first, whose connection broke.
            spawning = asyncio.ensure_future(self._spawn(program, timeout, lossless))
            spawning.add_done_callback(lambda done: self._forget_failed(key, done))
            self._keys[key] = spawning
            while len(self._keys) > _REMEMBERED_KEYS:
                self._keys.popitem(last=False)
        return await asyncio.shield(spawning)

    def _forget_failed(self, key: str, done: asyncio.Future[Process]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._keys.get(key) is done:
            del self._keys[key]

    async def _spawn(self, program: Program, timeout: float | None, lossless: bool) -> Process:
        self._check_running()
        limits = self.spec.limits
        self._check_live(limits.live_processes)
        process = Process(self, program, program.argv[0], tuple(program.argv[1:]))
        self._live += 1
        try:
            await self._insist(lambda reserve: process.start(
                self.link, limits, self._oom_kills, timeout=timeout, lossless=lossless, reserve=reserve,
            ))  # fmt: skip
        except BaseException:
            self._live -= 1
            raise
        # A pid may come round again: the process that had it before is the one to forget.
        self._processes.pop(process.pid, None)
        self._processes[process.pid] = process
        if self.on_process:
            self.on_process(process)
        return process

    def process_ended(self, process: Process) -> None:
        """A spawned process has ended: remember it, and forget the oldest beyond the limit."""
        self._live -= 1
        reason = process.status.reason if process.status else None
        self._note_end(reason, process.pid, process.program)
        self._exited.append(process.pid)
        while len(self._exited) > self.spec.limits.exited_processes:
            oldest = self._exited.popleft()
            if oldest in self._processes and not self._processes[oldest].running:
                del self._processes[oldest]
        self._bound_exited_logs()
        if self.on_process_end:
            self.on_process_end(process)

    def _bound_exited_logs(self) -> None:
        left = self.spec.limits.exited_log_bytes
        for pid in reversed(self._exited):
            process = self._processes.get(pid)
            if process is not None and not process.running:
                if left <= 0:
                    process.log.release()
                left -= process.log.retained_bytes

    @property
    def process(self) -> ProcessVerbs[Process]:
        """`process(pid)` is the handle of a spawned process; `process.exec` and the like are nested names of verbs."""
        return ProcessVerbs(self, self._process)

    def _process(self, pid: int) -> Process:
        """The handle of a spawned process. ProcessNotFound when there is none of that pid."""
        _ = self.link  # VmStopped before the start
        check_count("pid", pid)
        found = self._processes.get(pid)
        if found is None:
            raise ProcessNotFound.of(pid)
        return found

    async def write_process_stdin(self, pid: int, data: str | bytes) -> None:
        """Write to a process's stdin: see Process.write_stdin."""
        given = check_data("data", data)
        await self._process(pid).write_stdin(given)

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
        return sorted((one.info() for one in self._processes.values()), key=lambda info: info.start_time)

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

    async def read_process_output(
        self, pid: int, cursor: int = 0, *, max_bytes: int = DEFAULT_PAGE_BYTES, wait: float = 0.0
    ) -> OutputPage:
        """A page of a process's output from `cursor`: see Process.read_output."""
        check_page(cursor, max_bytes, wait)
        return await self._process(pid).read_output(cursor, max_bytes=max_bytes, wait=wait)

    # -- every process

    async def all_processes(self) -> list[ProcessInfo]:
        """Every process of the VM, whoever started it, as its own /proc shows it. init is not shown."""
        self._check_running()
        entries = await self.link.processes(_TABLE_ENTRIES_PER_PROCESS * self.spec.limits.processes)
        managed: dict[int, str | None] = {one.pid: None for one in self._processes.values() if one.running}
        managed |= {one.pid: one.shell_id for one in self._shells.values() if one.running}
        try:
            return [process_info(entry, managed) for entry in entries]
        except (KeyError, TypeError, ValueError, OverflowError):
            self.link.distrust()
            raise self.link.stopped_error() from None

    async def process_tree(self) -> list[ProcessTreeNode]:
        """The same as a forest by parent."""
        return tree_of(await self.all_processes())

    # -- shells

    async def open_shell(
        self,
        command: str | None = None,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        cols: int = 80,
        rows: int = 24,
    ) -> Shell:
        """Open a terminal of `cols` x `rows` and run `command` in it: an interactive bash unless said otherwise."""
        program = check_program(
            self.spec,
            os.path.basename(self._shell) if command is None else command,
            args,
            cwd=cwd,
            env=env,
            user=user,
            terminal=True,
        )
        size = TermSize(cols, rows)
        self._check_running()
        limits = self.spec.limits
        alive = sum(1 for one in self._shells.values() if one.running)
        if alive >= limits.shells:
            raise LimitExceeded.of("shells", alive + 1, limits.shells, f"{alive} shells are open already")
        self._shell_count += 1
        shell = Shell(self, f"shell-{self._shell_count}", program, size, limits.scrollback_bytes)
        self._shells[shell.shell_id] = shell
        try:
            await self._insist(lambda reserve: shell.start(self.link, limits, reserve=reserve))
        except BaseException:
            del self._shells[shell.shell_id]
            raise
        if self.on_shell:
            self.on_shell(shell)
        return shell

    def shell_ended(self, shell: Shell) -> None:
        """A shell has ended: remember it, and forget the oldest beyond the limit."""
        self._ended_shells.append(shell.shell_id)
        while len(self._ended_shells) > self.spec.limits.exited_shells:
            self._shells.pop(self._ended_shells.popleft(), None)
        if self.on_shell_end:
            self.on_shell_end(shell)

    def shell(self, shell_id: str) -> Shell:
        """The handle of a shell. ShellNotFound when there is none of that id."""
        _ = self.link  # VmStopped before the start
        found = self._shells.get(check_text("shell_id", shell_id))
        if found is None:
            raise ShellNotFound.of(shell_id)
        return found

    @property
    def terminal(self) -> TerminalVerbs:
        """The verbs of shells by their nested names: `terminal.open` is `open_shell`."""
        return TerminalVerbs(self)

    async def write_shell(self, shell_id: str, data: str | bytes) -> None:
        """Type `data` in a shell: see Shell.write."""
        given = check_data("data", data)
        await self.shell(shell_id).write(given)

    async def resize_shell(self, shell_id: str, cols: int, rows: int) -> None:
        """Change the size of a shell's terminal."""
        TermSize(cols, rows)  # wrong arguments come before an unknown shell
        await self.shell(shell_id).resize(cols, rows)

    async def close_shell(self, shell_id: str) -> None:
        """Hang up a shell and wait for its end."""
        await self.shell(shell_id).close()

    async def wait_shell(self, shell_id: str, *, timeout: float | None = None) -> int:
        """A shell's exit code, when it has ended."""
        limit = check_seconds("timeout", timeout)
        return await self.shell(shell_id).wait(limit)

    async def list_shells(self) -> list[ShellInfo]:
        """The shells, open or ended and remembered, oldest first."""
        self._check_running()
        return [one.info() for one in self._shells.values()]

    async def read_shell(
        self, shell_id: str, cursor: int = 0, *, max_bytes: int = DEFAULT_PAGE_BYTES, wait: float = 0.0
    ) -> OutputPage:
        """A page of a shell's output; cursor 0 begins with the retained scrollback."""
        check_page(cursor, max_bytes, wait)
        return await self.shell(shell_id).read(cursor, max_bytes=max_bytes, wait=wait)

    # -- jobs that are no programs

    async def _open_file_worker(self) -> socket.socket:
        self._check_running()
        return self.link.fork_servant("files", uid=UIDS[self.spec.user])[1]

    async def connect(self, port: int) -> socket.socket:
        """A non-blocking socket, connected to `port` on the VM's loopback: the caller closes it.

        Raises SpawnFailed with errno ECONNREFUSED when nobody listens there.
        """
        check_count("port", port, least=1, most=65535)
        self._check_running()
        return await connect_inside(self.link, UIDS[self.spec.user], port)


async def _create(factory: Factory, spec: VmSpec) -> RawVm:
    """A VM that no pool has. Not in the event loop's thread where its disk has to be mounted."""
    if spec.storage is None:
        return factory.create(spec)
    making = asyncio.get_running_loop().run_in_executor(None, factory.create, spec)
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_let_go)
        raise


def _let_go(making: asyncio.Future[RawVm]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()


def _refill(pool: Pool) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop is ending
        asyncio.get_running_loop().run_in_executor(None, pool.fill)


async def connect_inside(link: Link, uid: int, port: int) -> socket.socket:
    """Have a servant of the VM connect, and take the socket that it hands over."""
    answered: asyncio.Future[tuple[dict[str, Any], list[int]]] = link.loop.create_future()

    def received(message: dict[str, Any], fds: list[int]) -> None:
        if answered.done():
            for fd in fds:
                os.close(fd)
        else:
            answered.set_result((message, fds))

    def ended() -> None:
        if not answered.done():
            answered.set_result(({"errno": errno.ECONNABORTED}, []))

    port_to_servant = Port(link.loop, link.fork_servant("connect", uid=uid, port=port)[1], received, ended)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            message, fds = await answered
    except TimeoutError:
        message, fds = {"errno": errno.ETIMEDOUT}, []
    finally:
        port_to_servant.close()
    if len(fds) == 1 and stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
        connected = socket.socket(fileno=fds[0])
        if connected.family in (socket.AF_INET, socket.AF_INET6) and connected.type == socket.SOCK_STREAM:
            connected.setblocking(False)
            return connected
        fds = [connected.detach()]
    for fd in fds:
        os.close(fd)
    number = message.get("errno")
    if type(number) is not int or not 0 < number < 4096:
        number = errno.EPROTO
    raise SpawnFailed(f"port {port}: {os.strerror(number)}", errno=number, step="connect", port=port)


def _check_files(files: object) -> dict[str, bytes]:
    """The files that a VM begins with, by path."""
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise InvalidRequest.argument("files", files, "a mapping of paths to text or bytes")
    return {
        check_text("files path", path, empty=False): check_data(f"files[{path!r}]", content)
        for path, content in files.items()
    }


def _shell_of(image: str) -> str:
    try:
        return shell_of(image)
    except OSError as error:
        raise BootFailed(
            f"the image {image} cannot be used: {error.strerror}",
            step="image",
            errno=error.errno or 0,
            remedy="name a directory with an unpacked root file system that the server may read",
        ) from None
