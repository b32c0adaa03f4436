"""A process and a shell of a remote VM, and their output as streams that outlive a connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from agentos.client.calls import PAGE_BYTES, POLL_SECONDS, STREAM_BYTES
from agentos.model import ExitStatus, OutputChunk, OutputPage, ShellInfo, SpawnedProcess, check_count

if TYPE_CHECKING:
    from agentos.client.verbs import Verbs


async def follow(read: Callable[[int], Awaitable[OutputPage]], cursor: int) -> AsyncIterator[OutputChunk]:
    """Every chunk from `cursor` to the end. A page whose answer was lost is asked for again, by its cursor."""
    while True:
        page = await read(cursor)
        for chunk in page.events:
            yield chunk
        cursor = page.cursor
        if page.exited:
            return


class RemoteProcess:
    """A spawned process of a remote VM. Its verbs are the VM's, with the pid filled in."""

    def __init__(self, vm: Verbs, pid: int) -> None:
        self.pid: int = pid
        self._vm = vm
        self._exit_code: int | None = None

    def __repr__(self) -> str:
        return f"<RemoteProcess pid={self.pid}>"

    @property
    def exit_code(self) -> int | None:
        """Its exit code (128 + n after signal n), once `wait` or `info` has brought it; None before."""
        return self._exit_code

    async def info(self) -> SpawnedProcess:
        """What there is to know of it now."""
        found = await self._vm.get_process(self.pid)
        self._exit_code = found.exit_code
        return found

    def output(self, cursor: int = 0) -> AsyncIterator[OutputChunk]:
        """Its output from `cursor` on, both streams in the order of arrival, to its end, then stops.

        A connection that breaks costs no byte and brings none twice. ConnectionLost when the server stays away.
        What the server's log has dropped before the reader came to it is counted in the next chunk's `skipped`.
        """
        return follow(
            lambda position: self.read_output(position, max_bytes=STREAM_BYTES, wait=POLL_SECONDS),
            check_count("cursor", cursor),
        )

    async def read_output(
        self, cursor: int = 0, *, max_bytes: int = PAGE_BYTES, wait: float = 0.0
    ) -> OutputPage:
        """A page of its output from `cursor`; waits up to `wait` seconds where there is nothing yet."""
        return await self._vm.read_process_output(self.pid, cursor, max_bytes=max_bytes, wait=wait)

    async def write_stdin(self, data: str | bytes) -> None:
        """Write to its stdin; returns once the bytes are accepted, in order. StdinClosed when nobody can read them."""
        await self._vm.write_process_stdin(self.pid, data)

    async def close_stdin(self) -> None:
        """Close its stdin once all that was written has been taken. No effect when it is closed already."""
        await self._vm.close_process_stdin(self.pid)

    async def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when its output up to its end is in the log.

        WaitTimeout after `timeout` seconds: it goes on.
        """
        self._exit_code = code = await self._vm.wait_process(self.pid, timeout=timeout)
        return code

    async def wait_status(self, timeout: float | None = None) -> ExitStatus:
        """As `wait`, with signal and reason."""
        code = await self.wait(timeout)
        info = await self.info()
        return ExitStatus(code, info.signal, info.reason or "exited")

    async def signal(self, signal: str | int) -> None:
        """Send it a signal. No effect when it has exited."""
        await self._vm.signal_process(self.pid, signal)

    async def stop(self, *, kill_after: float | None = None) -> None:
        """SIGTERM to its process group; SIGKILL to all its descendants `kill_after` seconds later if it still runs."""
        await self._vm.stop_process(self.pid, kill_after=kill_after)

    async def kill(self) -> None:
        """SIGKILL to it and to every descendant, whatever session it moved to. No effect when it has exited."""
        await self._vm.kill_process(self.pid)


class RemoteShell:
    """A terminal of a remote VM. Its verbs are the VM's, with the shell's id filled in."""

    def __init__(self, vm: Verbs, shell_id: str) -> None:
        self.shell_id: str = shell_id
        self._vm = vm
        self._exit_code: int | None = None

    def __repr__(self) -> str:
        return f"<RemoteShell {self.shell_id!r}>"

    @property
    def exit_code(self) -> int | None:
        """Its exit code, once `wait` has brought it; None before."""
        return self._exit_code

    async def info(self) -> ShellInfo:
        """What there is to know of it now. ShellNotFound when the VM has forgotten it."""
        return await self._vm.get_shell(self.shell_id)

    def output(self, cursor: int = 0) -> AsyncIterator[OutputChunk]:
        """What the terminal shows, from `cursor` on, to the shell's end. Cursor 0: with the retained scrollback.

        A connection that breaks costs no byte and brings none twice. ConnectionLost when the server stays away.
        """
        return follow(
            lambda position: self.read(position, max_bytes=STREAM_BYTES, wait=POLL_SECONDS),
            check_count("cursor", cursor),
        )

    async def read(self, cursor: int = 0, *, max_bytes: int = PAGE_BYTES, wait: float = 0.0) -> OutputPage:
        """A page of its output from `cursor`; waits up to `wait` seconds where there is nothing yet."""
        return await self._vm.read_shell(self.shell_id, cursor, max_bytes=max_bytes, wait=wait)

    async def write(self, data: str | bytes) -> None:
        """Type `data`. Waits while the terminal takes no more; ShellClosed when it has ended."""
        await self._vm.write_shell(self.shell_id, data)

    async def resize(self, cols: int, rows: int) -> None:
        """Change the terminal's size: the foreground program gets SIGWINCH. ShellClosed when it has ended."""
        await self._vm.resize_shell(self.shell_id, cols, rows)

    async def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when its output up to its end is in the log.

        WaitTimeout after `timeout` seconds: it goes on.
        """
        self._exit_code = code = await self._vm.wait_shell(self.shell_id, timeout=timeout)
        return code

    async def close(self) -> None:
        """Hang up, as when a terminal window is closed, and wait until the shell has ended. No effect when it has."""
        await self._vm.close_shell(self.shell_id)
