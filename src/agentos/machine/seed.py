"""The process that is forked for every VM: it does nothing else, so that its memory stays shared with all of them.

A page that a process writes to after a fork is no longer shared with the child. The zygote writes to about
a megabyte while it makes a VM, which would become the VM's own. So the zygote keeps this child, from before
its first VM, and asks it for each fork. What is forked becomes the VM's first process: it joins the cgroup,
enters the namespaces, forks PID 1 and, as PID 1's parent, makes the VM by its plan and ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket

from agentos.linux import privileges, syscalls
from agentos.machine import init
from agentos.machine.boot import Boot, StepFailed
from agentos.machine.channel import BlockingChannel, ChannelBroken, read
from agentos.machine.confinement import Confinement
from agentos.machine.identity import IdRanges

_OTHER_NAMESPACES = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)


class Seed:
    """What every VM's first process needs to know."""

    def __init__(
        self, ids: IdRanges, lifeline: int, confinement: Confinement, *, has_cpu_groups: bool
    ) -> None:
        self.ids = ids
        self.has_cpu_groups = has_cpu_groups
        self.lifeline = lifeline
        self.confinement = confinement

    def start(self) -> socket.socket:
        """Fork the seed. One byte with two descriptors (the VM's channel, `sync`) on the socket makes it fork."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        if os.fork() == 0:
            try:
                signal.set_wakeup_fd(-1)
                _keep_only([theirs.fileno(), self.lifeline])
                if self.has_cpu_groups:
                    # Before the VM's own programs, however many want to run; only the VM's share of the CPU counts
                    # against others. Where it is not allowed, PID 1 waits its turn.
                    with contextlib.suppress(PermissionError):
                        os.setpriority(os.PRIO_PROCESS, 0, -20)
                self._serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        return ours

    def _serve(self, requests: socket.socket) -> None:
        # The kernel reaps what is forked here; PID 1 becomes the zygote's child when its parent ends.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            data, fds = read(requests)
            if not data:
                return
            try:
                if os.fork() == 0:
                    self._first_process(*fds)
            except OSError:
                pass  # the zygote sees `sync` end before anything was said on it
            for fd in fds:
                os.close(fd)

    def _first_process(self, channel_fd: int, sync_fd: int) -> None:
        """Never returns."""
        code = 1
        # If PID 1 ended while this is still its parent, it must remain for the zygote to reap.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _keep_only([channel_fd, sync_fd, self.lifeline])
        channel = BlockingChannel(socket.socket(fileno=channel_fd))
        try:
            self._make_vm(channel, BlockingChannel(socket.socket(fileno=sync_fd)))
            code = 0
        except StepFailed as failure:
            channel.send(
                {"ev": "boot_failed", "step": failure.step, "errno": failure.errno, "text": failure.text}
            )
        except ChannelBroken:
            pass  # the zygote has given up on this VM, and said why; or init has ended
        except OSError as error:
            text = "; ".join([str(error), *getattr(error, "__notes__", [])])
            channel.send({"ev": "boot_failed", "step": "namespaces", "errno": error.errno or 0, "text": text})
        finally:
            os._exit(code)

    def _make_vm(self, channel: BlockingChannel, sync: BlockingChannel) -> None:
        prepared = self._enter_namespaces(sync)
        to_init, from_boot = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        host_pid = os.fork()
        if host_pid == 0:
            _keep_only([channel.fileno(), self.lifeline, from_boot.fileno()])
            self._be_init(channel, from_boot)
        from_boot.close()
        sync.send({"host_pid": host_pid})
        message, _ = sync.receive()
        boot = BlockingChannel(to_init)
        made = Boot(prepared, boot)
        made.apply(message["plan"])
        boot.receive()
        booted = {"ev": "booted", "cgroup": message["cgroup"], "outlets": list(made.outlets)}
        channel.send(booted, [one.fileno() for one in made.outlets.values()])

    def _enter_namespaces(self, sync: BlockingChannel) -> list[int]:
        message, _ = sync.receive()
        for path in message["join"]:
            # By itself and before the user namespace: being moved by another process can take the kernel 10 ms.
            _write_zero(path)
        if message["owner"] is not None:
            # The kernel counts what is used in a user namespace to whoever made it, too: not to the host's root.
            privileges.become(message["owner"], message["owner"], capabilities=privileges.CAP_SYS_ADMIN)
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        userns = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        sync.send({"pid": os.getpid()}, [userns])
        os.close(userns)
        _, prepared = sync.receive()
        self.ids.take_root()
        # The cgroup joined before becomes the root of the cgroup namespace.
        syscalls.unshare(_OTHER_NAMESPACES)
        return prepared

    def _be_init(self, channel: BlockingChannel, from_boot: socket.socket) -> None:
        """Never returns."""
        code = 1
        try:
            os.setsid()
            syscalls.set_process_name("init")
            privileges.default_signals()
            privileges.set_undumpable()
            code = init.main(channel, self.lifeline, BlockingChannel(from_boot), self.confinement)
        finally:
            os._exit(code)


def _write_zero(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"0")
    except OSError as error:
        error.add_note(f"joining {path}")
        raise
    finally:
        os.close(fd)


def _keep_only(fds: list[int]) -> None:
    """Close every descriptor from 3 on but these."""
    start = 3
    for fd in sorted(fds):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, 1 << 20)
