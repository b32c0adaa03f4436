"""How much output is kept for those who have not taken it: bounds over the logs of one VM, within those of its host.

What a log keeps is one of three things. *Unread*: a lossless process wrote it, and nobody has been given all of it.
*Handed out*: the process has exited, and a page with the last of it was answered, which may have got lost on its way.
*Replayed*: all that exited processes keep besides.

Where unread and handed out together reach `lossless_bytes`, what was handed out longest ago counts as read. Where that
is not enough, each lossless process that runs waits for its reader with little (`LEAST_UNREAD_BYTES`) instead of much,
which loses nothing. Where what is replayed reaches `exited_log_bytes`, the log that has been there longest lets go of
all it has: who still wanted it is told of the gap.

Nobody is waited for without end: see `RETRY_SECONDS` and `LATE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from agentos.machine.output import OutputLog

LEAST_UNREAD_BYTES: Final = 64 * 1024
"""A lossless process may have so much unread output whatever others have."""
RETRY_SECONDS: Final = 60.0
"""So long what was handed out is kept for a reader that did not get it, from when it was asked for last."""
LATE_SECONDS: Final = 600.0
"""So long what is unread is kept after a lossless process has ended, or was last asked for its output."""
_ENOUGH: Final = 0.75
"""Processes that wait with little do so until no more than this part of `lossless_bytes` is unread."""


class Kept(NamedTuple):
    """Bytes that a log keeps, with what it costs to keep them."""

    unread: int = 0
    handed_out: int = 0
    replayed: int = 0


class Retention:
    """The bounds over all logs of a VM, or, as `within`, over those of all VMs of an event loop."""

    def __init__(self, exited_log_bytes: int, lossless_bytes: int, within: Retention | None = None) -> None:
        self.exited_log_bytes = exited_log_bytes
        self.lossless_bytes = lossless_bytes
        self.kept = Kept()
        self._within: Retention | None = None
        self._parts: set[Retention] = set()
        self._full = False
        self._handed_out: dict[OutputLog, None] = {}
        self._replayed: dict[OutputLog, None] = {}
        """Both are in the order in which they came to be so."""
        self._waited_for: dict[OutputLog, None] = {}
        """Of processes that have ended, while somebody may come for the rest."""
        self._held: set[OutputLog] = set()
        """Of lossless processes that wait with little."""
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._closed = False
        if within is not None:
            self.join(within)

    @property
    def crowded(self) -> bool:
        """Whether so much is unread that every lossless process must do with the least."""
        return self._full or (self._within is not None and self._within.crowded)

    def join(self, within: Retention) -> None:
        """From now on these logs count among those too. To be called once, before there are any."""
        self._within = within
        within._parts.add(self)

    def hold(self, log: OutputLog) -> None:
        """Have `log.look_again` called when it is crowded no more."""
        self._held.add(log)

    def count(self, log: OutputLog) -> None:
        """What `log`, one of this VM's, keeps has changed."""
        if self._closed:
            return
        if log.finished and log.unread_bytes:
            self._waited_for.setdefault(log)
            self._wait_until(log.wanted_until)
        else:
            self._waited_for.pop(log, None)
        self._set(log, log.kept)

    def count_unread(self, log: OutputLog, unread: int) -> None:
        """As `count`, for the log of a process that runs, of which only what is unread has changed."""
        if self._closed:
            return
        before = log.counted
        log.counted = Kept(unread, before.handed_out, before.replayed)
        self._add(unread - before.unread, 0, 0)

    def forget(self, log: OutputLog) -> None:
        """The process of `log`, one of this VM's, is not known any more."""
        if self._closed:
            return
        log.retention = None
        self._waited_for.pop(log, None)
        self._held.discard(log)
        self._set(log, Kept())

    def close(self) -> None:
        """The VM has ended: its logs live as long as those who hold them, and count nowhere."""
        if self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        for log in {*self._handed_out, *self._replayed, *self._waited_for}:
            self.forget(log)
        self._closed = True
        if self._within is not None:
            self._within._parts.discard(self)
            self._within._add(*(-one for one in self.kept))
        self.kept = Kept()
        self._held.clear()

    def _set(self, log: OutputLog, kept: Kept) -> None:
        before = log.counted
        if kept == before:
            return
        log.counted = kept
        unread, handed_out, replayed = kept
        # Of a process that runs only the first changes, with each piece of its output.
        if handed_out != before.handed_out or replayed != before.replayed:
            level: Retention | None = self
            while level is not None:
                _keep_order(level._handed_out, log, handed_out)
                _keep_order(level._replayed, log, replayed)
                level = level._within
        self._add(unread - before.unread, handed_out - before.handed_out, replayed - before.replayed)

    def _add(self, unread: int, handed_out: int, replayed: int) -> None:
        kept = self.kept
        kept = self.kept = Kept(kept.unread + unread, kept.handed_out + handed_out, kept.replayed + replayed)
        if self._within is not None:
            self._within._add(unread, handed_out, replayed)
        if kept.unread >= self.lossless_bytes:
            self._full = True
        elif self._full and kept.unread <= self.lossless_bytes * _ENOUGH:
            self._full = False
            for part in (self, *self._parts):
                part._look_again()
        while self.kept.unread + self.kept.handed_out > self.lossless_bytes and self._handed_out:
            next(iter(self._handed_out)).give_up()
        # The newest stays however large it is: its bound is its own, and somebody may be about to read it.
        while self.kept.replayed > self.exited_log_bytes and len(self._replayed) > 1:
            next(iter(self._replayed)).release()

    def _look_again(self) -> None:
        held, self._held = self._held, set()
        for log in held:
            log.look_again()

    def _wait_until(self, moment: float) -> None:
        if self._timer is not None:
            if self._due <= moment:
                return
            self._timer.cancel()
        self._due = moment
        wait = max(0.0, moment - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(wait, self._end_waits)

    def _end_waits(self) -> None:
        self._timer = None
        now = time.monotonic()
        for log in list(self._waited_for):
            if log.wanted_until <= now:
                log.give_up()
        if self._waited_for:
            self._wait_until(min(log.wanted_until for log in self._waited_for))


def _keep_order(logs: dict[OutputLog, None], log: OutputLog, size: int) -> None:
    if size:
        logs.setdefault(log)
    else:
        logs.pop(log, None)
