"""The process that forks VMs: small, single-threaded, started once by the host process.

The host asks over its control socket; every answer about a VM goes over that VM's own channel. For each
VM the zygote forks a child, which unshares a user namespace, is given its ids and cgroup from outside,
unshares the rest and forks PID 1. The zygote reaps the VMs, gives their cgroups back, and then closes
their `gone` descriptor, so that the host knows that nothing is left. When the host ends, however it ends,
the zygote ends every VM and removes what the host had made. Only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
from types import FrameType
from typing import Any

from agentos.linux import binfmt, cgroups, mounts, privileges, syscalls
from agentos.machine import identity, init, template
from agentos.machine.channel import BlockingChannel, ChannelBroken, Message
from agentos.machine.confinement import Confinement

_OTHER_NAMESPACES = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)


class Vm:
    """What the zygote holds for one VM until all of it is gone."""

    def __init__(self, cgroup: cgroups.Cgroup, gone_fd: int, slot: int, sync: socket.socket) -> None:
        self.cgroup = cgroup
        self.gone_fd = gone_fd
        self.slot = slot
        self.sync: socket.socket | None = sync
        """Brings PID 1's host pid, or ends without it when PID 1 could not be made."""


class Zygote:
    """The loop of the zygote. It waits for the host, for the ends of children, and for the host's end."""

    def __init__(
        self, control: BlockingChannel, config: Message, ids: identity.IdRanges, scope: cgroups.Scope
    ) -> None:
        self.control = control
        self.ids = ids
        self.scope = scope
        self.confinement = Confinement(
            ids.mode, privileges.last_capability(), bytes.fromhex(config["filter"])
        )
        self.host_pidfd = os.pidfd_open(int(config["host_pid"]))
        self.lifeline_read, self.lifeline_write = os.pipe2(os.O_CLOEXEC)
        self.vms: dict[int, Vm] = {}
        """Host pid of PID 1 -> its VM."""
        self.starting: dict[int, Vm] = {}
        """Descriptor of `sync` -> VM whose PID 1 is not known yet."""
        self.poll = select.poll()

    def run(self) -> None:
        """Serve until the host is gone; then leave nothing behind."""
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note_signal)
        control_fd = self.control.fileno()
        for fd in (control_fd, self.host_pidfd, wake_read):
            self.poll.register(fd, select.POLLIN)
        try:
            while True:
                for fd, _ in self.poll.poll():
                    if fd == wake_read:
                        os.read(wake_read, 4096)
                        self.reap()
                    elif fd == self.host_pidfd:
                        return
                    elif fd in self.starting:
                        self.learn_pid(fd)
                    elif fd == control_fd:
                        for message, fds in self.control.receive_some():
                            self.create(message, fds)
                    # else: reap() has learned this pid already, in the same round.
        except ChannelBroken:
            return
        finally:
            self.end_all()

    def create(self, message: Message, fds: list[int]) -> None:
        """Fork one VM. `fds`: its channel, and the descriptor to close when all of it is gone."""
        channel = BlockingChannel(socket.socket(fileno=fds[0]))
        try:
            self._create(message, channel, fds[1])
        except OSError as error:
            notes = "; ".join([str(error), *getattr(error, "__notes__", [])])
            with contextlib.suppress(OSError):
                channel.send(
                    {"ev": "boot_failed", "step": "create", "errno": error.errno or 0, "text": notes}
                )
            os.close(fds[1])
        finally:
            channel.close()

    def _create(self, message: Message, channel: BlockingChannel, gone_fd: int) -> None:
        slot = self.ids.take_slot()
        try:
            cgroup = self.scope.create(str(message["name"]), **message["limits"])
        except OSError:
            self.ids.give_back(slot)
            raise
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        child = os.fork()
        if child == 0:
            _in_child(self, message, channel, theirs, cgroup)
        theirs.close()
        vm = Vm(cgroup, gone_fd, slot, ours)
        try:
            sync = BlockingChannel(ours)
            sync.receive()
            self.ids.write_maps(child, slot)
            prepared = self._prepare_mounts(message["plan"], child)
            sync.send({"mapped": True}, prepared)
            for fd in prepared:
                os.close(fd)
        except (OSError, ChannelBroken) as error:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            ours.close()
            self.scope.release(cgroup)
            self.ids.give_back(slot)
            if not isinstance(error, ChannelBroken):
                raise
            # The child has said on the VM's channel what it could not do.
            os.close(gone_fd)
            return
        self.starting[ours.fileno()] = vm
        self.poll.register(ours.fileno(), select.POLLIN)

    def _prepare_mounts(self, plan: list[Any], child: int) -> list[int]:
        """Mounts seen through the VM's ids: only who is privileged over their file systems can make them."""
        wanted = [step[1] for step in plan if step[0] == "bind" and step[1].get("idmap")]
        if not wanted:
            return []
        userns = os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        made: list[int] = []
        try:
            for step in wanted:
                bits = mounts.attribute_bits(step["attributes"])
                made.append(mounts.clone(step["source"], bits, recursive=False, userns_fd=userns))
        except OSError:
            for fd in made:
                os.close(fd)
            raise
        finally:
            os.close(userns)
        return made

    def learn_pid(self, fd: int) -> None:
        """The first child has forked PID 1 and says its host pid, or it ended without."""
        vm = self.starting.pop(fd)
        self.poll.unregister(fd)
        assert vm.sync is not None
        try:
            message, _ = BlockingChannel(vm.sync).receive()
            self.vms[int(message["host_pid"])] = vm
        except ChannelBroken:
            self.finish(vm)
        finally:
            vm.sync.close()
            vm.sync = None

    def reap(self) -> None:
        """Collect every child that ended. A PID 1 ends only when its whole pid namespace is dead."""
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in self.vms and self.starting:
                # PID 1 became our child when its parent ended, and the parent had said its pid before that.
                for fd in _readable(list(self.starting)):
                    self.learn_pid(fd)
            vm = self.vms.pop(pid, None)
            if vm is not None:
                self.finish(vm)

    def finish(self, vm: Vm) -> None:
        """Nothing of the VM is left: its cgroup and ids may serve again, and the host may know."""
        self.scope.release(vm.cgroup)
        self.ids.give_back(vm.slot)
        os.close(vm.gone_fd)

    def end_all(self) -> None:
        """Kill every VM, wait until each is gone, and remove the cgroups."""
        signal.set_wakeup_fd(-1)
        os.close(self.lifeline_write)
        for fd in list(self.starting):
            self.learn_pid(fd)
        for host_pid in self.vms:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host_pid, signal.SIGKILL)
        for host_pid in list(self.vms):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(host_pid, 0)
            self.finish(self.vms.pop(host_pid))
        self.scope.close()


def _note_signal(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor has told the loop already; a handler must exist for it to be written to."""


def _readable(fds: list[int]) -> list[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(0)]


def _in_child(
    zygote: Zygote,
    message: Message,
    channel: BlockingChannel,
    sync_socket: socket.socket,
    cgroup: cgroups.Cgroup,
) -> None:
    """The short-lived process between zygote and PID 1. Never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        _keep_only([channel.fileno(), sync_socket.fileno(), zygote.lifeline_read])
        sync = BlockingChannel(sync_socket)
        # By itself and before the user namespace: being moved by another process can take the kernel 10 ms.
        cgroup.join()
        prepared = _enter_namespaces(zygote, sync)
        host_pid = os.fork()
        if host_pid == 0:
            sync.close()
            code = _be_init(zygote, message, cgroup, channel, prepared)
        else:
            sync.send({"host_pid": host_pid})
            code = 0
    except ChannelBroken:
        pass  # the zygote has given up on this VM, and said why
    except OSError as error:
        notes = "; ".join([str(error), *getattr(error, "__notes__", [])])
        channel.send({"ev": "boot_failed", "step": "namespaces", "errno": error.errno or 0, "text": notes})
    finally:
        os._exit(code)


def _enter_namespaces(zygote: Zygote, sync: BlockingChannel) -> list[int]:
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    sync.send({"unshared": "user"})
    _, prepared = sync.receive()
    zygote.ids.take_root()
    # The cgroup joined before becomes the root of the cgroup namespace.
    syscalls.unshare(_OTHER_NAMESPACES)
    return prepared


def _be_init(
    zygote: Zygote, message: Message, cgroup: cgroups.Cgroup, channel: BlockingChannel, prepared: list[int]
) -> int:
    os.setsid()
    syscalls.set_process_name("init")
    privileges.default_signals()
    privileges.set_undumpable()
    booted = {"ev": "booted", "cgroup": cgroup.to_dict()}
    return init.main(channel, zygote.lifeline_read, prepared, message["plan"], zygote.confinement, booted)


def _keep_only(fds: list[int]) -> None:
    """Close every descriptor from 3 on but these."""
    start = 3
    for fd in sorted(fds):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, 1 << 20)


def _probe(config: Message) -> tuple[identity.IdRanges, Message]:
    """Find out by trying what this host allows, and build the template for it."""
    ids = identity.acquire()
    mode = ids.mode
    if mode == "root":
        syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    stage = template.choose_stage()
    software = template.host_software()
    template.build(stage, guest_dir=config["guest_dir"], software=software)
    idmap = mode == "root" and identity.idmap_works([f"{stage}/skeleton", *software])
    owner, user = ids.on_disk(idmap)
    template.give_to(stage, owner, user)
    facts: Message = {
        "mode": mode, "stage": stage, "idmap": idmap, "host_dirs": software, "package_dirs": software,
        "binfmt_misc": _provide_wasm(mode, config["wasm_rule"]), **template.proc_facts(config),
    }  # fmt: skip
    facts["extra_mounts"] = template.install_extras(stage, config)
    return ids, facts


def _provide_wasm(mode: str, rule: str) -> bool:
    """Whether each VM can register the runner of .wasm files. For an ordinary user it is registered here, for all.

    A user namespace without a binfmt_misc of its own has that of the one above; and where a VM has no uid 0,
    nobody there may write to its own.
    """
    if mode == "root":
        return identity.works_in_namespace(lambda: binfmt.register(rule))
    with contextlib.suppress(OSError):
        binfmt.register(rule)  # the descriptor stays open as long as the zygote
    return False


def main(control_fd: int) -> None:
    """Run the zygote on its control socket. The first message configures it, the answer says what it found."""
    control = BlockingChannel(socket.socket(fileno=control_fd))
    privileges.default_signals()
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    try:
        config, _ = control.receive()
        step = "cgroups"
        try:
            # Before a user namespace is entered: what may be written to there is the user's own right.
            setup = cgroups.detect(owner_pid=os.getppid())
            cgroups.sweep_stale(setup)
            scope = cgroups.open_scope(setup)
            step = "host"
            ids, facts = _probe(config)
            zygote = Zygote(control, config, ids, scope)
        except OSError as error:
            notes = "; ".join([str(error), *getattr(error, "__notes__", [])])
            control.send({"failed": step, "errno": error.errno or 0, "text": notes})
            return
        control.send({"facts": facts, "cgroups": setup.describe()})
        # Pages that the VMs share stay shared only while nobody writes to them, and a collection would.
        gc.disable()
        gc.freeze()
        zygote.run()
    except ChannelBroken:
        return
