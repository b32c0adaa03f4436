"""PID 1 of a VM: forks its confined servants, kills whole lineages, looks at the table.

It runs no guest code and opens no path that a guest could have made: its children do, without privileges
(`spawner` starts programs, `fileserver` touches files). It ends when the host closes its channel or the
zygote is gone, and the kernel then kills all that runs in the VM. Only the standard library is imported.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import deque
from types import FrameType
from typing import Any

from agentos.linux import proc
from agentos.machine import connector, fileserver, spawner  # noqa: F401  # loaded once, for every fork
from agentos.machine.channel import BlockingChannel, ChannelBroken, Message
from agentos.machine.confinement import Confinement, fork_confined

_KILL_SECONDS = 5.0
_STOP_ALL_SECONDS = 0.2
"""A kill that takes longer stops every process of the VM meanwhile: they take the CPU from it, or fork faster."""
_LOOKS = 20
_CHASES = 50
_MEMBERS_NAMED = 64
_ENDS_REMEMBERED = 256
_PAGE_CHARS = 128 * 1024
"""Characters of the process table that travel at once; as JSON, one may take six bytes."""
_ENTRY_CHARS = 300
"""Of an entry, beside what is in it."""
_LOST = [int(signal.SIGKILL), 0, 0]
"""The end of a program of which nobody is left to tell: all that is known is that somebody killed there."""


class Init:
    """The loop of PID 1. It waits for the channel, a signal, or the end of the zygote; never on a timer."""

    def __init__(
        self, channel: BlockingChannel, lifeline: int, confinement: Confinement, processes: int
    ) -> None:
        self.channel = channel
        self.lifeline = lifeline
        self.confinement = confinement
        self.processes_limit = processes
        self.servants: dict[int, int] = {}
        """pid of each confined child -> the number that the host gave it."""
        self.adopted: dict[int, int] = {}
        """pid of a program whose spawner is gone -> number of its job."""
        self.ends: deque[tuple[int, list[int]]] = deque(maxlen=_ENDS_REMEMBERED)
        """The latest ends of children that were not known, by pid, in case they are asked for."""
        self.awaited: dict[int, list[int]] = {}
        """Mark -> ids of the requests to be answered when no process of that lineage is left."""
        self.held: list[int] = []

    def run(self) -> None:
        """Serve until the channel or the lifeline ends."""
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note_signal)
        poll = select.poll()
        poll.register(self.channel.fileno(), select.POLLIN)
        poll.register(self.lifeline, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        self.reap()
        while True:
            for fd, _ in poll.poll():
                if fd == wake_read:
                    os.read(wake_read, 4096)
                    self.reap()
                elif fd == self.lifeline:
                    return
                else:
                    for message, fds in self.channel.receive_some():
                        self.handle(message, fds)

    def handle(self, message: Message, fds: list[int]) -> None:
        """Do what the host asks. A request with an `id` is answered with that id, at once or later."""
        answer = _REQUESTS[message["op"]](self, message, fds)
        if answer is not None:
            self.channel.send({"id": message["id"], **answer})

    def fork(self, message: Message, fds: list[int]) -> None:
        """Fork a servant on the socket that came along. Its failure is told on that socket."""
        try:
            pid = fork_confined(fds, message, self.confinement, self.processes_limit)
            self.servants[pid] = int(message["number"])
        except OSError as error:
            failed = {"failed": message["kind"], "errno": error.errno or 0, "step": "fork"}
            BlockingChannel(socket.socket(fileno=os.dup(fds[0]))).send(failed)
        finally:
            for fd in fds:
                os.close(fd)

    def end_servant(self, message: Message, fds: list[int]) -> None:
        """SIGKILL to a servant that no longer serves, for instance because the guest has stopped it."""
        for pid, number in self.servants.items():
            if number == int(message["number"]):
                _kill(pid, signal.SIGKILL)

    def signal_process(self, message: Message, fds: list[int]) -> None:
        """A signal to an adopted program, or with `group` to the process group that it leads."""
        pid = int(message["pid"])
        if pid in self.adopted:
            _kill(pid, int(message["signal"]), group=bool(message.get("group")))

    def kill_all(self, message: Message, fds: list[int]) -> None:
        """SIGKILL to everything but init, at one moment: nothing can fork out of it. Servants are made anew at need."""
        _kill(-1, signal.SIGKILL)

    def adopt(self, message: Message, fds: list[int]) -> None:
        """A spawner is gone: from now on report the ends of the programs that it had started."""
        known = dict(self.ends)
        for number, pid in message["jobs"]:
            if pid in known:
                self.channel.send({"ev": "exited", "exited": number, "end": known[pid]})
            elif not os.path.exists(f"/proc/{pid}"):
                # Its spawner had reaped it, and was killed before it said so.
                self.channel.send({"ev": "exited", "exited": number, "end": _LOST})
            else:
                self.adopted[pid] = number

    def kill_lineage(self, message: Message, fds: list[int]) -> Message:
        """SIGKILL to every process that carries `mark`, until a look that can have missed none finds none."""
        mark = int(message["mark"])
        killed: set[int] = set()
        stopped: list[int] = []
        members: list[int] = []
        began = time.monotonic()
        deadline = began + _KILL_SECONDS
        patience: float | None = began + _STOP_ALL_SECONDS
        while True:
            try:
                members, all_seen = self.look(mark, patience)
            except TimeoutError:
                # kill(-1) stops all at one instant, forks included.
                stopped, patience = self.stop_all(), None
                continue
            if (all_seen and not members) or time.monotonic() > deadline:
                break
            _kill_and_await(members, deadline)
            killed.update(members)
            self.reap()
        for pid in stopped:
            if pid not in killed:
                _kill(pid, signal.SIGCONT)
        return {"killed": len(killed), "survivors": len(members)}

    def stop_all(self) -> list[int]:
        """SIGSTOP to every process of the VM but this one; the pids of those that are to go on afterwards.

        Servants go on by themselves: see `reap`.
        """
        before = {pid for pid in proc.pids() if _state(pid) == "T"}
        _kill(-1, signal.SIGSTOP)
        return [pid for pid in proc.pids() if pid != 1 and pid not in before]

    def hold(self, message: Message, fds: list[int]) -> None:
        """Stop all that runs in the VM, so that a servant forked next cannot be killed before it has done its work."""
        self.held = self.stop_all()

    def let_go(self, message: Message, fds: list[int]) -> None:
        """Have it go on: the youngest first, as a parent may look for stopped children."""
        while self.held:
            _kill(self.held.pop(), signal.SIGCONT)

    def usage(self, message: Message, fds: list[int]) -> Message:
        """CPU time of the living members of a lineage and of the children that they waited for."""
        return {"cpu_ms": sum(proc.cpu_ms(pid) for pid in self.lineage(int(message["mark"])))}

    def processes(self, message: Message, fds: list[int]) -> Message:
        """A page of the VM's process table from above pid `after`, without init and its servants."""
        table: list[dict[str, object]] = []
        chars = 0
        for pid in proc.pids():
            if pid <= max(1, int(message["after"])) or pid in self.servants:
                continue
            if chars > _PAGE_CHARS:
                return {"processes": table, "more": True}
            entry = proc.read_process(pid)
            if entry is not None:
                table.append(entry)
                chars += _ENTRY_CHARS + sum(len(str(value)) for value in entry.values())
        return {"processes": table, "more": False}

    def members(self, message: Message, fds: list[int]) -> Message:
        """The living members of a lineage, named; of servant `left_by`, which is going, only what it has started.

        Its mark may be another lineage's by now: it was free when the servant went, until the next one took it.
        """
        left_by = message.get("left_by")
        named: list[list[Any]] = []
        for pid in self.living(int(message["mark"])):
            entry = proc.read_process(pid)
            if entry is None or not (left_by is None or self.is_left(entry["ppid"], left_by)):
                continue
            if len(named) < _MEMBERS_NAMED:
                args = entry["args"]
                named.append([pid, " ".join(args) if args else entry["comm"]])  # type: ignore[arg-type]
        return {"members": named}

    def is_left(self, parent: Any, number: int) -> bool:
        """Whether who has this parent is a child of the servant `number`, or was until that went."""
        return parent == 1 or self.servants.get(parent) == number

    def await_end(self, message: Message, fds: list[int]) -> Message | None:
        """Answer when the lineage has died out, where its processes are init's to reap."""
        mark = int(message["mark"])
        if not self.living(mark):
            return {}
        self.awaited.setdefault(mark, []).append(int(message["id"]))
        return None

    def lineage(self, mark: int, until: float | None = None) -> list[int]:
        """The pids of all processes that carry `mark`. TimeoutError after monotonic `until`."""
        found = []
        for pid in proc.pids():
            if until is not None and time.monotonic() > until:
                raise TimeoutError
            if self.carries(pid, mark):
                found.append(pid)
        return found

    def carries(self, pid: int, mark: int) -> bool:
        """Whether a process is of the lineage `mark`."""
        return pid != 1 and pid not in self.servants and _mark_of(pid) == mark

    def look(self, mark: int, until: float | None = None) -> tuple[list[int], bool]:
        """The living members of a lineage, and whether none can have been missed. TimeoutError after `until`.

        Who forks and ends while the table is read may be in it neither as parent nor as child. But the child
        has a pid above all that there were before, so those are looked at until there are no newer ones.
        """
        newest = _newest_pid()
        members = [pid for pid in self.lineage(mark, until) if _alive(pid)]
        for _ in range(_CHASES):
            before, newest = newest, _newest_pid()
            if newest <= before:
                return members, newest == before
            new = [pid for pid in range(before + 1, newest + 1) if self.carries(pid, mark) and _alive(pid)]
            members += [pid for pid in new if pid not in members]
        return members, False

    def living(self, mark: int) -> list[int]:
        """The living members of a lineage: some of them, if there are any."""
        members: list[int] = []
        for _ in range(_LOOKS):
            members, all_seen = self.look(mark)
            if members or all_seen:
                break
        return members

    def reap(self) -> None:
        """Collect every child that ended, and report adopted programs."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if os.WIFSTOPPED(status):
                # A servant has the guest's user id, so the guest may stop it: not for long.
                if pid in self.servants:
                    _kill(pid, signal.SIGCONT)
                continue
            if pid in self.servants:
                del self.servants[pid]
                continue
            end = spawner.end_of(status, usage)
            if pid in self.adopted:
                self.channel.send({"ev": "exited", "exited": self.adopted.pop(pid), "end": end})
            else:
                self.ends.append((pid, end))
        for mark in [mark for mark in self.awaited if not self.living(mark)]:
            for number in self.awaited.pop(mark):
                self.channel.send({"id": number})


_REQUESTS: dict[str, Any] = {
    "fork": Init.fork,
    "end_servant": Init.end_servant,
    "signal": Init.signal_process,
    "kill_all": Init.kill_all,
    "hold": Init.hold,
    "let_go": Init.let_go,
    "adopt": Init.adopt,
    "kill": Init.kill_lineage,
    "usage": Init.usage,
    "processes": Init.processes,
    "members": Init.members,
    "await_end": Init.await_end,
}


def _note_signal(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor has told the loop already; a handler must exist for it to be written to."""


def _mark_of(pid: int) -> int:
    """The inode number of a process's cgroup namespace: see `spawner`."""
    try:
        return os.stat(f"/proc/{pid}/ns/cgroup").st_ino
    except OSError:
        pass
    # A process may go on after its first thread has ended; the others know where they are.
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return -1
    for thread in threads:
        try:
            return os.stat(f"/proc/{pid}/task/{thread}/ns/cgroup").st_ino
        except OSError:
            pass
    return -1


def _newest_pid() -> int:
    """The pid that was given last in this pid namespace, to a process or thread: proc_loadavg(5)."""
    return int(proc.read_small("/proc/loadavg", 256).split()[-1])


def _alive(pid: int) -> bool:
    return _state(pid) != ""


def _state(pid: int) -> str:
    """The kernel's letter for a process, nothing for one that is dead in all its threads."""
    try:
        fields = proc.parse_stat(proc.read_small(f"/proc/{pid}/stat", 4096))[2]
        state, threads = fields[0].decode(), int(fields[17])
    except (OSError, ValueError, IndexError):
        return ""
    return state if state not in ("Z", "X") or threads > 1 else ""


def _kill_and_await(members: list[int], deadline: float) -> None:
    """SIGKILL to all of `members`, then wait for the kernel to say that each has ended."""
    pidfds = []
    for pid in members:
        try:
            pidfds.append(os.pidfd_open(pid))
        except OSError:
            pass  # gone already, or no descriptor left: the next look at the table finds it
        _kill(pid, signal.SIGKILL)
    waiting = select.poll()
    for pidfd in pidfds:
        waiting.register(pidfd, select.POLLIN)
    left = len(pidfds)
    while left and (remaining := deadline - time.monotonic()) > 0:
        for pidfd, _ in waiting.poll(remaining * 1000):
            waiting.unregister(pidfd)
            left -= 1
    for pidfd in pidfds:
        os.close(pidfd)


def _kill(pid: int, number: int, *, group: bool = False) -> None:
    try:
        (os.killpg if group else os.kill)(pid, number)
    except ProcessLookupError:
        pass


def main(channel_fd: int, lifeline: int, processes: int, confinement: Confinement) -> int:
    """PID 1's life from the first request on. Returns its exit code."""
    try:
        Init(BlockingChannel(socket.socket(fileno=channel_fd)), lifeline, confinement, processes).run()
    except ChannelBroken:
        pass
    return 0
