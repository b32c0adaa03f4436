"""A process and a shell of a remote VM, and their output as streams that outlive a connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final

from agentos.client.calls import PAGE_BYTES, POLL_SECONDS, STREAM_BYTES, key_or_new
from agentos.errors import AgentOSError
from agentos.model import ExitStatus, OutputChunk, OutputPage, ShellInfo, SpawnedProcess, Usage, check_count

if TYPE_CHECKING:
    from agentos.client.verbs import Verbs

_TAKEN_SECONDS: Final = 1.0
"""A reader that has all does not wait any longer to say so."""


async def follow(
    read: Callable[[int], Awaitable[OutputPage]],
    cursor: int,
    taken: Callable[[int], Awaitable[None]] | None = None,
) -> AsyncIterator[OutputChunk]:
    """Every chunk from `cursor` to the end. A page whose answer was lost is asked for again, by its cursor.

    `taken` is called with the position of the end, once all was handed on.
    """
    while True:
        page = await read(cursor)
        for chunk in page.events:
            yield chunk
        cursor = page.cursor
        if page.exited:
            if taken is not None:
                await taken(cursor)
            return


class RemoteProcess:
    """A spawned process of a remote VM. Its verbs are the VM's, with the pid filled in."""

    def __init__(self, vm: Verbs, pid: int, boot_id: str | None = None, *, lossless: bool = False) -> None:
        self.pid: int = pid
        self._vm = vm
        self._lossless = lossless
        self._same = {"pid": pid, "boot_id": boot_id}
        """It alone is meant, not the process that has its pid after the VM has slept."""
        self._exit_code: int | None = None

    def __repr__(self) -> str:
        return f"<RemoteProcess pid={self.pid}>"

    @property
    def exit_code(self) -> int | None:
        """Its exit code (128 + n after signal n), once `wait` or `info` has brought it; None before."""
        return self._exit_code

    async def info(self) -> SpawnedProcess:
        """What there is to know of it now."""
        found: SpawnedProcess = await self._vm._ask("get_process", **self._same)
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
            self._taken if self._lossless else None,
        )

    async def _taken(self, cursor: int) -> None:
        """Let the server know that all was taken: else it is kept a while, as the last answer could have been lost."""
        with contextlib.suppress(AgentOSError, TimeoutError):
            async with asyncio.timeout(_TAKEN_SECONDS):
                await self.read_output(cursor, max_bytes=1)

    async def read_output(
        self,
        cursor: int = 0,
        *,
        max_bytes: int = PAGE_BYTES,
        wait: float = 0.0,
        since: float | None = None,
    ) -> OutputPage:
        """A page of its output from `cursor`; waits up to `wait` seconds where there is nothing yet.

        `since`, in seconds since the epoch: what arrived more than a second before that is passed by.
        """
        page: OutputPage = await self._vm._ask(
            "read_process_output", **self._same, cursor=cursor, max_bytes=max_bytes, wait=wait, since=since
        )
        return page

    async def write_stdin(self, data: str | bytes, *, idempotency_key: str | None = None) -> None:
        """Write to its stdin; returns once the bytes are accepted, in order. StdinClosed when nobody can read them.

        A second call with the same `idempotency_key` writes nothing, and returns when the first one's bytes are
        accepted; with other data it is an InvalidRequest. Asked again when the connection breaks, with a key of
        its own where none is given, so that the bytes are written once.
        """
        key = key_or_new(idempotency_key)
        await self._vm._ask("write_process_stdin", **self._same, data=data, idempotency_key=key)

    async def close_stdin(self) -> None:
        """Close its stdin once all that was written has been taken. No effect when it is closed already."""
        await self._vm._ask("close_process_stdin", **self._same)

    async def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when its output up to its end is in the log.

        WaitTimeout after `timeout` seconds: it goes on.
        """
        self._exit_code = code = await self._vm._wait("wait_process", timeout, **self._same)
        return code

    async def wait_status(self, timeout: float | None = None) -> ExitStatus:
        """As `wait`, with signal, reason and usage."""
        code = await self.wait(timeout)
        info = await self.info()
        return ExitStatus(code, info.signal, info.reason or "exited", info.usage or Usage())

    async def signal(self, signal: str | int) -> None:
        """Send it a signal. No effect when it has exited."""
        await self._vm._ask("signal_process", **self._same, signal=signal)

    async def stop(self, *, kill_after: float | None = None) -> None:
        """SIGTERM to its process group; SIGKILL to all its descendants `kill_after` seconds later if it still runs."""
        await self._vm._ask("stop_process", **self._same, kill_after=kill_after)

    async def kill(self) -> None:
        """SIGKILL to it and to every descendant, whatever session it moved to. No effect when it has exited."""
        await self._vm._ask("kill_process", **self._same)


class RemoteShell:
    """A terminal of a remote VM. Its verbs are the VM's, with the shell's id filled in."""

    def __init__(self, vm: Verbs, shell_id: str, boot_id: str | None = None) -> None:
        self.shell_id: str = shell_id
        self._vm = vm
        self._same = {"shell_id": shell_id, "boot_id": boot_id}
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
        page: OutputPage = await self._vm._ask(
            "read_shell", **self._same, cursor=cursor, max_bytes=max_bytes, wait=wait
        )
        return page

    async def write(self, data: str | bytes, *, idempotency_key: str | None = None) -> None:
        """Type `data`. Waits while the terminal takes no more; ShellClosed when it has ended.

        A second call with the same `idempotency_key` types nothing, and returns when the first one's bytes are
        accepted; with other data it is an InvalidRequest. Asked again when the connection breaks, with a key of
        its own where none is given, so that it is typed once.
        """
        key = key_or_new(idempotency_key)
        await self._vm._ask("write_shell", **self._same, data=data, idempotency_key=key)

    async def resize(self, cols: int, rows: int) -> None:
        """Change the terminal's size: the foreground program gets SIGWINCH. ShellClosed when it has ended."""
        await self._vm._ask("resize_shell", **self._same, cols=cols, rows=rows)

    async def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when its output up to its end is in the log.

        WaitTimeout after `timeout` seconds: it goes on.
        """
        self._exit_code = code = await self._vm._wait("wait_shell", timeout, **self._same)
        return code

    async def close(self) -> None:
        """Hang up, as when a terminal window is closed, and wait until the shell has ended. No effect when it has."""
        await self._vm._ask("close_shell", **self._same)
