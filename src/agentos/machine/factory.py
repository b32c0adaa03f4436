"""Makes the VMs of a host: has a zygote, and another when that has died, and keeps a few VMs booted ahead of need.

Nothing here belongs to an event loop: a VM is two sockets until somebody attaches them to one. So a pool
can be filled, and VMs can be made, from whatever loop or thread asks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import threading
from typing import Any

from agentos.machine.channel import Message
from agentos.machine.disk import Disks
from agentos.machine.link import boot_error
from agentos.machine.plan import HostFacts, fittings_of, plan_vm
from agentos.machine.pool import Pool, RawVm
from agentos.machine.zygote_process import ZygoteProcess, closed
from agentos.model import VmSpec

RESERVED_PROCESSES = 64
"""Beyond limits.processes, for init, its servants and what `reserve` starts, once the limit was reached."""


class Factory:
    """One zygote at a time. Safe to use from several threads."""

    def __init__(self, pool_size: int = 0) -> None:
        self.pool_size = pool_size
        self.cgroups: dict[str, Any] = {}
        self.zygote: ZygoteProcess | None = None
        """The latest one, which may have ended; None before `start` and after `close`."""
        self._facts: HostFacts | None = None
        self._starting = threading.Lock()
        self._lock = threading.Lock()
        self._deleting = threading.Lock()
        self.pool = Pool(self._make, self._abandon)
        self.disks = Disks()
        self._names = itertools.count(1)
        self._held: dict[str, int] = {}
        self._dropped = False
        self._abandoned: list[str] = []
        """Storage of VMs that nobody has asked for, to be deleted: of no more than the pool has had ready."""

    @property
    def facts(self) -> HostFacts:
        """What the zygote found on this host. Raises RuntimeError before `start`."""
        if self._facts is None:
            raise RuntimeError("the zygote was not started")
        return self._facts

    @property
    def running(self) -> bool:
        """Whether a zygote runs, as far as is known."""
        return self.zygote is not None and not self.zygote.ended

    def start(self) -> None:
        """Start a zygote unless one runs. Raises BootFailed with what the host lacks.

        Blocks for some 0.1 s, and until nothing is left of a zygote that has died, and of its VMs.
        """
        with self._starting:
            if self.running:
                return
            if self.zygote is not None:
                self.zygote.join()
            zygote = ZygoteProcess(self._empty_pool)
            self._facts, self.cgroups = zygote.facts, zygote.cgroups
            with self._lock:
                for name, fd in self._held.items():
                    with contextlib.suppress(OSError):  # it has ended already: the next one gets them
                        zygote.send({"hold": name}, [fd])
                first, self.zygote = self.zygote is None, zygote
            if first:
                self.pool = Pool(self._make, self._abandon)
            if self._dropped:
                zygote.drop()
        if first and self.pool_size:
            self.pool.keep(VmSpec(), self.pool_size)
            self.pool.fill()

    def create(self, spec: VmSpec) -> RawVm:
        """A new VM of `spec`, booting; `pool` has ready ones. Blocks while its disk is mounted, where it has one.

        Raises BootFailed; ZygoteEnded where another try may do.
        """
        return self._make(spec)

    def _make(self, spec: VmSpec) -> RawVm:
        plan = plan_vm(spec, self.facts)
        try:
            return self._order(spec, plan)
        except OSError as error:
            raise boot_error({"step": "zygote", "errno": error.errno, "text": str(error)}) from None

    def _order(self, spec: VmSpec, plan: list[Any]) -> RawVm:
        disk: int | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if spec.storage is not None:
                disk = self._open_storage(spec.storage, spec)
            zygote = self.zygote
            if zygote is None:
                raise closed()
            message = _request(f"vm-{next(self._names)}", spec, plan)
            remains = zygote.create(message, theirs.fileno(), disk)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            if disk is not None:
                os.close(disk)
        ours.setblocking(False)
        return RawVm(ours, remains, spec, disk is not None)

    def _open_storage(self, directory: str, spec: VmSpec) -> int | None:
        """Make the directory unless it is there. Returns a mount of the disk in it, None where there is none."""
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            os.close(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            return self.disks.open(directory, spec.limits) if self.facts.mode == "root" else None
        except OSError as error:
            text = "; ".join([str(error), *getattr(error, "__notes__", [])])
            raise boot_error({"step": "storage", "errno": error.errno, "text": text}) from None

    def _ask(self, message: Message, fd: int, path: str) -> None:
        zygote = self.zygote
        if zygote is None:
            raise OSError(errno.ESRCH, "the host was closed", path)
        zygote.send(message, [fd])

    def remove_tree(self, path: str) -> None:
        """Delete the directory of a VM's storage, whatever ids its files have. Blocks. Raises OSError if it remains."""
        done_read, done_write = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self._ask({"remove": path}, done_write, path)
            finally:
                os.close(done_write)
            os.read(done_read, 1)
        finally:
            os.close(done_read)
        if os.path.lexists(path):
            raise OSError(errno.ENOTEMPTY, "not all of it could be deleted", path)

    def measure(self, path: str) -> int:
        """A descriptor that brings what a directory takes up: its bytes, and its files, each on a line."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write, True)
        try:
            self._ask({"measure": path}, write, path)
        except OSError:
            os.close(read)
            raise
        finally:
            os.close(write)
        return read

    def hold(self, name: str, fd: int) -> None:
        """Have a copy of `fd` stay open until `release`, or the last VM is gone, even if this process is killed."""
        with self._lock:
            self._held[name] = os.dup(fd)
            if self.zygote is not None:
                with contextlib.suppress(OSError):  # it has ended: the next one gets it
                    self.zygote.send({"hold": name}, [fd])

    def release(self, name: str) -> None:
        """Close what was to be held under this name. No effect where there is nothing."""
        with self._lock:
            fd = self._held.pop(name, None)
            if fd is not None:
                os.close(fd)
                if self.zygote is not None:
                    with contextlib.suppress(OSError):  # it has ended
                        self.zygote.send({"release": name}, [])

    def close(self) -> None:
        """End the zygote and with it every VM that it made. Blocks until nothing of them is left."""
        with self._starting:
            self.discard(self.pool.close())
            with self._lock:
                zygote, self.zygote = self.zygote, None
                self._let_go_of_held()
            if zygote is not None:
                zygote.close()

    @property
    def open(self) -> bool:
        """Whether it is this process's to close."""
        return self.zygote is not None and self.zygote.ours

    def drop(self) -> None:
        """As `close`, but soon, and without waiting for anything: whoever could close it has forgotten it."""
        self._dropped = True
        if self.zygote is not None:
            self.zygote.drop()

    def replenish(self) -> None:
        """Have ready again what the pool is to have ready. Blocks."""
        self.discard([])
        self.pool.fill()

    def discard(self, vms: list[RawVm]) -> bool:
        """End VMs that nobody has asked for, and delete their storage. Blocks. False where the zygote has ended."""
        for raw in vms:
            self.pool.let_go(raw)
        with self._deleting:
            with self._lock:
                abandoned, self._abandoned = self._abandoned, []
            for path in abandoned:
                try:
                    self.remove_tree(path)
                except OSError:
                    if self.zygote is not None and not self.running:
                        self._abandon(path)  # for the next zygote; any other error, for the next server
            return self.running

    def _abandon(self, path: str) -> None:
        with self._lock:
            self._abandoned.append(path)

    def _empty_pool(self) -> None:
        """The zygote has ended. What its VMs had on disk is for the next one to delete."""
        for raw in self.pool.close() if self._dropped else self.pool.empty():
            self.pool.let_go(raw)
        if self._dropped:
            with self._lock:
                self._let_go_of_held()

    def _let_go_of_held(self) -> None:
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()


def _request(name: str, spec: VmSpec, plan: list[Any]) -> Message:
    limits = spec.limits
    return {
        "name": name,
        "plan": plan,
        "processes": limits.processes,
        "image": spec.image,
        "fittings": fittings_of(spec.image) if spec.image is not None else "",
        "limits": {
            # The VM's files are on a tmpfs, which the kernel accounts as its memory: without their
            # share in the limit a full disk would be an out-of-memory kill.
            "memory_bytes": limits.memory_bytes
            + limits.shm_bytes
            + (limits.disk_bytes if spec.storage is None else 0),
            "pids": limits.processes,
            "cpu_cores": limits.cpu_cores,
            "cpu_weight": limits.cpu_weight,
        },
    }
