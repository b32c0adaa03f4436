"""The host's end of one VM: its channel to init, its spawners, and the programs that they started.

Starting a program takes one hop, straight to the spawner of the program's user, and so does the news of its
end. Init is asked for what needs its privileges: killing whole lineages, looking at every process.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from agentos.errors import BootFailed, SpawnFailed, VmStopped
from agentos.linux import pty
from agentos.machine import channel
from agentos.machine.channel import ChannelBroken, Decoder, Message
from agentos.machine.spawner import JOURNAL_ENTRY

IDLE_SECONDS = 10.0
"""How long an unused spawner is kept (it costs about as much memory as the VM itself)."""
WARM_SECONDS = 5.0
"""What a warm-up may take: it runs a program of the VM's image."""
LAUNCH_SECONDS = 20.0
"""A spawner that has not said by then that it has started a program, or that one was killed, is stuck or lies."""
FIRST_NUMBER = 2
"""Of servants, launches and requests; 1 is the spawner that a VM may be made with."""
WARM_UP = 0
"""The job of a spawner that nobody waits for."""
_JOURNAL_READ_EVERY = 500
"""Quiet jobs after which the journal is read anyhow: far fewer than fit into its pipe."""
MAX_UNSENT_BYTES = 4 * 1024 * 1024
INIT_FRAME_BYTES = 4 * 1024 * 1024
"""Greatest message of init: a page of the process table, or a lineage by name."""
SERVANT_FRAME_BYTES = 64 * 1024
"""Greatest message of a spawner or connector."""
_NO_SENSE = (KeyError, TypeError, ValueError)
"""What reading a message raises that is not as it should be."""
_MAX_PID = 1 << 22  # PID_MAX_LIMIT of linux/threads.h


class ExitEvent(NamedTuple):
    """What a spawner or init reports when the leader of a launch has ended."""

    pid: int
    status: int
    """As waitpid(2) gives it."""
    cpu_ms: float
    max_rss_bytes: int
    orphans: tuple[tuple[int, str], ...]


def whole(value: object, most: int, *, least: int = 0) -> int:
    """A whole number from the VM. Raises ValueError for anything else, or out of bounds."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"no number from {least} to {most}")
    return value


def exit_of(message: Message) -> ExitEvent:
    """The end of a leader, as `spawner.end_of` has it."""
    status, cpu_us, max_rss_kib = message["end"]
    whole(status, 0xFFFF)
    whole(cpu_us, 2**63 - 1)
    whole(max_rss_kib, 2**53)
    return ExitEvent(0, status, cpu_us / 1000, max_rss_kib * 1024, ())


class Port:
    """One non-blocking Unix socket on the event loop: messages out in order, messages in as they come."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        received: Callable[[Message, list[int]], None],
        ended: Callable[[], None],
        most: int = SERVANT_FRAME_BYTES,
    ) -> None:
        self._loop = loop
        self.sock = sock
        self._received = received
        self._ended = ended
        self._decoder = Decoder(most)
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._unsent_bytes = 0
        self._waiting = False
        """Whether the loop tells when the socket takes more."""
        self.closed = False
        loop.add_reader(sock.fileno(), self.readable)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send, with `fds` (closed here once they have gone out). What the socket does not take waits, in order."""
        if self.closed:
            for fd in fds:
                os.close(fd)
            raise VmStopped("the VM is not running", reason="error")
        self._unsent.append((channel.frame(message, len(fds)), list(fds)))
        self._unsent_bytes += len(self._unsent[-1][0])
        if len(self._unsent) == 1:
            self._flush()
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            self.close()
            self._ended()

    def _flush(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                sent = channel.send_some(self.sock, data, fds)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self.sock.fileno(), self._flush)
                self._waiting = True
                return
            except OSError:
                break  # the reading side tells that the other end is gone
            self._unsent_bytes -= sent
            for fd in fds:
                os.close(fd)
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = (data[sent:], [])
        if self._waiting:
            self._loop.remove_writer(self.sock.fileno())
            self._waiting = False

    def readable(self) -> None:
        """Take what has arrived."""
        if self.closed:
            return
        try:
            data, fds = channel.read(self.sock)
            messages = self._decoder.feed(data, fds) if data else None
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ChannelBroken):
            messages = None
        if messages is None:
            self.close()
            self._ended()
            return
        for message, owned in messages:
            if self.closed:
                for fd in owned:  # the one before was the last that is listened to
                    os.close(fd)
            else:
                self._received(message, owned)

    def close(self) -> None:
        """Close the socket and every descriptor that waits on it."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.sock.fileno())
        self._loop.remove_writer(self.sock.fileno())
        self.sock.close()
        self._decoder.close()
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()


class Launch:
    """One program that a spawner was asked to start."""

    def __init__(self, link: Link, number: int, spawner: Spawner, *, terminal: bool = False) -> None:
        loop = link.loop
        self._terminal = terminal
        self.number = number
        self.spawner = spawner
        self.pid = 0
        self.mark = 0
        """What all its descendants carry; known once it has started."""
        self.attempted = 0
        """The mark that it was about to be started with, by the journal."""
        self.noted_pid = 0
        """What pid it got, by the journal."""
        self.error: SpawnFailed | None = None
        self.master_fd = -1
        """The pty's master, until somebody takes it."""
        self.settled: asyncio.Future[None] = loop.create_future()
        """Done when the program runs or could not be started (`error`)."""
        self.exited: asyncio.Future[ExitEvent] = loop.create_future()
        self.kill_wanted = False
        self.kills_under_way = 0
        self.released = False
        self.on_started: Callable[[], None] | None = None
        """Called when it is known to run: of a quiet one, only when it has not ended soon."""
        self._link = link
        self.asked_for = False
        """Whether its spawner was to say what became of it, because nothing was known of it yet."""

    def note_started(self, message: Message, fds: list[int]) -> None:
        """The spawner has started it."""
        pid, mark = whole(message["pid"], _MAX_PID, least=1), whole(message["mark"], 2**64 - 1)
        if self.settled.done() or len(fds) != self._terminal or not all(map(pty.is_master, fds)):
            raise ValueError("no news, or not the descriptors of a program that was started")
        self.pid, self.mark = pid, mark
        if fds:
            self.master_fd = fds.pop()
        self._settle()
        if self.on_started:
            self.on_started()
        if self.kill_wanted:
            self._link.kill_soon(self)

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

    def note_exit(self, end: ExitEvent, orphans: tuple[tuple[int, str], ...]) -> None:
        """Its leader has been reaped. Of a quiet one that ended soon, the pid is not known."""
        self._settle()
        if not self.exited.done():
            self.exited.set_result(ExitEvent(self.pid, end.status, end.cpu_ms, end.max_rss_bytes, orphans))

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)

    def abandon(self, error: Exception) -> None:
        """The VM is gone."""
        if not self.settled.done():
            self.error = SpawnFailed("the VM ended", errno=0, step="launch")
        self._settle()
        if self.master_fd >= 0:
            os.close(self.master_fd)
            self.master_fd = -1
        if not self.exited.done():
            self.exited.set_exception(error)
            self.exited.exception()  # nobody may be waiting: that is no error


class Spawner:
    """The host's end of one spawner: it starts the programs of one of the VM's users."""

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
        self.watchers: list[asyncio.Future[None]] = []
        self._link = link
        self._env: Mapping[str, str] | None = None
        """The environment of the last job, which is not sent again."""
        self._watchdog: asyncio.TimerHandle | None = None
        self._port = Port(link.loop, sock, self._received, self._ended)

    @property
    def alive(self) -> bool:
        """Whether it can be asked to start more."""
        return not self._port.closed

    def start(self, launch: Launch, job: Message, fds: Sequence[int]) -> None:
        """Send a job; `fds` are closed here."""
        self.launches[launch.number] = launch
        if self._watchdog is None:
            self._watchdog = self._link.loop.call_later(LAUNCH_SECONDS, self._look_after)
        message = {"job": launch.number, **job}
        if self.forgotten:
            message["forget"] = self.forgotten
            self.forgotten = []
        if job["env"] is self._env:
            del message["env"]
        self._env = job["env"]
        self._port.send(message, fds)

    def _look_after(self) -> None:
        """Once in a while: a launch of which nothing is known must be known by the next look."""
        self._watchdog = None
        unknown = [launch for launch in self.launches.values() if not launch.settled.done()]
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
            if number in self.launches and pid <= _MAX_PID:
                launch = self.launches[number]
                launch.attempted, launch.noted_pid = mark, pid

    def send(self, message: Message) -> None:
        """Send anything else."""
        self._port.send(message)

    def _received(self, message: Message, fds: list[int]) -> None:
        try:
            if "exited" in message:
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
        except _NO_SENSE:
            # It is ours, so this is a defect or a guest that took it over: it gets no second word.
            self.give_up()
        finally:
            for fd in fds:
                os.close(fd)

    def _exited(self, message: Message) -> None:
        number = message["exited"]
        if number == WARM_UP:
            self._link.note_warm()
            return
        end, strangers = exit_of(message), bool(message["strangers"])
        if strangers and not self.launches[number].mark:
            raise ValueError("a lineage that was not named")
        launch = self.launches.pop(number)
        self._exits += 1
        if self._exits % _JOURNAL_READ_EVERY == 0:
            self.read_journal()
        if self._link.on_disk is not None:
            self._link.on_disk(message.get("full"))
        self._link.leader_exited(launch, end, strangers=strangers)

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
            self._port.send({"tell": launch.number})

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
        self._port.close()
        if self._watchdog:
            self._watchdog.cancel()
            self._watchdog = None
        self.read_journal()
        if self._journal_fd >= 0:
            os.close(self._journal_fd)
            self._journal_fd = -1
        launches, self.launches = list(self.launches.values()), {}
        for launch in launches:
            if launch.noted_pid and not launch.settled.done():
                launch.note_started({"pid": launch.noted_pid, "mark": launch.attempted}, [])
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
        if not self._port.closed:
            self._ended()


class Link:
    """A running VM, as the host's event loop sees it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self.loop = loop
        self.booted: asyncio.Future[Message] = loop.create_future()
        self.outlets: dict[str, socket.socket] = {}
        """Of a VM with a network, once it has booted: whoever takes them closes them."""
        self.ended: asyncio.Future[None] = loop.create_future()
        self.warm: asyncio.Future[None] | None = None
        """Done when what a spawner that came with the VM was warmed up with has been reaped."""
        self._warm_timer: asyncio.TimerHandle | None = None
        self.on_end: Callable[[], None] | None = None
        self.on_disk: Callable[[object], None] | None = None
        """Called when a program has ended: with the limit that the VM's files have come to, None for none."""
        self._port = Port(loop, sock, self._received, self._ended, INIT_FRAME_BYTES)
        self._numbers = itertools.count(FIRST_NUMBER)
        self._requests: dict[int, asyncio.Future[Message]] = {}
        self._spawners: dict[tuple[int, bool], Spawner] = {}
        """By user, and whether it is the reserve."""
        self._adopted: dict[int, Launch] = {}
        self.embattled = False
        """Whether the last reserve was ended before it had begun anything, so that the next needs `_hold`."""
        self._holding = 0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._last_launch = 0
        self._closing: VmStopped | None = None

    # -- programs

    def launch(self, job: Message, fds: Sequence[int] = (), *, reserve: bool = False) -> Launch:
        """Have a program started, by the reserve where an ordinary spawner could not (see `reserve`).

        `fds` (stdin if wanted, stdout, stderr) are closed here, also on an error.
        """
        if self._port.closed:
            for fd in fds:
                os.close(fd)
            raise self.stopped_error()
        held = reserve and self.embattled
        if held:
            self.embattled = False
            self._hold()
        spawner = self.prepare(int(job["uid"]), reserve=reserve)
        number = self._last_launch = next(self._numbers)
        launch = Launch(self, number, spawner, terminal=bool(job.get("pty")))
        if held:
            launch.settled.add_done_callback(self._let_go)
        spawner.start(launch, job, fds)
        if held:
            spawner.ask_for(launch)
        return launch

    def _hold(self) -> None:
        """Stop all that runs in the VM until `_let_go`: where a guest has its id, it kills the reserve as well."""
        self._holding += 1
        if self._holding == 1:
            self.send({"op": "hold"})

    def _let_go(self, settled: asyncio.Future[None]) -> None:
        self._holding -= 1
        if self._holding == 0:
            self.send({"op": "let_go"})

    def prepare(self, uid: int, *, reserve: bool = False) -> Spawner:
        """The spawner of a user, started if there is none. It goes when it was not needed for a while."""
        spawner = self._spawners.get((uid, reserve))
        if spawner is None or not spawner.alive:
            kind = "reserve" if reserve else "spawner"
            spawner = self._spawners[uid, reserve] = self._fork_spawner(kind, uid)
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(IDLE_SECONDS, self._drop_idle, self._last_launch)
        return spawner

    def _fork_spawner(self, kind: str, uid: int) -> Spawner:
        journal_read, journal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            number, sock = self.fork_servant(kind, [journal_write], uid=uid)
        except BaseException:
            os.close(journal_read)
            raise
        return Spawner(self, uid, number, sock, journal_read, reserve=kind == "reserve")

    def take_spawner(self, uid: int, sock: socket.socket, journal_fd: int) -> None:
        """Take over the spawner that was forked as servant 1, before this link was there."""
        self.warm = self.loop.create_future()
        self._warm_timer = self.loop.call_later(WARM_SECONDS, self.note_warm)
        self._spawners[uid, False] = Spawner(self, uid, FIRST_NUMBER - 1, sock, journal_fd)
        self._idle_timer = self.loop.call_later(IDLE_SECONDS, self._drop_idle, self._last_launch)

    def note_warm(self) -> None:
        """The warm-up is over, or is not waited for any longer."""
        if self.warm is not None and not self.warm.done():
            self.warm.set_result(None)
        if self._warm_timer is not None:
            self._warm_timer.cancel()

    def release(self, launch: Launch) -> None:
        """The launch is over: nothing of its lineage will be asked for or killed again."""
        launch.released = True
        if not launch.kills_under_way:
            launch.spawner.forgotten.append(launch.number)

    def _drop_idle(self, seen: int) -> None:
        """Once in a while: a spawner that nothing was asked of since the last time, and that runs nothing, goes."""
        self._idle_timer = None
        idle = self._last_launch == seen
        for key, spawner in list(self._spawners.items()):
            if idle and not spawner.launches:
                spawner.close()
                del self._spawners[key]
        if self._spawners:
            self._idle_timer = self.loop.call_later(IDLE_SECONDS, self._drop_idle, self._last_launch)

    def leader_exited(self, launch: Launch, end: ExitEvent, *, strangers: bool) -> None:
        """A launch's leader was reaped. What outlived it, if anything, is asked for by name first."""
        if not strangers:
            launch.note_exit(end, ())
            return
        answer = self._ask("members", {"mark": launch.mark})
        answer.add_done_callback(lambda done: self._name_orphans(launch, end, done))

    def _name_orphans(self, launch: Launch, end: ExitEvent, done: asyncio.Future[Message]) -> None:
        members = self._members_of(done)
        if members is None:
            launch.abandon(self.stopped_error())
        else:
            launch.note_exit(end, members)

    def _members_of(self, done: asyncio.Future[Message]) -> tuple[tuple[int, str], ...] | None:
        """What init says of a lineage; None when the VM has ended, of a senseless answer too."""
        if done.exception() is not None:
            return None
        try:
            return tuple(
                (whole(pid, _MAX_PID, least=1), str(command)) for pid, command in done.result()["members"]
            )
        except _NO_SENSE:
            self._ended()
            return None

    def adopt(self, launches: list[Launch]) -> None:
        """A spawner has gone: init is to report the ends of what it had started."""
        if launches and not self._port.closed:
            for launch in launches:
                self._adopted[launch.number] = launch
            self.send({"op": "adopt", "jobs": [[launch.number, launch.pid] for launch in launches]})

    def trace(self, launch: Launch) -> None:
        """A spawner has gone while it started a launch: who carries its mark is what was started."""
        if self._port.closed:
            launch.abandon(self.stopped_error())
            return
        answer = self._ask("members", {"mark": launch.attempted})
        answer.add_done_callback(lambda done: self._traced(launch, done))

    def _traced(self, launch: Launch, done: asyncio.Future[Message]) -> None:
        members = self._members_of(done)
        if members is None:
            launch.abandon(self.stopped_error())
        elif members:
            launch.note_started({"pid": min(pid for pid, _ in members), "mark": launch.attempted}, [])
            self.adopt([launch])
        else:
            launch.note_lost()

    async def kill(self, launch: Launch) -> None:
        """Kill a launch's whole lineage; returns when all of it is dead."""
        self._look_up(launch)
        if not launch.mark:
            await self.started(launch)
        if launch.mark:
            await asyncio.shield(self._kill(launch))

    def kill_soon(self, launch: Launch) -> None:
        """Begin to kill a launch's whole lineage; its exit event tells of the leader's end."""
        if self._port.closed:
            return
        self._look_up(launch)
        if launch.mark:
            self._kill(launch)
        else:
            launch.kill_wanted = True
            launch.spawner.ask_for(launch)

    def _look_up(self, launch: Launch) -> None:
        """Learn pid and mark of a quiet job before its spawner tells, so that a kill need not wait for that."""
        if not launch.mark:
            launch.spawner.read_journal()
            if launch.noted_pid:
                launch.pid, launch.mark = launch.noted_pid, launch.attempted

    async def started(self, launch: Launch) -> None:
        """Return when it is known what became of a launch: it runs, has ended, or could not be started."""
        if not launch.settled.done():
            launch.spawner.ask_for(launch)
            await asyncio.shield(launch.settled)

    def _kill(self, launch: Launch) -> asyncio.Future[Message]:
        launch.kills_under_way += 1
        answer = self._ask("kill", {"mark": launch.mark})
        answer.add_done_callback(lambda done: self._killed(launch, done))
        return answer

    def _killed(self, launch: Launch, done: asyncio.Future[Message]) -> None:
        if not done.cancelled():
            done.exception()
        launch.kills_under_way -= 1
        if launch.released:
            self.release(launch)
        elif not launch.exited.done():
            self.loop.call_later(LAUNCH_SECONDS, self._end_overdue, launch)

    def _end_overdue(self, launch: Launch) -> None:
        """A lineage was killed long ago, and the end of its leader still not reported: whoever is to do so lies."""
        if launch.exited.done():
            return
        if launch.number in launch.spawner.launches:
            launch.spawner.give_up()
        self._adopted.pop(launch.number, None)
        launch.note_lost()

    def signal(self, launch: Launch, number: int, *, group: bool = False) -> None:
        """Send a signal to a launch's leader, or to the process group that it leads. Never to a pid that was reused."""
        message: Message = {"signal": number, "pid": launch.pid, "group": group}
        if launch.number in launch.spawner.launches:
            launch.spawner.send(message)
        elif launch.number in self._adopted:
            self.send({"op": "signal", **message})

    async def lineage_ended(self, launch: Launch) -> None:
        """Return when no process of the launch's lineage is left."""
        spawner = launch.spawner
        while await self.members(launch):
            if not spawner.alive:
                await self.request("await_end", mark=launch.mark)
                return
            ended: asyncio.Future[None] = self.loop.create_future()
            spawner.watchers.append(ended)
            # Answered at the next end of an orphan, at once when there is none left.
            spawner.send({"watch": True})
            await ended

    # -- servants and requests

    def fork_servant(
        self, kind: str, fds: Sequence[int] = (), *, uid: int, **details: Any
    ) -> tuple[int, socket.socket]:
        """Have init fork a confined child of `kind`: its number, and our end of its socket, non-blocking.

        `fds` go to the child too, and are closed here.
        """
        number = next(self._numbers)
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        theirs.setblocking(True)
        try:
            self._port.send(
                {"op": "fork", "kind": kind, "uid": uid, "number": number, **details}, [theirs.detach(), *fds]
            )
        except BaseException:
            ours.close()
            raise
        return number, ours

    def send(self, message: Message) -> None:
        """Tell init something that has no answer. Nothing happens when the VM has ended."""
        if not self._port.closed:
            self._port.send(message)

    async def request(self, op: str, **arguments: Any) -> Message:
        """Ask init and return its answer. Raises VmStopped when the VM ends before."""
        return await self._ask(op, arguments)

    async def members(self, launch: Launch) -> bool:
        """Whether a process of the launch's lineage is left."""
        try:
            return bool((await self.request("members", mark=launch.mark))["members"])
        except KeyError:
            self.distrust()
            raise self.stopped_error() from None

    async def processes(self, most: int) -> list[dict[str, Any]]:
        """The entries of the VM's process table, `most` at most, as init reads it: a page at a time."""
        entries: list[dict[str, Any]] = []
        after, more = 0, True
        while more:
            answer = await self.request("processes", after=after)
            try:
                entries += answer["processes"]
                more = bool(answer["more"])
                after = whole(entries[-1]["pid"], _MAX_PID, least=after + 1) if more else after
                if len(entries) > most:
                    raise ValueError(f"over {most} processes")
            except (*_NO_SENSE, IndexError):
                self.distrust()
                raise self.stopped_error() from None
        return entries

    def distrust(self) -> None:
        """Init has said what makes no sense: the VM ends."""
        self._ended()

    def _ask(self, op: str, arguments: Message) -> asyncio.Future[Message]:
        number = next(self._numbers)
        future: asyncio.Future[Message] = self.loop.create_future()
        if self._port.closed:
            raise self.stopped_error()
        self._requests[number] = future
        self._port.send({"op": op, "id": number, **arguments})
        return future

    # -- what comes from init

    def _received(self, message: Message, fds: list[int]) -> None:
        if message.get("ev") == "booted" and not self.booted.done():
            self._take_outlets(message, fds)
        for fd in fds:
            os.close(fd)
        try:
            if "id" in message:
                future = self._requests.pop(message["id"], None)
                if future is not None and not future.done():
                    future.set_result(message)
            else:
                _EVENTS[message["ev"]](self, message)
        except _NO_SENSE:
            # Init is ours, so this is either a defect or a guest that took it over: it gets no second word.
            self._ended()

    def _take_outlets(self, message: Message, fds: list[int]) -> None:
        names = message.get("outlets")
        if isinstance(names, list) and len(names) == len(fds):
            self.outlets = {str(name): socket.socket(fileno=fds.pop(0)) for name in names}

    def _on_exited(self, message: Message) -> None:
        end = exit_of(message)
        launch = self._adopted.pop(message["exited"], None)
        if launch is not None:
            self.leader_exited(launch, end, strangers=True)

    def _on_booted(self, message: Message) -> None:
        if not self.booted.done():
            self.booted.set_result(message)

    def _on_boot_failed(self, message: Message) -> None:
        if not self.booted.done():
            self.booted.set_exception(boot_error(message))
            self.booted.exception()

    def _ended(self) -> None:
        self.close(VmStopped("the VM's init ended", reason="error"))

    def stopped_error(self) -> VmStopped:
        """Why nothing can be asked any more."""
        stopped = self._closing or VmStopped("the VM is not running", reason="error")
        return VmStopped(stopped.message, **stopped.details)

    def close(self, reason: VmStopped) -> None:
        """Let go of the VM: init ends when its channel does, and the kernel ends the rest with it."""
        if self._closing is not None:
            return
        self._closing = reason
        self._port.close()
        if self._idle_timer:
            self._idle_timer.cancel()
        if not self.booted.done():
            self.booted.set_exception(
                BootFailed("the VM ended while it booted", step="boot", errno=0, remedy="")
            )
            self.booted.exception()
        for future in self._requests.values():
            if not future.done():
                future.set_exception(self.stopped_error())
                future.exception()
        self._requests.clear()
        for sock in self.outlets.values():
            sock.close()
        self.outlets.clear()
        self._abandon_launches()
        if not self.ended.done():
            self.ended.set_result(None)
        if self.on_end:
            self.on_end()

    def _abandon_launches(self) -> None:
        launches, self._adopted = list(self._adopted.values()), {}
        for spawner in self._spawners.values():
            launches += spawner.launches.values()
            spawner.launches.clear()
            spawner.close()
        self._spawners.clear()
        for launch in launches:
            launch.abandon(self.stopped_error())


_EVENTS: dict[str, Callable[[Link, Message], None]] = {
    "exited": Link._on_exited,
    "booted": Link._on_booted,
    "boot_failed": Link._on_boot_failed,
}


_REMEDIES = {
    1: "user namespaces may be forbidden here: see `agentos doctor`",
    13: "user namespaces may be forbidden here: see `agentos doctor`",
    28: "raise the sysctl user.max_user_namespaces (or the max_*_namespaces that the step names)",
    38: "this kernel is too old, or a seccomp filter around the server hides the call: Linux 5.14 or later is needed",
    11: "a process limit of the host was reached (ulimit -u, pids cgroup)",
    12: "the host is out of memory or of a kernel resource",
    24: "raise the open files limit of the server (ulimit -n)",
}


def boot_error(message: Message) -> BootFailed:
    """The BootFailed for what zygote or init says: the step, errno and what to change on the host."""
    number = int(message.get("errno") or 0)
    step = str(message.get("step", "boot"))
    remedy = _REMEDIES.get(number, "see `agentos doctor`")
    return BootFailed(
        f"the VM could not be made: {step}: {message.get('text', '')}", step=step, errno=number, remedy=remedy
    )
