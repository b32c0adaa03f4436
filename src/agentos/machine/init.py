"""PID 1 of a VM: makes the VM by its plan, forks launchers, reaps everything, kills whole lineages, reports.

It runs no guest code and opens no path that a guest could have made (the launchers do, without privileges).
It ends when the host closes its channel or the zygote is gone, and the kernel then kills all that runs in
the VM. Only the standard library is imported.
"""

from __future__ import annotations

import itertools
import os
import resource
import select
import signal
import socket
import time
from types import FrameType
from typing import Any

from agentos.linux import proc
from agentos.machine.boot import Boot, Step, StepFailed
from agentos.machine.channel import BlockingChannel, ChannelBroken, Message
from agentos.machine.launcher import LINEAGE_BASE, Confinement, fork_launcher

_KILL_SECONDS = 5.0
_STOP_AFTER_PASSES = 20
_DEAD = ("Z", "X", "")
_ORPHANS_NAMED = 64


def _note_signal(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor has told the loop already; a handler must exist for it to be written to."""


class Init:
    """The loop of PID 1. It waits for the channel, a signal, or the end of the zygote; never on a timer."""

    def __init__(self, channel: BlockingChannel, lifeline: int, confinement: Confinement) -> None:
        self.channel = channel
        self.lifeline = lifeline
        self.confinement = confinement
        self.marks: dict[int, int] = {}
        """pid of each launcher, or the program that it became, -> its mark."""
        self.awaited: dict[int, list[int]] = {}
        """Mark -> ids of the requests to be answered when no process of that lineage is left."""
        self.children_fd = _open_children_list()

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
        """Do what the host asks. A request with an `id` is answered with that id."""
        answer = _REQUESTS[message["op"]](self, message, fds)
        if answer is not None:
            self.channel.send({"id": message["id"], **answer})

    def launch(self, message: Message, fds: list[int]) -> None:
        mark = int(message["mark"])
        sock = socket.socket(fileno=fds[0])
        try:
            pid = fork_launcher(sock, mark, self.confinement, fake_root=bool(message.get("fake_root")))
        except OSError as error:
            sock.close()
            self.channel.send({"ev": "launch_failed", "mark": mark, "errno": error.errno})
            return
        self.marks[pid] = mark
        self.channel.send({"ev": "launched", "mark": mark, "pid": pid})

    def signal_process(self, message: Message, fds: list[int]) -> Message:
        """A signal to one process, or with `group` to the process group that it leads. Only a launched one."""
        pid, number = int(message["pid"]), int(message["signal"])
        if pid not in self.marks:
            return {"sent": False}
        try:
            (os.killpg if message.get("group") else os.kill)(pid, number)
        except ProcessLookupError:
            return {"sent": False}
        return {"sent": True}

    def kill_lineage(self, message: Message, fds: list[int]) -> Message:
        """SIGKILL to every process that carries `mark`, until a whole look at the process table finds none."""
        mark = int(message["mark"])
        killed: set[int] = set()
        stopped: list[int] = []
        deadline = time.monotonic() + _KILL_SECONDS
        for number in itertools.count():
            members = [pid for pid in self.lineage(mark) if _state(pid) not in _DEAD]
            if not members or time.monotonic() > deadline:
                break
            if number == _STOP_AFTER_PASSES:
                # They fork faster than they are found. kill(-1) stops all at one instant, forks included.
                stopped = [pid for pid in proc.pids() if pid != 1 and _state(pid) not in ("T", *_DEAD)]
                os.kill(-1, signal.SIGSTOP)
                continue
            _kill_and_await(members, deadline)
            killed.update(members)
            self.reap()
        for pid in stopped:
            if pid not in killed:
                _kill(pid, signal.SIGCONT)
        return {"killed": len(killed), "survivors": len(members)}

    def usage(self, message: Message, fds: list[int]) -> Message:
        """CPU time of the living members of a lineage and of the children that they waited for."""
        return {"cpu_ms": sum(proc.cpu_ms(pid) for pid in self.lineage(int(message["mark"])))}

    def processes(self, message: Message, fds: list[int]) -> Message:
        """The VM's process table, without init and the launchers that still wait."""
        table = []
        for pid in proc.pids():
            if pid == 1:
                continue
            entry = proc.read_process(pid)
            if entry is not None:
                entry["mark"] = _mark_of(pid)
                table.append(entry)
        return {"processes": table}

    def await_end(self, message: Message, fds: list[int]) -> Message | None:
        """Answer when the lineage has died out: its last member, whoever its parent was, becomes init's to reap."""
        mark = int(message["mark"])
        if not self.lineage(mark):
            return {}
        self.awaited.setdefault(mark, []).append(int(message["id"]))
        return None

    def members(self, message: Message, fds: list[int]) -> Message:
        """The living members of a lineage, named."""
        return {"members": self.named_lineage(int(message["mark"]))}

    def lineage(self, mark: int) -> list[int]:
        """The pids of all processes that carry `mark`."""
        return [pid for pid in proc.pids() if pid != 1 and _mark_of(pid) == mark]

    def named_lineage(self, mark: int) -> list[list[Any]]:
        named: list[list[Any]] = []
        for pid in self.lineage(mark):
            entry = proc.read_process(pid)
            if entry is not None and entry["state"] != "Z" and len(named) < _ORPHANS_NAMED:
                named.append([pid, " ".join(entry["args"]) if entry["args"] else entry["comm"]])  # type: ignore[arg-type]
        return named

    def reap(self) -> None:
        """Collect every child that ended, and report those that a launch began."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0:
                break
            mark = self.marks.pop(pid, None)
            if mark is None:
                continue
            self.channel.send(
                {
                    "ev": "exited",
                    "mark": mark,
                    "pid": pid,
                    "status": status,
                    "cpu_ms": (usage.ru_utime + usage.ru_stime) * 1000,
                    "maxrss": usage.ru_maxrss * 1024,
                    "orphans": self.named_lineage(mark) if self.has_strangers() else [],
                }
            )

        for mark in [mark for mark in self.awaited if not self.lineage(mark)]:
            for number in self.awaited.pop(mark):
                self.channel.send({"id": number})

    def has_strangers(self) -> bool:
        """Whether init has a child that it did not launch: whoever outlives its parent becomes one."""
        if self.children_fd < 0:
            return True
        listed = os.pread(self.children_fd, 65536, 0)
        return any(int(pid) not in self.marks for pid in listed.split())


_REQUESTS: dict[str, Any] = {
    "launch": Init.launch,
    "signal": Init.signal_process,
    "kill": Init.kill_lineage,
    "usage": Init.usage,
    "processes": Init.processes,
    "members": Init.members,
    "await_end": Init.await_end,
}


def _open_children_list() -> int:
    try:
        return os.open("/proc/1/task/1/children", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _mark_of(pid: int) -> int:
    try:
        limit = resource.prlimit(pid, resource.RLIMIT_RTTIME)[1]
    except (ProcessLookupError, PermissionError):
        return -1
    return limit - LINEAGE_BASE if limit >= LINEAGE_BASE else -1


def _state(pid: int) -> str:
    try:
        return proc.parse_stat(proc.read_small(f"/proc/{pid}/stat", 4096))[2][0].decode()
    except (OSError, ValueError, IndexError):
        return ""


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


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def main(
    channel: BlockingChannel,
    lifeline: int,
    prepared: list[int],
    steps: list[Step],
    confinement: Confinement,
    booted: Message,
) -> int:
    """PID 1's whole life; `booted` is what it says when the VM is ready. Returns its exit code."""
    try:
        boot = Boot(prepared)
        boot.apply(steps)
        init = Init(channel, lifeline, confinement)
        channel.send(booted)
        init.run()
    except StepFailed as failure:
        channel.send(
            {"ev": "boot_failed", "step": failure.step, "errno": failure.errno, "text": failure.text}
        )
        return 1
    except ChannelBroken:
        return 0
    return 0
