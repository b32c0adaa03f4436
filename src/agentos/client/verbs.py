"""The verbs of a VM, asked of a server: the same names, arguments and results as the embedded VM has."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from agentos.client.calls import PAGE_BYTES, POLL_SECONDS, Caller, ask, key_or_new
from agentos.client.files import RemoteFiles
from agentos.client.handles import RemoteProcess, RemoteShell
from agentos.conversions import FetchResponse, Preview
from agentos.errors import ShellNotFound, WaitTimeout
from agentos.model import (
    ExecResult,
    OutputPage,
    ProcessInfo,
    ProcessTreeNode,
    ShellInfo,
    SpawnedProcess,
    check_seconds,
)
from agentos.nested import NetworkVerbs, ProcessVerbs, TerminalVerbs


class Verbs:
    """What can be asked of a VM, whichever way leads to it."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._files = RemoteFiles(caller)

    def _ask(self, method: str, /, **values: Any) -> Coroutine[Any, Any, Any]:
        return ask(self._caller, method, **values)

    @property
    def files(self) -> RemoteFiles:
        """Its files."""
        return self._files

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
        """Run `command` with bash and return what it did, when it has exited.

        A background child that it leaves does not hold the result up: it is named in `orphans`, lives on
        (`on_leader_exit` "drain"), is waited for ("wait") or killed ("kill"). `timeout`, `idle_timeout` (no
        output) and `cpu_timeout` end the command with every descendant; the result has the output so far
        and the `reason`. Output beyond `max_output_bytes` of a stream is dropped, and said to be. stdin is
        empty unless given. A command that bash can not find has exit code 127. Cancelling the call ends the command
        with every descendant. It is never asked for a second time by itself: ConnectionLost where no answer came.
        """
        result: ExecResult = await self._ask(
            "exec",
            command=command,
            cwd=cwd,
            env=env,
            user=user,
            stdin=stdin,
            timeout=timeout,
            idle_timeout=idle_timeout,
            cpu_timeout=cpu_timeout,
            max_output_bytes=max_output_bytes,
            encoding=encoding,
            on_leader_exit=on_leader_exit,
        )
        return result

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
        result: ExecResult = await self._ask(
            "exec_file",
            command=command,
            args=args,
            cwd=cwd,
            env=env,
            user=user,
            stdin=stdin,
            timeout=timeout,
            idle_timeout=idle_timeout,
            cpu_timeout=cpu_timeout,
            max_output_bytes=max_output_bytes,
            encoding=encoding,
            on_leader_exit=on_leader_exit,
        )
        return result

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
    ) -> RemoteProcess:
        """Start the program `command` with `args` in the background, with pipes for stdin, stdout and stderr.

        `timeout` seconds later it is killed with all its descendants, if it still runs. A second call with
        the same `idempotency_key` starts nothing and returns the first call's process; it is an InvalidRequest
        where it asks for anything else than the first. With `lossless` the process waits where its output has
        not been read, instead of the oldest output being dropped.
        Raises SpawnFailed when there is no such program, or it can not be run. Asked again when the connection
        breaks, with a key of its own where none is given, so that it starts once.
        """
        pid, boot_id = await self._ask(
            "spawn",
            command=command,
            args=args,
            cwd=cwd,
            env=env,
            user=user,
            timeout=timeout,
            idempotency_key=key_or_new(idempotency_key),
            lossless=lossless,
        )
        return RemoteProcess(self._existing(), pid, boot_id, lossless=lossless)

    async def write_process_stdin(
        self, pid: int, data: str | bytes, *, idempotency_key: str | None = None
    ) -> None:
        """Write to a process's stdin: see RemoteProcess.write_stdin."""
        key = key_or_new(idempotency_key)
        await self._ask("write_process_stdin", pid=pid, data=data, idempotency_key=key)

    async def close_process_stdin(self, pid: int) -> None:
        """Close a process's stdin once all that was written has been taken."""
        await self._ask("close_process_stdin", pid=pid)

    async def wait_process(self, pid: int, *, timeout: float | None = None) -> int:
        """A process's exit code: see Process.wait."""
        return await self._wait("wait_process", timeout, pid=pid)

    async def list_processes(self) -> list[SpawnedProcess]:
        """The processes that were started with spawn, running or exited and remembered, oldest first."""
        result: list[SpawnedProcess] = await self._ask("list_processes")
        return result

    async def get_process(self, pid: int) -> SpawnedProcess:
        """One of them. ProcessNotFound when there is none of that pid."""
        result: SpawnedProcess = await self._ask("get_process", pid=pid)
        return result

    async def signal_process(self, pid: int, signal: str | int) -> None:
        """Send a signal to a spawned process. No effect when it has exited."""
        await self._ask("signal_process", pid=pid, signal=signal)

    async def stop_process(self, pid: int, *, kill_after: float | None = None) -> None:
        """SIGTERM to a spawned process's group; `kill_after` seconds later, if it still runs, `kill_process`."""
        await self._ask("stop_process", pid=pid, kill_after=kill_after)

    async def kill_process(self, pid: int) -> None:
        """SIGKILL to a spawned process and every descendant, setsid and double fork included; then all are dead."""
        await self._ask("kill_process", pid=pid)

    async def read_process_output(
        self,
        pid: int,
        cursor: int = 0,
        *,
        max_bytes: int = PAGE_BYTES,
        wait: float = 0.0,
        since: float | None = None,
    ) -> OutputPage:
        """A page of a process's output from `cursor`: see Process.read_output."""
        result: OutputPage = await self._ask(
            "read_process_output", pid=pid, cursor=cursor, max_bytes=max_bytes, wait=wait, since=since
        )
        return result

    async def all_processes(self) -> list[ProcessInfo]:
        """Every process of the VM, whoever started it, as its own /proc shows it. init is not shown."""
        result: list[ProcessInfo] = await self._ask("all_processes")
        return result

    async def process_tree(self) -> list[ProcessTreeNode]:
        """The same as a forest by parent."""
        result: list[ProcessTreeNode] = await self._ask("process_tree")
        return result

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
        idempotency_key: str | None = None,
    ) -> RemoteShell:
        """Open a terminal of `cols` x `rows` and run `command` in it: an interactive bash unless said otherwise.

        A second call with the same `idempotency_key` opens nothing and returns the first call's shell; it is an
        InvalidRequest where it asks for anything else than the first. Asked again when the connection breaks, with a
        key of its own where none is given, so that it is opened once.
        """
        shell_id, boot_id = await self._ask(
            "open_shell",
            command=command,
            args=args,
            env=env,
            cwd=cwd,
            user=user,
            cols=cols,
            rows=rows,
            idempotency_key=key_or_new(idempotency_key),
        )
        return RemoteShell(self._existing(), shell_id, boot_id)

    async def write_shell(
        self, shell_id: str, data: str | bytes, *, idempotency_key: str | None = None
    ) -> None:
        """Type `data` in a shell: see RemoteShell.write."""
        key = key_or_new(idempotency_key)
        await self._ask("write_shell", shell_id=shell_id, data=data, idempotency_key=key)

    async def resize_shell(self, shell_id: str, cols: int, rows: int) -> None:
        """Change the size of a shell's terminal."""
        await self._ask("resize_shell", shell_id=shell_id, cols=cols, rows=rows)

    async def close_shell(self, shell_id: str) -> None:
        """Hang up a shell and wait for its end."""
        await self._ask("close_shell", shell_id=shell_id)

    async def wait_shell(self, shell_id: str, *, timeout: float | None = None) -> int:
        """A shell's exit code, when it has ended."""
        return await self._wait("wait_shell", timeout, shell_id=shell_id)

    async def list_shells(self) -> list[ShellInfo]:
        """The shells, open or ended and remembered, oldest first."""
        result: list[ShellInfo] = await self._ask("list_shells")
        return result

    async def read_shell(
        self, shell_id: str, cursor: int = 0, *, max_bytes: int = PAGE_BYTES, wait: float = 0.0
    ) -> OutputPage:
        """A page of a shell's output; cursor 0 begins with the retained scrollback."""
        result: OutputPage = await self._ask(
            "read_shell", shell_id=shell_id, cursor=cursor, max_bytes=max_bytes, wait=wait
        )
        return result

    async def _wait(self, method: str, timeout: float | None, **what: Any) -> int:
        """An exit code, asked for in requests that each wait a while."""
        limit = check_seconds("timeout", timeout)
        loop = asyncio.get_running_loop()
        end = None if limit is None else loop.time() + limit
        while True:
            left = POLL_SECONDS if end is None else max(0.0, end - loop.time())
            try:
                code: int = await ask(
                    self._caller, method, patience=POLL_SECONDS, timeout=min(left, POLL_SECONDS), **what
                )
                return code
            except WaitTimeout as error:
                if end is not None and loop.time() >= end:
                    kind = "process" if "pid" in what else "shell"
                    said = f"{kind} {next(iter(what.values()))} still runs after {timeout} s"
                    raise WaitTimeout(said, **{**error.details, "timeout": limit}) from None

    @property
    def process(self) -> ProcessVerbs[RemoteProcess]:
        """`process(pid)` is the handle of a spawned process; `process.exec` and the like are nested names of verbs."""
        return ProcessVerbs(self, self._process)

    def _existing(self) -> Verbs:
        """The same VM, of which a process or shell is asked something: that makes none where it is gone."""
        return self

    def _process(self, pid: int) -> RemoteProcess:
        """The spawned process of this pid, which is not asked for yet."""
        return RemoteProcess(self, pid)

    @property
    def terminal(self) -> TerminalVerbs:
        """The verbs of shells by their nested names: `terminal.open` is `open_shell`."""
        return TerminalVerbs(self)

    @property
    def network(self) -> NetworkVerbs:
        """`network.preview` is `create_preview`."""
        return NetworkVerbs(self)

    def shell(self, shell_id: str) -> RemoteShell:
        """The shell of this id, which is not asked for yet."""
        return RemoteShell(self, shell_id)

    async def get_shell(self, shell_id: str) -> ShellInfo:
        """One of the shells. ShellNotFound when there is none of that id."""
        for one in await self.list_shells():
            if one.shell_id == shell_id:
                return one
        raise ShellNotFound.of(shell_id)

    async def fetch(
        self,
        port: int,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: str | bytes = b"",
    ) -> FetchResponse:
        """Ask the server on `port` of the VM's loopback for `url`, a path or a whole URL of which the path counts.

        Redirects are not followed. Raises PortUnreachable, which is a ConnectionError, when nobody listens.
        """
        result: FetchResponse = await self._ask(
            "fetch", port=port, url=url, method=method, headers=headers, body=body
        )
        return result

    async def create_preview(
        self, port: int, *, expires_in: float | None = None, path: str | None = None
    ) -> Preview:
        """A link to `path` on `port` of the VM's loopback, for browsers and anyone else that has it.

        It holds for `expires_in` seconds (an hour; at most 30 days) and as long as the VM exists; it needs no
        token of the server, and wakes the VM.
        """
        result: Preview = await self._ask("create_preview", port=port, expires_in=expires_in, path=path)
        return result

    async def destroy(self) -> None:
        """End the VM and delete its files, for good."""
        await self._ask("destroy")
