"""Shells: programs on a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from agentos.machine.jobs import Program, check_key, check_program
from agentos.machine.output import DEFAULT_PAGE_BYTES, check_page
from agentos.machine.shell import Shell
from agentos.machine.verbs.parts import VmParts
from agentos.model import OutputPage, ShellInfo, TermSize, check_data, check_seconds, check_text
from agentos.nested import TerminalVerbs


class ShellVerbs(VmParts):
    """Shells, opened, used and closed."""

    _shell: str
    on_shell: Callable[[Shell], None] | None
    on_shell_end: Callable[[Shell], None] | None

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
    ) -> Shell:
        """Open a terminal of `cols` x `rows` and run `command` in it: an interactive bash unless said otherwise.

        A second call with the same `idempotency_key` opens nothing and returns the first call's shell; it is an
        InvalidRequest where it asks for anything else than the first.
        """
        program = check_program(
            self.spec,
            os.path.basename(self._shell) if command is None else command,
            args,
            cwd=cwd,
            env=env,
            user=user,
            terminal=True,
        )
        size, key = TermSize(cols, rows), check_key(idempotency_key)
        asked = key and (program.asked(), size)
        return await self._shells.once.start(key, asked, lambda: self._open_shell(program, size))

    async def _open_shell(self, program: Program, size: TermSize) -> Shell:
        self._check_running()
        limits = self.spec.limits
        with self._shells.opening() as shell_id:
            shell = Shell(self, shell_id, program, size, limits.scrollback_bytes)
            await self._starts.insist(lambda reserve: shell.start(self.link, limits, reserve=reserve))
        self._shells.add(shell)
        if self.on_shell:
            self.on_shell(shell)
        return shell

    def shell_ended(self, shell: Shell) -> None:
        """A shell has ended: remember it, and forget the oldest beyond the limit."""
        self._shells.ended(shell)
        self._alarms.settle()
        if self.on_shell_end:
            self.on_shell_end(shell)

    def shell(self, shell_id: str) -> Shell:
        """The handle of a shell. ShellNotFound when there is none of that id."""
        _ = self.link  # VmStopped before the start
        return self._shells.get(check_text("shell_id", shell_id))

    @property
    def terminal(self) -> TerminalVerbs:
        """The verbs of shells by their nested names: `terminal.open` is `open_shell`."""
        return TerminalVerbs(self)

    async def write_shell(
        self, shell_id: str, data: str | bytes, *, idempotency_key: str | None = None
    ) -> None:
        """Type `data` in a shell: see Shell.write."""
        given, key = check_data("data", data), check_key(idempotency_key)
        await self.shell(shell_id).write(given, idempotency_key=key)

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
        return self._shells.infos()

    async def read_shell(
        self, shell_id: str, cursor: int = 0, *, max_bytes: int = DEFAULT_PAGE_BYTES, wait: float = 0.0
    ) -> OutputPage:
        """A page of a shell's output; cursor 0 begins with the retained scrollback."""
        check_page(cursor, max_bytes, wait)
        return await self.shell(shell_id).read(cursor, max_bytes=max_bytes, wait=wait)
