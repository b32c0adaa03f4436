"""The output of an actor's processes and shells as subscribers see it: numbered, and kept for a while after its end."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from agentos.machine.output import OutputLog
from agentos.machine.process import Process
from agentos.machine.shell import Shell

REPLAY_SECONDS: Final = 5.0
"""A subscriber gets the output of a process or shell from its first byte if that started so recently."""
RESUME_SECONDS: Final = 60.0
"""So long after its end, a client that was cut off gets the rest of a stream when it comes back."""
_MOST_ENDED: Final = 256
"""Ended streams of one actor that are kept for that."""


class Stream:
    """The output of one process or shell."""

    def __init__(self, source: Process | Shell, serial: int) -> None:
        self.source = source
        self.serial = serial
        """Its number among the actor's streams, never used again, as a pid may be."""
        self.is_shell = isinstance(source, Shell)
        self.scope = "shell" if self.is_shell else "process"
        self.id: int | str = source.shell_id if isinstance(source, Shell) else source.pid
        self.started = time.monotonic()

    @property
    def log(self) -> OutputLog:
        """Where its output is."""
        return self.source.log

    @property
    def recent(self) -> bool:
        """Whether a new subscriber gets it from its first byte."""
        return time.monotonic() - self.started < REPLAY_SECONDS


class Streams:
    """Those that run, and the newest that ended. Iterates over a copy, in the order of their numbers."""

    def __init__(self) -> None:
        self.epoch = uuid.uuid4().hex
        """Within it, streams' numbers are valid."""
        self.last = 0
        """The greatest number so far."""
        self.pages: dict[Any, Any] = {}
        """Encoded parts of streams that several subscribers are about to send."""
        self._known: dict[Process | Shell, Stream] = {}
        self._ended: deque[tuple[float, Stream]] = deque()
        self._forgetting: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._known.values()))

    def begin(self, source: Process | Shell) -> Stream:
        """That of a process or shell that started."""
        self.last += 1
        stream = self._known[source] = Stream(source, self.last)
        return stream

    def end(self, source: Process | Shell) -> None:
        """It ended: it is kept for those who come back for its rest."""
        stream = self._known.get(source)
        if stream is not None:
            self._ended.append((time.monotonic() + RESUME_SECONDS, stream))
            self._forget()

    def _forget(self) -> None:
        now = time.monotonic()
        while self._ended and (len(self._ended) > _MOST_ENDED or self._ended[0][0] <= now):
            self._known.pop(self._ended.popleft()[1].source, None)
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        if self._ended:
            left = self._ended[0][0] - now
            self._forgetting = asyncio.get_running_loop().call_later(left, self._forget)
