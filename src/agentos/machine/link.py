"""The host's end of one VM: its channel to init, its spawners, and the programs that they started.

Starting a program takes one hop, straight to the spawner of the program's user, and so does the news of its
end. Init is asked for what needs its privileges: killing whole lineages, looking at every process.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from agentos.errors import BootFailed, VmStopped
from agentos.machine.channel import Message
from agentos.machine.launcher import LAUNCH_SECONDS, MAX_PID, End, Launch, Launcher, end_in
from agentos.machine.port import NO_SENSE, Port, whole

IDLE_SECONDS = 10.0
"""How long an unused spawner is kept (it costs about as much memory as the VM itself)."""
WARM_SECONDS = 5.0
"""What a warm-up may take: it runs a program of the VM's image."""
FIRST_NUMBER = 2
"""Of servants, launches and requests; 1 is the spawner that a VM may be made with."""
INIT_FRAME_BYTES = 4 * 1024 * 1024
"""Greatest message of init: a page of the process table, or a lineage by name."""


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
        """Called with `full` when that has changed."""
        self.full: object = None
        """The limit that the VM's files have come to, as the end of the latest program showed; None for none."""
        self._port = Port(loop, sock, self._received, self._ended, INIT_FRAME_BYTES)
        self._numbers = itertools.count(FIRST_NUMBER)
        self._requests: dict[int, asyncio.Future[Message]] = {}
        self._launchers: dict[tuple[int, bool], Launcher] = {}
        """Of the VM's spawners: by user, and whether it is the reserve."""
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
        launcher = self._launchers.get((job["uid"], reserve))
        if launcher is None or launcher.port.closed or self._idle_timer is None:
            launcher = self.prepare(job["uid"], reserve=reserve)
        number = self._last_launch = next(self._numbers)
        launch = Launch(self, number, launcher, terminal="pty" in job)
        if held:
            launch.settling().add_done_callback(self._let_go)
        launcher.start(launch, job, fds)
        if held:
            launcher.ask_for(launch)
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

    def prepare(self, uid: int, *, reserve: bool = False) -> Launcher:
        """The spawner of a user, started if there is none. It goes when it was not needed for a while."""
        launcher = self._launchers.get((uid, reserve))
        if launcher is None or not launcher.alive:
            kind = "reserve" if reserve else "spawner"
            launcher = self._launchers[uid, reserve] = self._fork_spawner(kind, uid)
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(IDLE_SECONDS, self._drop_idle, self._last_launch)
        return launcher

    def _fork_spawner(self, kind: str, uid: int) -> Launcher:
        journal_read, journal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            number, sock = self.fork_servant(kind, [journal_write], uid=uid)
        except BaseException:
            os.close(journal_read)
            raise
        return Launcher(self, uid, number, sock, journal_read, reserve=kind == "reserve")

    def take_spawner(self, uid: int, sock: socket.socket, journal_fd: int) -> None:
        """Take over the spawner that was forked as servant 1, before this link was there."""
        self.warm = self.loop.create_future()
        self._warm_timer = self.loop.call_later(WARM_SECONDS, self.note_warm)
        self._launchers[uid, False] = Launcher(self, uid, FIRST_NUMBER - 1, sock, journal_fd)
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
        if not (launch.kills_under_way or launch.kill_wanted):
            launch.launcher.forgotten.append(launch.number)

    def take_back(self, launch: Launch) -> None:
        """Nobody wants the launch any more, which may not have started yet."""
        self.kill_soon(launch)
        self.release(launch)

    def _drop_idle(self, seen: int) -> None:
        """Once in a while: a spawner that nothing was asked of since the last time, and that runs nothing, goes."""
        self._idle_timer = None
        idle = self._last_launch == seen
        for key, launcher in list(self._launchers.items()):
            if idle and not launcher.launches:
                launcher.close()
                del self._launchers[key]
        if self._launchers:
            self._idle_timer = self.loop.call_later(IDLE_SECONDS, self._drop_idle, self._last_launch)

    def note_disk(self, full: object) -> None:
        """A program has left the VM's disk fuller, or less full, than the one before did."""
        self.full = full
        if self.on_disk is not None:
            self.on_disk(full)

    def name_orphans(self, launch: Launch, end: End) -> None:
        """A launch's leader was reaped. What outlived it, if anything, is asked for by name before that is told."""
        answer = self._ask("members", {"mark": launch.mark})
        answer.add_done_callback(lambda done: self._orphans_named(launch, end, done))

    def _orphans_named(self, launch: Launch, end: End, done: asyncio.Future[Message]) -> None:
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
                (whole(pid, MAX_PID, least=1), str(command)) for pid, command in done.result()["members"]
            )
        except NO_SENSE:
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
        answer = self._ask("members", {"mark": launch.attempted, "left_by": launch.launcher.number})
        answer.add_done_callback(lambda done: self._traced(launch, done))

    def _traced(self, launch: Launch, done: asyncio.Future[Message]) -> None:
        members = self._members_of(done)
        if members is None:
            launch.abandon(self.stopped_error())
        elif members:
            launch.note_found(min(pid for pid, _ in members), launch.attempted)
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
        elif not launch.kill_wanted:
            launch.kill_wanted = True
            launch.settling().add_done_callback(lambda _: self._kill_wanted(launch))
            launch.launcher.ask_for(launch)

    def _look_up(self, launch: Launch) -> None:
        """Learn pid and mark of a quiet job before its spawner tells, so that a kill need not wait for that."""
        if not launch.mark:
            launch.launcher.read_journal()
            if launch.noted_pid:
                launch.pid, launch.mark = launch.noted_pid, launch.attempted

    async def started(self, launch: Launch) -> None:
        """Return when it is known what became of a launch: it runs, has ended, or could not be started."""
        if not launch.settled:
            launch.launcher.ask_for(launch)
            await asyncio.shield(launch.settling())

    def _kill(self, launch: Launch) -> asyncio.Future[Message]:
        launch.kills_under_way += 1
        answer = self._ask("kill", {"mark": launch.mark})
        answer.add_done_callback(lambda done: self._killed(launch, done))
        return answer

    def _kill_wanted(self, launch: Launch) -> None:
        """It is known now what became of a launch that is to be killed. Its mark was kept for that."""
        launch.kill_wanted = False
        if launch.mark and not self._port.closed:
            self._kill(launch)
        elif launch.released:
            self.release(launch)

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
        if launch.number in launch.launcher.launches:
            launch.launcher.give_up()
        self._adopted.pop(launch.number, None)
        launch.note_lost()

    def signal(self, launch: Launch, number: int, *, group: bool = False) -> None:
        """Send a signal to a launch's leader, or to the process group that it leads. Never to a pid that was reused."""
        message: Message = {"signal": number, "pid": launch.pid, "group": group}
        if launch.number in launch.launcher.launches:
            launch.launcher.send(message)
        elif launch.number in self._adopted:
            self.send({"op": "signal", **message})

    async def lineage_ended(self, launch: Launch) -> None:
        """Return when no process of the launch's lineage is left."""
        launcher = launch.launcher
        while await self.members(launch):
            if not launcher.alive:
                await self.request("await_end", mark=launch.mark)
                return
            ended: asyncio.Future[None] = self.loop.create_future()
            launcher.watchers.append(ended)
            # Answered at the next end of an orphan, at once when there is none left.
            launcher.send({"watch": True})
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
                after = whole(entries[-1]["pid"], MAX_PID, least=after + 1) if more else after
                if len(entries) > most:
                    raise ValueError(f"over {most} processes")
            except (*NO_SENSE, IndexError):
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
        except NO_SENSE:
            # Init is ours, so this is either a defect or a guest that took it over: it gets no second word.
            self._ended()

    def _take_outlets(self, message: Message, fds: list[int]) -> None:
        names = message.get("outlets")
        if isinstance(names, list) and len(names) == len(fds):
            self.outlets = {str(name): socket.socket(fileno=fds.pop(0)) for name in names}

    def _on_exited(self, message: Message) -> None:
        end = end_in(*message["end"])
        launch = self._adopted.pop(message["exited"], None)
        if launch is not None:
            self.name_orphans(launch, end)

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
        for launcher in self._launchers.values():
            launches += launcher.launches.values()
            launcher.launches.clear()
            launcher.close()
        self._launchers.clear()
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
_STEP_REMEDIES = {"storage": "name a directory that there is, or that can be made, on a disk with room"}


def boot_error(message: Message) -> BootFailed:
    """The BootFailed for what zygote or init says: the step, errno and what to change on the host."""
    number = int(message.get("errno") or 0)
    step = str(message.get("step", "boot"))
    remedy = _STEP_REMEDIES.get(step) or _REMEDIES.get(number, "see `agentos doctor`")
    return BootFailed(
        f"the VM could not be made: {step}: {message.get('text', '')}", step=step, errno=number, remedy=remedy
    )
