"""The host's end of one VM: its channel to init, launches, and what init reports about them.

A launch is a launcher that init forked, its private socket, and a mark that all its descendants carry. The
host sends the job on that socket without waiting for init, so starting a program takes one hop. One spare
launcher is kept ahead of need while the VM is in use.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agentos.errors import BootFailed, SpawnFailed, VmStopped
from agentos.machine import channel
from agentos.machine.channel import ChannelBroken, Decoder, Message

SPARE_SECONDS = 10.0
"""How long an unused spare launcher is kept (it costs about as much memory as the VM itself)."""
LAUNCH_SECONDS = 20.0
"""A launcher that has not taken its job by then is stuck, for instance stopped by the guest."""
MAX_UNSENT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ExitEvent:
    """What init reports when the leader of a launch has ended."""

    pid: int
    status: int
    """As waitpid(2) gives it."""
    cpu_ms: float
    max_rss_bytes: int
    orphans: tuple[tuple[int, str], ...]


class Port:
    """One non-blocking Unix socket on the event loop: messages out in order, messages in as they come."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        received: Callable[[Message, list[int]], None],
        ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self.sock = sock
        self._received = received
        self._ended = ended
        self._decoder = Decoder()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._unsent_bytes = 0
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
        self._loop.remove_writer(self.sock.fileno())

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
            self._received(message, owned)

    def detach(self) -> socket.socket:
        """Give the socket away; this port is closed then. Nothing may be unsent."""
        copy = self.sock.dup()
        self.close()
        return copy

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
    """One launcher and what it became."""

    def __init__(self, link: Link, mark: int, sock: socket.socket) -> None:
        loop = link.loop
        self.mark = mark
        self.pid = 0
        self.is_program = False
        """Whether it becomes, or became, a guest's program: other launchers are no part of the VM's process table."""
        self.error: SpawnFailed | None = None
        self.master_fd = -1
        """The pty's master, or the connected socket, that the launcher handed over."""
        self.settled: asyncio.Future[None] = loop.create_future()
        """Done when the program has taken over, the launcher has answered, or it failed (`error`)."""
        self.known: asyncio.Future[None] = loop.create_future()
        """Done when `pid` is known."""
        self.exited: asyncio.Future[ExitEvent] = loop.create_future()
        self._link = link
        self.port = Port(loop, sock, self._received, self._ended)
        self._deadline: asyncio.TimerHandle | None = None

    def start(self, job: Message, fds: Sequence[int] = ()) -> None:
        """Send the job; `fds` are closed here."""
        self.is_program = job["kind"] == "exec"
        if self.is_program:
            self._deadline = self._link.loop.call_later(LAUNCH_SECONDS, self._too_slow)
        self.port.send(job, fds)

    def hand_over(self) -> socket.socket:
        """The launcher's socket, for a job that is served over it; from here on the caller's to read and close."""
        return self.port.detach()

    def _received(self, message: Message, fds: list[int]) -> None:
        if "error" in message:
            number = int(message["error"])
            self.error = SpawnFailed(os.strerror(number), errno=number, step=str(message.get("step")))
        elif len(fds) == 1 and self.master_fd < 0:
            self.master_fd = fds.pop()
        for fd in fds:
            os.close(fd)
        if self.error or message.get("connected"):
            self._settle()

    def _ended(self) -> None:
        self._settle()

    def _settle(self) -> None:
        if self._deadline:
            self._deadline.cancel()
        if not self.settled.done():
            self.settled.set_result(None)

    def _too_slow(self) -> None:
        self.error = SpawnFailed("the launcher did not take its job in time", errno=110, step="launch")
        self._settle()
        self._link.kill_soon(self.mark)

    def note_pid(self, pid: int) -> None:
        """Init has forked it."""
        self.pid = pid
        if not self.known.done():
            self.known.set_result(None)

    def note_exit(self, event: ExitEvent) -> None:
        """Init has reaped the leader."""
        # An error that it sent before it ended may still be unread: the sockets are not ordered to each other.
        while not self.port.closed and not self.settled.done():
            before = self.port.closed
            self.port.readable()
            if self.port.closed == before and not self.settled.done():
                break
        self._settle()
        self.port.close()
        if not self.exited.done():
            self.exited.set_result(event)

    def abandon(self, error: Exception) -> None:
        """The VM is gone."""
        self.error = self.error or SpawnFailed("the VM ended", errno=0, step="launch")
        self._settle()
        self.note_pid(self.pid)
        self.port.close()
        if self.master_fd >= 0:
            os.close(self.master_fd)
            self.master_fd = -1
        if not self.exited.done():
            self.exited.set_exception(error)
            self.exited.exception()  # nobody may be waiting: that is no error


class Link:
    """A running VM, as the host's event loop sees it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self.loop = loop
        self.booted: asyncio.Future[Message] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.on_end: Callable[[], None] | None = None
        self.launches: dict[int, Launch] = {}
        self.spare_enabled = True
        self._port = Port(loop, sock, self._received, self._ended)
        self._marks = itertools.count(1)
        self._requests: dict[int, asyncio.Future[Message]] = {}
        self._request_ids = itertools.count(1)
        self._spare: Launch | None = None
        self._spare_timer: asyncio.TimerHandle | None = None
        self._closing: VmStopped | None = None

    # -- launches

    def launch(self, job: Message, fds: Sequence[int] = (), *, fake_root: bool = False) -> Launch:
        """Start `job` in a launcher: the spare one if there is one. `fds` are closed here, also on an error."""
        if self._port.closed:
            for fd in fds:
                os.close(fd)
            raise self.stopped_error()
        spare, self._spare = self._spare, None
        if fake_root or spare is None or spare.port.closed:
            if spare is not None and not spare.port.closed:
                self._spare = spare
            spare = self._fork(fake_root=fake_root)
        spare.start(job, fds)
        return spare

    def prepare_spare(self) -> None:
        """See to it that a launcher waits for the next job, for a while."""
        if not self.spare_enabled or self._port.closed:
            return
        if self._spare is None or self._spare.port.closed:
            self._spare = self._fork(fake_root=False)
        if self._spare_timer is None:
            self._spare_timer = self.loop.call_later(SPARE_SECONDS, self._drop_spare, self._last_mark)

    def _drop_spare(self, seen_mark: int) -> None:
        """The timer of the spare: it goes when no launch was made since the timer was set."""
        self._spare_timer = None
        if self._last_mark != seen_mark:
            self._spare_timer = self.loop.call_later(SPARE_SECONDS, self._drop_spare, self._last_mark)
        elif self._spare is not None:
            self._spare.port.close()
            self._spare = None

    _last_mark = 0

    def _fork(self, *, fake_root: bool) -> Launch:
        mark = self._last_mark = next(self._marks)
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        theirs.setblocking(True)
        launch = self.launches[mark] = Launch(self, mark, ours)
        request: Message = {"op": "launch", "mark": mark}
        if fake_root:
            request["fake_root"] = True
        self._port.send(request, [theirs.detach()])
        return launch

    # -- requests to init

    async def request(self, op: str, **arguments: Any) -> Message:
        """Ask init and return its answer. Raises VmStopped when the VM ends before."""
        return await self._ask(op, arguments)

    def _ask(self, op: str, arguments: Message) -> asyncio.Future[Message]:
        number = next(self._request_ids)
        future: asyncio.Future[Message] = self.loop.create_future()
        if self._port.closed:
            raise self.stopped_error()
        self._requests[number] = future
        self._port.send({"op": op, "id": number, **arguments})
        return future

    def kill_soon(self, mark: int) -> None:
        """Have init kill a whole lineage; its exit event tells when that is done."""
        if not self._port.closed:
            self._ask("kill", {"mark": mark}).add_done_callback(_consume)

    # -- what comes from init

    def _received(self, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        try:
            if "id" in message:
                future = self._requests.pop(int(message["id"]), None)
                if future is not None and not future.done():
                    future.set_result(message)
            else:
                _EVENTS[message["ev"]](self, message)
        except (KeyError, TypeError, ValueError):
            # Init is ours, so this is either a defect or a guest that took it over: it gets no second word.
            self._ended()

    def _on_exited(self, message: Message) -> None:
        launch = self.launches.pop(int(message["mark"]), None)
        if launch is None:
            return
        orphans = tuple((int(pid), str(command)) for pid, command in message["orphans"])
        pid = int(message["pid"])
        launch.note_pid(pid)
        event = ExitEvent(
            pid, int(message["status"]), float(message["cpu_ms"]), int(message["maxrss"]), orphans
        )
        launch.note_exit(event)
        if launch is self._spare:
            self._spare = None

    def _on_launched(self, message: Message) -> None:
        launch = self.launches.get(int(message["mark"]))
        if launch is not None:
            launch.note_pid(int(message["pid"]))

    def _on_launch_failed(self, message: Message) -> None:
        launch = self.launches.pop(int(message["mark"]), None)
        if launch is None:
            return
        number = int(message["errno"] or 0)
        launch.error = SpawnFailed(os.strerror(number), errno=number, step="fork")
        launch.note_exit(ExitEvent(0, 127 << 8, 0.0, 0, ()))

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
        if self._spare_timer:
            self._spare_timer.cancel()
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
        launches, self.launches = list(self.launches.values()), {}
        for launch in launches:
            launch.abandon(self.stopped_error())
        if not self.ended.done():
            self.ended.set_result(None)
        if self.on_end:
            self.on_end()


_EVENTS: dict[str, Callable[[Link, Message], None]] = {
    "exited": Link._on_exited,
    "launched": Link._on_launched,
    "launch_failed": Link._on_launch_failed,
    "booted": Link._on_booted,
    "boot_failed": Link._on_boot_failed,
}


def _consume(future: asyncio.Future[Message]) -> None:
    if not future.cancelled():
        future.exception()


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
