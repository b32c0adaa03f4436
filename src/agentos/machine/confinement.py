"""What binds every process of a VM but its init: applied by init's forked children before they serve anything.

Each such child (a spawner, a file worker, a connector) is a session of its own without any descriptor but its
socket, without privileges to gain, under the system-call filter, and not traceable.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
from typing import Any

from agentos.linux import privileges, seccomp, syscalls
from agentos.machine.channel import BlockingChannel, ChannelBroken, Message

_KEPT_FD = 5
"""In a child: the namespace of the VM's root, after at most two descriptors of its own."""
_OOM_SCORE_ADJ = 500
SLICE_NS = 100_000
"""The shortest time slice that Linux takes, for init, its servants, and each program that they start (not for what
those start). It gives no more of the CPU, but sooner, where others in this VM or another want it all the time.
A program has it from its first instant: the kernel puts what is new on whichever CPU has less to do, and without it
that waits there until the other's time is up, several milliseconds.

Where everything has it, a fork bomb keeps commands of its own VM waiting for seconds: who has been interrupted while
holding a lock of the kernel waits for its turn among all the others.
"""


class Confinement:
    """How a VM's processes are bound, decided once by the zygote. `processes` is the limit of that name."""

    def __init__(self, mode: str, last_cap: int, filter_program: bytes) -> None:
        self.mode = mode
        self.last_cap = last_cap
        self.filter_program = filter_program
        self.root_namespace = -1
        """With a single id: the user namespace in which it is shown as root."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"mode": self.mode, "last_cap": self.last_cap, "filter": self.filter_program.hex()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Confinement:
        """From `to_json`'s values."""
        return cls(data["mode"], data["last_cap"], bytes.fromhex(data["filter"]))

    def bind(
        self, *, root: bool, processes: int, pass_on_priority: bool = False, killed_last: bool = False
    ) -> None:
        """Give up for good all that neither the VM's user nor, with `root`, its root may have.

        What it starts has the ordinary priority and time slice, unless with `pass_on_priority` its own, as init has
        them. With `killed_last` it is not killed before init when memory runs out.
        """
        if not killed_last:
            go_before_init()
        if not pass_on_priority:
            syscalls.sched_setattr(slice_ns=SLICE_NS, reset_on_fork=True)
        fake_root = root and self.mode == "single"
        if fake_root:
            syscalls.setns(_KEPT_FD, syscalls.CLONE_NEWUSER)
            os.close(_KEPT_FD)
        keep = privileges.ROOT_CAPS if root and not fake_root else 0
        privileges.drop_bounding(self.last_cap, keep=keep)
        privileges.set_limit(resource.RLIMIT_NPROC, processes)
        privileges.set_no_new_privs()
        seccomp.load(self.filter_program)

    def take_ids(self, uid: int, *, capabilities: int) -> None:
        """Become `uid` with `capabilities`, which execve(2) takes away again from any but root."""
        if self.mode == "single":
            syscalls.capset(capabilities, capabilities)
        else:
            privileges.become(uid, uid, capabilities=capabilities)
        privileges.set_undumpable()

    def take_file_ids(self, uid: int) -> None:
        """Access files as `uid`, without a capability; with several ids to choose from, out of reach of its signals."""
        if self.mode == "single":
            syscalls.capset(0, 0)
        else:
            os.setgroups([])
            syscalls.setfsgid(uid)
            syscalls.setfsuid(uid)
            syscalls.capset(0, 0)
        privileges.set_undumpable()


def go_before_init() -> None:
    """When memory runs out, this process and its descendants are killed rather than PID 1."""
    # An undumpable process's /proc files belong to the global root. Meanwhile the capabilities that it still has keep
    # the guest from tracing it, also where the guest has its id.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % _OOM_SCORE_ADJ)
    finally:
        os.close(fd)
        privileges.set_undumpable()


def fork_confined(fds: list[int], message: Message, confinement: Confinement, processes: int) -> int:
    """Fork a child that serves what `message` asks for on the socket `fds[0]`. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 125
    try:
        root = message["kind"] in ("spawner", "reserve") and message["uid"] == 0
        _forget_init(fds, confinement.root_namespace if root else -1)
        code = _serve(socket.socket(fileno=3), message, confinement, processes)
    finally:
        os._exit(code)


def _serve(sock: socket.socket, message: Message, confinement: Confinement, processes: int) -> int:
    from agentos.machine import (  # imported by init already: they import this module
        connector,
        fileserver,
        jobwire,
        reserve,
        spawner,
    )

    kind, uid = message["kind"], int(message["uid"])
    starts_programs = kind in ("spawner", "reserve")
    channel = BlockingChannel(sock, jobwire.unpack_job if starts_programs else None)
    beyond = reserve.FOR_ITSELF if kind == "reserve" else 0
    try:
        confinement.bind(
            root=starts_programs and uid == 0,
            processes=processes + beyond,
            pass_on_priority=starts_programs,
            killed_last=kind == "reserve",
        )
        os.umask(0o022)
        if kind == "spawner":
            spawner.serve(channel, uid, confinement)
        elif kind == "reserve":
            spawner.serve(channel, uid, confinement, reserve.Reserve(uid, processes, confinement))
        elif kind == "files":
            confinement.take_file_ids(uid)
            fileserver.serve(channel.sock.detach())
        else:
            confinement.take_ids(uid, capabilities=0)
            connector.serve(channel)
    except ChannelBroken:
        return 0
    except OSError as error:
        channel.send({"failed": kind, "errno": error.errno or 0, "step": f"confine: {error}"[:200]})
        return 1
    except Exception as error:  # a defect of ours: the host must hear of it
        channel.send({"failed": kind, "errno": 0, "step": f"defect: {error!r}"[:200]})
        return 1
    return 0


def _forget_init(fds: list[int], kept: int) -> None:
    """In the child: a session of its own, default signals, and no descriptor but `fds`, from 3 on, and `kept`."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    privileges.default_signals()
    if kept >= 0:
        kept = fcntl.fcntl(kept, fcntl.F_DUPFD_CLOEXEC, _KEPT_FD + 1)  # out of the way of what follows
    for target, fd in enumerate(sorted(fds), 3):
        if fd != target:
            os.dup2(fd, target, inheritable=False)
    if kept >= 0:
        os.dup2(kept, _KEPT_FD, inheritable=False)
    os.closerange(3 + len(fds), _KEPT_FD)
    os.closerange(_KEPT_FD + (kept >= 0), 1 << 20)
