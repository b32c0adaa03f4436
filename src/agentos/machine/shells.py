"""The shells of a VM: those that are open, and the newest of those that have ended."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

from agentos.errors import LimitExceeded, ShellNotFound
from agentos.machine.once import StartedOnce
from agentos.machine.shell import Shell
from agentos.model import Limits, ShellInfo


class Shells:
    """Of one VM, by id. Bounded by the limits shells and exited_shells."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._shells: dict[str, Shell] = {}
        self._ended: deque[str] = deque()
        self.once: StartedOnce[Shell] = StartedOnce()
        self._opening = 0
        self._count = 0

    def get(self, shell_id: str) -> Shell:
        """The one of this id. ShellNotFound when there is none."""
        found = self._shells.get(shell_id)
        if found is None:
            raise ShellNotFound.of(shell_id)
        return found

    def running(self) -> dict[int, str]:
        """The ids of those that are open, by the pids of their programs."""
        return {one.pid: one.shell_id for one in self._shells.values() if one.running}

    def infos(self) -> list[ShellInfo]:
        """All of them, oldest first."""
        return [one.info() for one in self._shells.values()]

    @contextlib.contextmanager
    def opening(self) -> Iterator[str]:
        """The id of one more, which counts while it is being opened. LimitExceeded (shells) where as many are open.

        Nobody else knows of it before: it may yet be taken back, and would then have no end to wait for.
        """
        running = sum(1 for one in self._shells.values() if one.running)
        alive, most = running + self._opening, self._limits.shells
        if alive >= most:
            raise LimitExceeded.of("shells", alive + 1, most, f"{alive} shells are open already")
        self._count += 1
        self._opening += 1
        try:
            yield f"shell-{self._count}"
        finally:
            self._opening -= 1

    def add(self, shell: Shell) -> None:
        """One is open."""
        self._shells[shell.shell_id] = shell

    def ended(self, shell: Shell) -> None:
        """One has ended: remember it, and forget the oldest beyond the limit."""
        self._ended.append(shell.shell_id)
        while len(self._ended) > self._limits.exited_shells:
            self._shells.pop(self._ended.popleft(), None)
