"""The process that forks VMs: small, single-threaded, started once by the host process.

The host asks over its control socket; every answer about a VM goes over that VM's own channel. For each
VM the zygote forks a child, which unshares a user namespace, is given its ids and cgroup from outside,
unshares the rest and forks PID 1. The zygote reaps the VMs, gives their cgroups back, and then tells
the host that nothing is left. When the host ends, however it ends, the zygote ends every VM and removes
what the host had made. Only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import shutil
import signal
import socket
from types import FrameType
from typing import Any

from agentos.linux import binfmt, cgroups, mounts, privileges, syscalls
from agentos.machine import identity, image, shared, template
from agentos.machine.channel import BlockingChannel, ChannelBroken, Message, read
from agentos.machine.confinement import Confinement
from agentos.machine.forks import Forks
from agentos.machine.zygote_vm import Vm, say_over


class _StorageFailed(OSError):
    """The directory of a VM's storage cannot be used."""


class Zygote:
    """The loop of the zygote. It waits for the host, for the ends of children, and for the host's end."""

    def __init__(
        self,
        control: BlockingChannel,
        config: Message,
        ids: identity.IdRanges,
        scope: cgroups.Scope,
        found: Message,
    ) -> None:
        self.control = control
        self.ids = ids
        self.scope = scope
        self.stage = str(found["stage"])
        self.owners = ids.on_disk(bool(found["idmap"]))
        self.guest_dir = str(config["guest_dir"])
        self.host_pidfd = os.pidfd_open(int(config["host_pid"]))
        self.lifeline_read, self.lifeline_write = os.pipe2(os.O_CLOEXEC)
        self.vms: dict[int, Vm] = {}
        """Host pid of PID 1 -> its VM."""
        self.starting: dict[int, Vm] = {}
        """Descriptor of `sync` -> VM whose PID 1 is not known yet."""
        self.poll = select.poll()
        confinement = Confinement(ids.mode, privileges.last_capability(), bytes.fromhex(config["filter"]))
        has_cpu_groups = "cpu_weight" in scope.limits
        self.forks = Forks(self.lifeline_read, confinement, urgent=has_cpu_groups)
        self.held: dict[str, int] = {}
        """Descriptors that the host wants to be open as long as any VM, by the name under which it lets go of them."""

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
                            self.take(message, fds)
                    # else: reap() has learned this pid already, in the same round.
        except ChannelBroken:
            return
        finally:
            self.end_all()

    def take(self, message: Message, fds: list[int]) -> None:
        """Do what the host asks for."""
        if "remove" in message:
            self.remove(message, fds)
        elif "measure" in message:
            self.measure(message, fds)
        elif "hold" in message:
            self.held[message["hold"]] = fds[0]
        elif "release" in message:
            os.close(self.held.pop(message["release"]))
        else:
            self.create(message, fds)

    def remove(self, message: Message, fds: list[int]) -> None:
        """Delete a directory with files of ids that only this user namespace has. `fds`: what ends when it is done."""
        if os.fork() == 0:
            try:
                os.set_inheritable(fds[0], True)
                argv = ["rm", "-rf", "--one-file-system", "--", message["remove"]]
                os.execvpe("rm", argv, {"PATH": "/usr/bin:/bin"})
            finally:
                os._exit(127)
        os.close(fds[0])

    def measure(self, message: Message, fds: list[int]) -> None:
        """Write to `fds[0]` how many bytes a directory takes up, and how many files there are in it."""
        if os.fork() == 0:
            try:
                os.dup2(fds[0], 1)
                os.nice(10)
                count = 'exec 2>/dev/null; du -sxB1 -- "$1" | cut -f1; du -sx --inodes -- "$1" | cut -f1'
                os.execve("/bin/sh", ["sh", "-c", count, "sh", message["measure"]], {"PATH": "/usr/bin:/bin"})
            finally:
                os._exit(127)
        os.close(fds[0])

    def create(self, message: Message, fds: list[int]) -> None:
        """Fork one VM. `fds`: its channel, where to tell when all of it is gone, a mount of its disk if it has one."""
        channel, told = BlockingChannel(socket.socket(fileno=fds[0])), socket.socket(fileno=fds[1])
        try:
            self._create(message, channel, told, fds[2] if len(fds) > 2 else None)
        except Exception as error:  # whatever one VM fails of, the others live on
            said = str(error) if isinstance(error, OSError) else repr(error)
            number = getattr(error, "errno", None) or 0
            notes = "; ".join([said, *getattr(error, "__notes__", [])])
            with contextlib.suppress(OSError):
                step = "storage" if isinstance(error, _StorageFailed) else "create"
                channel.send({"ev": "boot_failed", "step": step, "errno": number, "text": notes})
            say_over(told)
        finally:
            channel.close()
            for disk in fds[2:]:
                os.close(disk)

    def _create(
        self, message: Message, channel: BlockingChannel, told: socket.socket, disk: int | None
    ) -> None:
        slot = self.ids.take_slot()
        try:
            cgroup = self.scope.create(str(message["name"]), **message["limits"])
        except Exception:
            self.ids.give_back(slot)
            raise
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        vm = Vm(message["plan"], cgroup, told, slot, BlockingChannel(ours))
        try:
            if message["image"] is not None:
                self._fit_out(message["image"], f"{self.stage}/{message['fittings']}")
            self.forks.ask(
                channel.fileno(), theirs, cgroup.join_files(),
                processes=int(message["processes"]), owner=self.ids.owner(slot),
            )  # fmt: skip
            self._give_identity(vm, disk)
        except Exception as error:
            vm.let_go()
            self.scope.release(cgroup)
            self.ids.give_back(slot)
            if not isinstance(error, ChannelBroken):
                raise
            # The child has said on the VM's channel what it could not do, unless there is none.
            with contextlib.suppress(OSError):
                channel.send(
                    {"ev": "boot_failed", "step": "fork", "errno": errno.EAGAIN, "text": "no first process"}
                )
            say_over(told)
            return
        self.starting[ours.fileno()] = vm
        self.poll.register(ours.fileno(), select.POLLIN)

    def _fit_out(self, path: str, fittings: str) -> None:
        """Make an image's fittings, when the first of its VMs is made."""
        if os.path.exists(fittings):
            return
        try:
            image.fit_out(fittings, path, guest_dir=self.guest_dir)
            template.give_to(fittings, *self.owners)
        except OSError as error:
            error.add_note(f"image {path}")
            shutil.rmtree(fittings, ignore_errors=True)
            raise

    def _give_identity(self, vm: Vm, disk: int | None) -> None:
        """Write the id maps of the VM's first process, and prepare the mounts that need our rights."""
        pid, fds = read(vm.sync.sock)
        if not pid:
            raise ChannelBroken("no first process")
        try:
            self.ids.write_maps(int(pid), vm.slot)
            vm.prepared = self._prepare_mounts(vm.plan, fds[0], disk)
        finally:
            for fd in fds:
                os.close(fd)
        vm.sync.sock.send(b"m", socket.MSG_NOSIGNAL)

    def _prepare_mounts(self, plan: list[Any], userns: int, disk: int | None) -> list[int]:
        """The mounts of what is the host's, in the plan's order.

        A VM cannot make them: the way there may be closed to its ids, and only who is privileged over a file system
        can show it through those.
        """
        wanted = [step[1] for step in plan if step[0] == "bind" and step[1].get("handed_over")]
        made: list[int] = []
        try:
            for step in wanted:
                bits = mounts.attribute_bits(step["attributes"])
                idmap = userns if step.get("idmap") else None
                if step.get("storage"):
                    made.append(self._storage(step["source"], disk))
                    mounts.change(made[-1], bits, userns_fd=idmap)
                else:
                    made.append(mounts.clone(step["source"], bits, recursive=idmap is None, userns_fd=idmap))
        except OSError:
            for fd in made:
                os.close(fd)
            raise
        return made

    def _storage(self, directory: str, disk: int | None) -> int:
        """A detached mount of what holds a VM's files: its disk, or the directory itself."""
        mount_fd = -1
        try:
            mount_fd = mounts.clone(directory, 0, recursive=False) if disk is None else os.dup(disk)
            path = f"/proc/self/fd/{mount_fd}"
            # Nobody else of this host may come where a VM may leave a program with the setuid bit.
            os.chmod(path, 0o700)
            if self.owners[0]:
                # Where ids are not translated, the user of this process is nobody to the VM: its root owns it.
                os.chown(path, self.owners[0], self.owners[0])
        except OSError as error:
            if mount_fd >= 0:
                os.close(mount_fd)
            raise _StorageFailed(error.errno, error.strerror, directory) from error
        return mount_fd

    def learn_pid(self, fd: int) -> None:
        """The first process has forked PID 1 and says its host pid, or it ended without. It gets the plan."""
        vm = self.starting.pop(fd)
        self.poll.unregister(fd)
        try:
            host_pid = int(vm.sync.receive()[0]["host_pid"])
            self.vms[host_pid] = vm
            vm.name_init(host_pid)
            vm.sync.send({"plan": vm.plan, "cgroup": vm.cgroup.to_dict()}, vm.prepared)
        except ChannelBroken:
            self.finish(vm)
        except OSError:
            pass  # it is gone again, or nobody wants it any more: PID 1's end tells the rest
        finally:
            vm.let_go()

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
        say_over(vm.told)

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


def _probe(config: Message) -> tuple[identity.IdRanges, Message]:
    """Find out by trying what this host allows, and build the template for it."""
    ids = identity.acquire()
    mode = ids.mode
    if mode == "root":
        syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    stage = template.choose_stage()
    software = template.host_software()
    shared.mount(stage, software, root=mode == "root")
    template.build(stage, guest_dir=config["guest_dir"], software=software)
    idmap = mode == "root" and shared.shown_through_ids(stage, software)
    added_to = ["/usr"] if idmap and "/usr" in software and template.add_locale_archive(stage) else []
    owner, user = ids.on_disk(idmap)
    template.give_to(f"{stage}/skeleton", owner, user)
    facts: Message = {
        "mode": mode, "stage": stage, "idmap": idmap, "host_dirs": software, "package_dirs": software,
        "added_to": added_to,
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
            zygote = Zygote(control, config, ids, scope, facts)
        except OSError as error:
            notes = "; ".join([str(error), *getattr(error, "__notes__", [])])
            control.send({"failed": step, "errno": error.errno or 0, "text": notes})
            return
        facts["memory_cgroup"] = "memory" in setup.limits
        control.send({"facts": facts, "cgroups": setup.describe(), "scope": list(scope.directories)})
        # Pages that the VMs share stay shared only while nobody writes to them, and a collection would.
        gc.disable()
        gc.freeze()
        zygote.run()
    except ChannelBroken:
        return
