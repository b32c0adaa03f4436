"""The host's end of a spawner, and the programs that it was asked to start."""

from __future__ import annotations

import errno
import os
import signal
import socket
from asyncio import Future, TimerHandle
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from agentos.errors import SpawnFailed
from agentos.linux import pty
from agentos.machine.channel import Message
from agentos.machine.jobwire import FULL_DISK, JOURNAL_ENTRY, Report, pack_job, unpack_report
from agentos.machine.port import NO_SENSE, Port, whole

if TYPE_CHECKING:
    from agentos.machine.link import Link

LAUNCH_SECONDS = 20.0
"""A spawner that has not said by then that it has started a program, or that one was killed, is stuck or lies."""
WARM_UP = 0
"""The job of a spawner that nobody waits for."""
_JOURNAL_READ_EVERY = 500
"""Quiet jobs after which the journal is read anyhow: far fewer than fit into its pipe."""
MAX_PID = 1 << 22  # PID_MAX_LIMIT of linux/threads.h


class ExitEvent(NamedTuple):
    """How the leader of a launch has ended, and what outlived it."""

    pid: int
    status: int
    """As waitpid(2) gives it."""
    cpu_ms: float
    max_rss_bytes: int
    orphans: tuple[tuple[int, str], ...]


End = tuple[int, float, int]
"""Status, CPU time and greatest RSS, as ExitEvent has them."""


def end_in(status: object, cpu_us: object, max_rss_kib: object) -> End:
    """The end of a leader, from what `spawner.end_of` gives. Raises ValueError for what no process can have."""
    cpu_ms = whole(cpu_us, 2**63 - 1) / 1000
    return whole(status, 0xFFFF), cpu_ms, whole(max_rss_kib, 2**53) * 1024


class Launch:
    """One program that a spawner was asked to start."""

    pid = 0
    mark = 0
    """What all its descendants carry; known once it has started."""
    attempted = 0
    """The mark that it was about to be started with, by the journal."""
    noted_pid = 0
    """What pid it got, by the journal."""
    error: SpawnFailed | None = None
    master_fd = -1
    """The pty's master, until somebody takes it."""
    settled = False
    """Whether the program runs, has run, or could not be started (`error`)."""
    on_started: Callable[[], None] | None = None
    """Called when it is known to run: of a quiet one, only when it has not ended soon."""
    asked_for = False
    """Whether its spawner was to say what became of it, because nothing was known of it yet."""
    kill_wanted = False
    """Whether it is killed as soon as it is known what to kill."""
    kills_under_way = 0
    released = False
    _settling: Future[None] | None = None

    def __init__(self, link: Link, number: int, launcher: Launcher, *, terminal: bool) -> None:
        self._link = link
        self.number = number
        self.launcher = launcher
        self._terminal = terminal
        self.exited: Future[ExitEvent] = link.loop.create_future()

    def settling(self) -> Future[None]:
        """Done when it is settled. Shared: whoever may be cancelled awaits it through asyncio.shield."""
        if self._settling is None:
            self._settling = self._link.loop.create_future()
            if self.settled:
                self._settling.set_result(None)
        return self._settling

    def note_started(self, message: Message, fds: list[int]) -> None:
        """The spawner has started it."""
        pid, mark = whole(message["pid"], MAX_PID, least=1), whole(message["mark"], 2**64 - 1)
        if self.settled or len(fds) != self._terminal or not all(map(pty.is_master, fds)):
            raise ValueError("no news, or not the descriptors of a program that was started")
        if fds:
            self.master_fd = fds.pop()
        self.note_found(pid, mark)

    def note_found(self, pid: int, mark: int) -> None:
        """It was started, whoever tells: of one on a terminal, without that when its spawner has gone."""
        self.pid, self.mark = pid, mark
        self._settle()
        if self.on_started:
            self.on_started()

    def note_failed(self, number: int, step: str) -> None:
        """It could not be started."""
        self.error = SpawnFailed(os.strerror(number), errno=number, step=step)
        self._settle()
        if not self.exited.done():
            self.exited.set_result(ExitEvent(0, 127 << 8, 0.0, 0, ()))

    def note_lost(self) -> None:
        """It ended, if it had begun, before anybody knew of it: with its spawner, of a guest's kill."""
        self._settle()
        if not self.exited.done():
            self.exited.set_result(ExitEvent(0, signal.SIGKILL, 0.0, 0, ()))

    def note_exit(self, end: End, orphans: tuple[tuple[int, str], ...]) -> None:
        """Its leader has been reaped. Of a quiet one that ended soon, the pid is not known."""
        self._settle()
        if not self.exited.done():
            self.exited.set_result(ExitEvent(self.pid, *end, orphans))

    def _settle(self) -> None:
        self.settled = True
        if self._settling is not None and not self._settling.done():
            self._settling.set_result(None)

    def abandon(self, error: Exception) -> None:
        """The VM is gone."""
        if not self.settled:
            self.error = SpawnFailed("the VM ended", errno=0, step="launch")
        self._settle()
        if self.master_fd >= 0:
            os.close(self.master_fd)
            self.master_fd = -1
        if not self.exited.done():
            self.exited.set_exception(error)
            self.exited.exception()  # nobody may be waiting: that is no error


class Launcher:
    """The host's end of one spawner, which starts the programs of one of the VM's users."""

    def __init__(
        self,
        link: Link,
        uid: int,
        number: int,
        sock: socket.socket,
        journal_fd: int,
        *,
        reserve: bool = False,
    ) -> None:
        self.uid = uid
        self.number = number
        self.reserve = reserve
        self._journal_fd = journal_fd
        self._exits = 0
        self.forgotten: list[int] = []
        """Launches whose marks are of no more use: the spawner is told with the next job."""
        self.launches: dict[int, Launch] = {}
        self.watchers: list[Future[None]] = []
        self._link = link
        self._env: Mapping[str, str] | None = None
        """The environment of the last job, which is not sent again."""
        self._watchdog: TimerHandle | None = None
        self.port = Port(link.loop, sock, self._received, self._ended, pack=pack_job, unpack=unpack_report)

    @property
    def alive(self) -> bool:
        """Whether it can be asked to start more."""
        return not self.port.closed

    def start(self, launch: Launch, job: Message, fds: Sequence[int]) -> None:
        """Send a job, which is this method's from now on; `fds` are closed here."""
        self.launches[launch.number] = launch
        if self._watchdog is None:
            self._watchdog = self._link.loop.call_later(LAUNCH_SECONDS, self._look_after)
        job["job"] = launch.number
        if self.forgotten:
            job["forget"] = self.forgotten
            self.forgotten = []
        env = job["env"]
        if env is self._env:
            del job["env"]
        self._env = env
        self.port.send(job, fds)

    def _look_after(self) -> None:
        """Once in a while: a launch of which nothing is known must be known by the next look."""
        self._watchdog = None
        unknown = [launch for launch in self.launches.values() if not launch.settled]
        if any(launch.asked_for for launch in unknown):
            self.give_up()
            return
        for launch in unknown:
            launch.asked_for = True
            self.ask_for(launch)
        if self.launches:
            self._watchdog = self._link.loop.call_later(LAUNCH_SECONDS, self._look_after)

    def read_journal(self) -> None:
        """Learn what the spawner was about to start since the last time, and what became of it."""
        try:
            entries = os.read(self._journal_fd, 65536) if self._journal_fd >= 0 else b""
        except BlockingIOError:
            return
        for number, pid, mark in JOURNAL_ENTRY.iter_unpack(
            entries[: len(entries) - len(entries) % JOURNAL_ENTRY.size]
        ):
            if number in self.launches and pid <= MAX_PID:
                launch = self.launches[number]
                launch.attempted, launch.noted_pid = mark, pid

    def send(self, message: Message) -> None:
        """Send anything else."""
        self.port.send(message)

    def _received(self, message: Message | Report, fds: list[int]) -> None:
        try:
            if isinstance(message, Report):
                self._exited(message)
            elif "started" in message:
                if message["started"] != WARM_UP:
                    self.launches[message["started"]].note_started(message, fds)
            elif "failed" in message:
                self._failed(message)
            elif "journal" in message:
                self.read_journal()
            elif "reaped" in message:
                self.wake_watchers()
            else:
                raise ValueError("unknown message")
        except NO_SENSE:
            # It is ours, so this is a defect or a guest that took it over: it gets no second word.
            self.give_up()
        finally:
            for fd in fds:
                os.close(fd)

    def _exited(self, report: Report) -> None:
        number, status, cpu_us, max_rss_kib, strangers, full = report
        if number == WARM_UP:
            self._link.note_warm()
            return
        launch, end = self.launches[number], end_in(status, cpu_us, max_rss_kib)
        if strangers and not launch.mark:
            raise ValueError("a lineage that was not named")
        del self.launches[number]
        self._exits += 1
        if self._exits % _JOURNAL_READ_EVERY == 0:
            self.read_journal()
        if FULL_DISK[full] != self._link.full:
            self._link.note_disk(FULL_DISK[full])
        if strangers:
            self._link.name_orphans(launch, end)
        else:
            launch.note_exit(end, ())

    def _failed(self, message: Message) -> None:
        number, step = whole(message["errno"], 4095), str(message["step"])
        if message["failed"] == WARM_UP:
            self._link.note_warm()
        elif message["failed"] in ("spawner", "reserve"):
            for launch in self.launches.values():
                launch.note_failed(number, step)
            self.launches.clear()
            self.close()
        else:
            self.launches.pop(message["failed"]).note_failed(number, step)

    def ask_for(self, launch: Launch) -> None:
        """Have the spawner say at once that a quiet job runs, where it has not ended or failed by then."""
        if self.alive:
            self.port.send({"tell": launch.number})

    def wake_watchers(self) -> None:
        """A process that outlived its parent has ended, or this spawner has."""
        watchers, self.watchers = self.watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def give_up(self) -> None:
        """It does not answer, or not as it should: end it. Init inherits what it had started."""
        self._link.send({"op": "end_servant", "number": self.number})
        self._ended()

    def _ended(self) -> None:
        self._link.note_warm()
        self.port.close()
        if self._watchdog:
            self._watchdog.cancel()
            self._watchdog = None
        self.read_journal()
        if self._journal_fd >= 0:
            os.close(self._journal_fd)
            self._journal_fd = -1
        launches, self.launches = list(self.launches.values()), {}
        for launch in launches:
            if launch.noted_pid and not launch.settled:
                launch.note_found(launch.noted_pid, launch.attempted)
        self._link.adopt([launch for launch in launches if launch.pid])
        for launch in launches:
            if launch.pid:
                continue
            if launch.attempted:
                self._link.trace(launch)
            else:
                self._link.embattled |= self.reserve
                launch.note_failed(errno.ESRCH, "spawner")
        self.wake_watchers()

    def close(self) -> None:
        """Let it end; what runs goes to init."""
        if not self.port.closed:
            self._ended()
