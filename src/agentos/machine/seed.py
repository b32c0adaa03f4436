"""The process that is forked for every VM: an interpreter of its own, with nothing in it but what a VM needs.

A page that a process writes to after a fork is no longer shared with the child. So what the seed, a VM's first
process and init write to until init waits for its first request is memory that the VM keeps for itself, for as
long as it lives. In Python nearly everything writes: even to look at an object changes its reference count. So
the way from here to there is short, works with plain bytes and descriptors, and parses no message. Once init is
forked, its parent makes the VM by the plan (`boot`) and ends; what that needs goes with it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import socket
from os import (
    _exit,
    close,
    closerange,
    dup2,
    fork,
    getpid,
    setgroups,
    setresgid,
    setresuid,
    setsid,
    waitpid,
    write,
)

from agentos.linux import privileges, syscalls
from agentos.machine import init
from agentos.machine.boot import Boot, StepFailed
from agentos.machine.channel import BlockingChannel, ChannelBroken, read, send_some
from agentos.machine.confinement import SLICE_NS, Confinement

_CHANNEL, _BOOTED, _SPARE = 4, 5, 6
"""Descriptors of init, after the lifeline, which the zygote has given the number 3."""
_OWN_PROCESSES = 64
"""Of a VM, beyond what its two users may have: init, its servants, and what the reserve starts."""
_WITH_ROOT_NAMESPACE = b"r"
"""Says to init that the boot is over, and that the last descriptor is the namespace of the VM's root."""
_OTHER_NAMESPACES = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)


def main(lifeline: int, requests_fd: int) -> None:
    """The seed's whole life. `lifeline` ends with the zygote; it is for the VMs to watch."""
    privileges.default_signals()
    requests = socket.socket(fileno=requests_fd)
    try:
        message, _ = BlockingChannel(requests).receive()
    except ChannelBroken:
        return
    confinement = Confinement.from_json(message)
    syscalls.sched_setattr(slice_ns=SLICE_NS)
    if message["urgent"]:
        # However many programs want to run; only the VM's share of the CPU counts against others. Where it is not
        # allowed, PID 1 waits its turn.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
    # Pages that the VMs share stay shared only while nobody writes to them, and a collection would.
    gc.disable()
    gc.freeze()
    serve(requests, lifeline, confinement)


def serve(requests: socket.socket, lifeline: int, confinement: Confinement) -> None:
    """Fork a VM's first process for each request. PID 1 becomes the zygote's child when that process ends.

    A request is the limit of processes and the owner of the user namespace (or -1), as text, with descriptors:
    the VM's channel, `sync`, and the control files of cgroups to join. On `sync` go out the pid and a descriptor
    of the user namespace; any byte in return says that its id maps are written; then come messages.
    """
    unreaped = 0
    while True:
        data, fds = read(requests, 64)
        if not data:
            return
        while unreaped and waitpid(-1, os.WNOHANG)[0]:
            unreaped -= 1
        try:
            pid = fork()
            if pid == 0:
                _be_first_process(data, fds, lifeline, confinement)
            unreaped += 1
        except OSError:
            pass  # the zygote sees `sync` end before anything was said on it
        for fd in fds:
            close(fd)


def _be_first_process(data: bytes, fds: list[int], lifeline: int, confinement: Confinement) -> None:
    """Never returns."""
    code = 1
    try:
        channel_fd, sync_fd = fds[0], fds[1]
        processes, owner = data.split()
        sync = socket.socket(fileno=sync_fd)
        for fd in fds[2:]:
            # By itself and before the user namespace: being moved by another process can take the kernel 10 ms.
            write(fd, b"0")
        if _enter_namespaces(sync, int(owner), confinement.mode, int(processes)):
            code = _fork_init(channel_fd, lifeline, sync, int(processes), confinement)
    except OSError as error:
        _report(channel_fd, "namespaces", error)
    finally:
        _exit(code)


def _enter_namespaces(sync: socket.socket, owner: int, mode: str, processes: int) -> bool:
    """False when the zygote has given up on this VM, and said why."""
    if owner >= 0:
        # The kernel counts what is used in a user namespace to whoever made it, too: not to the host's root.
        privileges.become(owner, owner, capabilities=privileges.CAP_SYS_ADMIN)
        # What the maker of a user namespace may have is the limit of all that is in it, whoever that becomes there:
        # the limit of each of its users alone would be none for a root that can be many.
        privileges.set_limit(resource.RLIMIT_NPROC, 2 * processes + _OWN_PROCESSES)
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    userns = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    send_some(sync, b"%d" % getpid(), [userns])
    close(userns)
    if not sync.recv(1):
        return False
    if mode != "single":
        # With a single id, that id has all capabilities already.
        setgroups([])
        setresgid(0, 0, 0)
        setresuid(0, 0, 0)
    # The cgroup joined before becomes the root of the cgroup namespace.
    syscalls.unshare(_OTHER_NAMESPACES)
    return True


def _fork_init(
    channel_fd: int, lifeline: int, sync: socket.socket, processes: int, confinement: Confinement
) -> int:
    """Fork PID 1, then make the VM around it. Returns the exit code."""
    to_init, from_boot = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    host_pid = fork()
    if host_pid == 0:
        _be_init(channel_fd, lifeline, from_boot.fileno(), processes, confinement)
    from_boot.close()
    try:
        _make_vm(host_pid, BlockingChannel(sync), to_init, channel_fd)
        return 0
    except StepFailed as failure:
        _report(channel_fd, failure.step, failure.error)
    except ChannelBroken:
        pass  # the zygote has given up on this VM, and said why
    except OSError as error:
        _report(channel_fd, "boot", error)
    return 1  # init sees `to_init` end before anything was said on it


def _make_vm(host_pid: int, zygote: BlockingChannel, to_init: socket.socket, channel_fd: int) -> None:
    zygote.send({"host_pid": host_pid})
    message, prepared = zygote.receive()
    boot = Boot(prepared, host_pid)
    boot.apply(message["plan"])
    send_some(to_init, _WITH_ROOT_NAMESPACE if boot.has_root_namespace else b"b", boot.kept_fds)
    channel = BlockingChannel(socket.socket(fileno=channel_fd))
    booted = {"ev": "booted", "cgroup": message["cgroup"], "outlets": list(boot.outlets)}
    channel.send(booted, [one.fileno() for one in boot.outlets.values()])


def _report(channel_fd: int, step: str, error: OSError) -> None:
    text = "; ".join([str(error), *getattr(error, "__notes__", [])])
    try:
        channel = BlockingChannel(socket.socket(fileno=channel_fd))
        channel.send({"ev": "boot_failed", "step": step, "errno": error.errno or 0, "text": text})
    except OSError:
        pass  # nobody waits for it any more


def _be_init(channel_fd: int, lifeline: int, boot_fd: int, processes: int, confinement: Confinement) -> None:
    """Never returns."""
    code = 1
    try:
        setsid()
        syscalls.set_process_name("init")
        privileges.set_undumpable()
        _keep_only(channel_fd, boot_fd)
        # Until the VM is whole nobody may have anything done in it.
        boot_end = socket.socket(fileno=_BOOTED)
        booted, kept = read(boot_end, 1)
        boot_end.close()
        if booted == _WITH_ROOT_NAMESPACE:
            confinement.root_namespace = kept[-1]
        if booted:
            code = _wait_for_work(lifeline, processes, confinement)
    finally:
        _exit(code)


def _keep_only(channel_fd: int, boot_fd: int) -> None:
    """The sockets that this process has been forked with are not closed one by one: they are not used any more."""
    dup2(boot_fd, _SPARE, False)
    dup2(channel_fd, _CHANNEL, False)
    dup2(_SPARE, _BOOTED, False)
    closerange(_BOOTED + 1, 1 << 20)


def _wait_for_work(lifeline: int, processes: int, confinement: Confinement) -> int:
    """PID 1 of a VM of which nothing was asked yet."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(_CHANNEL, select.POLLIN)
    for fd, _ in poll.poll():
        if fd == lifeline:
            return 0
    return init.main(_CHANNEL, lifeline, processes, confinement)
