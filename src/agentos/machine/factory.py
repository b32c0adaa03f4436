"""The host's handle on the zygote: starts it, asks it for VMs, keeps a few booted ahead of need.

Nothing here belongs to an event loop: a VM is two sockets until somebody attaches them to one. So a pool
can be filled, and VMs can be made, from whatever loop or thread asks.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from agentos.errors import BootFailed
from agentos.linux import seccomp
from agentos.machine.channel import BlockingChannel, ChannelBroken, send
from agentos.machine.disk import Disks
from agentos.machine.link import boot_error
from agentos.machine.plan import MASKED_PROC, READ_ONLY_PROC, WASM_RULE, HostFacts, fittings_of, plan_vm
from agentos.machine.pool import Pool, RawVm
from agentos.model import VmSpec

_SOURCE = Path(__file__).resolve().parent
RESERVED_PROCESSES = 64
"""Beyond limits.processes, for init, its servants and what `reserve` starts, once the limit was reached."""


class Factory:
    """One zygote. Safe to use from several threads."""

    def __init__(self, pool_size: int = 0) -> None:
        self.pool_size = pool_size
        self.cgroups: dict[str, Any] = {}
        self._facts: HostFacts | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()
        self.pool = Pool(self._make)
        self.disks = Disks()
        self._made = 0

    @property
    def facts(self) -> HostFacts:
        """What the zygote found on this host. Raises RuntimeError before `start`."""
        if self._facts is None:
            raise RuntimeError("the zygote was not started")
        return self._facts

    def start(self) -> None:
        """Start the zygote unless it runs. Blocks for some 0.1 s. Raises BootFailed with what the host lacks."""
        with self._lock:
            if self._control is not None:
                return
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                self._process = _start_zygote(theirs)
                theirs.close()
                answer = self._configure(ours)
            except BaseException:
                ours.close()
                self._wait_for_zygote()
                raise
            self._facts = HostFacts.from_json(answer["facts"])
            self.cgroups = answer["cgroups"]
            self._control = ours
            self.pool = Pool(self._make)
        if self.pool_size:
            self.pool.keep(VmSpec(), self.pool_size)
            self.pool.fill()

    def _configure(self, control: socket.socket) -> dict[str, Any]:
        channel = BlockingChannel(control)
        try:
            channel.send(_configuration())
            answer, _ = channel.receive()
        except (ChannelBroken, OSError):
            raise BootFailed(
                "the zygote ended before it was ready", step="zygote", errno=0, remedy=""
            ) from None
        if "failed" in answer:
            raise boot_error({"step": answer["failed"], **answer})
        return answer

    def create(self, spec: VmSpec) -> RawVm:
        """A new VM of `spec`, booting; `pool` has ready ones. Blocks while its disk is mounted, where it has one."""
        return self._make(spec)

    def _make(self, spec: VmSpec) -> RawVm:
        plan = plan_vm(spec, self.facts)
        disk: int | None = None
        limits = spec.limits
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        gone_read, gone_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if spec.storage is not None:
                disk = self._open_storage(spec.storage, spec)
            with self._lock:
                if self._control is None:
                    raise BootFailed("the host was closed", step="zygote", errno=0, remedy="")
                self._made += 1
                name = f"vm-{self._made}"
                message = {
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
                send(self._control, message, [theirs.fileno(), gone_write, *([] if disk is None else [disk])])
        except OSError as error:
            ours.close()
            os.close(gone_read)
            raise BootFailed(
                f"the zygote is gone: {error}", step="zygote", errno=error.errno or 0, remedy=""
            ) from None
        except BaseException:
            ours.close()
            os.close(gone_read)
            raise
        finally:
            theirs.close()
            os.close(gone_write)
            has_disk = disk is not None
            if disk is not None:
                os.close(disk)
        ours.setblocking(False)
        return RawVm(ours, gone_read, spec, has_disk, name=name)

    def end(self, name: str) -> None:
        """Have a VM's init killed that does not end by itself."""
        with self._lock:
            if self._control is not None:
                send(self._control, {"end": name})

    def _open_storage(self, directory: str, spec: VmSpec) -> int | None:
        """Make the directory unless it is there. Returns a mount of the disk in it, None where there is none."""
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            return self.disks.open(directory, spec.limits) if self.facts.mode == "root" else None
        except OSError as error:
            text = "; ".join([str(error), *getattr(error, "__notes__", [])])
            raise boot_error({"step": "storage", "errno": error.errno, "text": text}) from None

    def remove_tree(self, path: str) -> None:
        """Delete the directory of a VM's storage, whatever ids its files have. Blocks. Raises OSError if it remains."""
        done_read, done_write = os.pipe2(os.O_CLOEXEC)
        try:
            with self._lock:
                if self._control is None:
                    raise OSError(errno.ESRCH, "the host was closed", path)
                send(self._control, {"remove": path}, [done_write])
            os.close(done_write)
            done_write = -1
            os.read(done_read, 1)
        finally:
            os.close(done_read)
            if done_write >= 0:
                os.close(done_write)
        if os.path.lexists(path):
            raise OSError(errno.ENOTEMPTY, "not all of it could be deleted", path)

    def measure(self, path: str) -> int:
        """A descriptor that brings what a directory takes up: its bytes, and its files, each on a line."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write, True)
        try:
            with self._lock:
                if self._control is None:
                    raise OSError(errno.ESRCH, "the host was closed", path)
                send(self._control, {"measure": path}, [write])
        except OSError:
            os.close(read)
            raise
        finally:
            os.close(write)
        return read

    def hold(self, name: str, fd: int) -> None:
        """Have a copy of `fd` stay open until `release`, or the last VM is gone, even if this process is killed."""
        with self._lock:
            if self._control is not None:
                send(self._control, {"hold": name}, [fd])

    def release(self, name: str) -> None:
        """Close what was to be held under this name."""
        with self._lock:
            if self._control is not None:
                send(self._control, {"release": name}, [])

    def close(self) -> None:
        """End the zygote and with it every VM that it made. Blocks until nothing of them is left."""
        with self._lock:
            control = self._control
        self.discard(self.pool.close())
        with self._lock:
            self._control = None
        if control is not None:
            control.close()
        self._wait_for_zygote()

    def discard(self, vms: list[RawVm]) -> None:
        """End VMs that nobody has asked for, and delete their storage. Blocks."""
        for raw in vms:
            raw.close()
        for raw in vms:
            if raw.spec.storage is not None:
                with contextlib.suppress(OSError):  # the zygote is gone: the next server removes it
                    self.remove_tree(raw.spec.storage)

    def _wait_for_zygote(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.wait()


def _start_zygote(theirs: socket.socket) -> subprocess.Popen[bytes]:
    # An empty environment and no descriptor but the socket: everything in here is inherited by every VM's init.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SOURCE / "start.py"), "zygote", str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={},
        cwd="/",
        start_new_session=True,
    )


def _configuration() -> dict[str, Any]:
    machine = platform.machine()
    try:
        program = seccomp.build_filter(machine)
    except ValueError as error:
        raise BootFailed(str(error), step="seccomp", errno=0, remedy="run on x86_64 or aarch64") from None
    wasmtime = importlib.util.find_spec("wasmtime")
    locations = list(wasmtime.submodule_search_locations or ()) if wasmtime else []
    return {
        "host_pid": os.getpid(),
        "filter": program.hex(),
        "guest_dir": str(_SOURCE.parent / "guest"),
        "python_prefix": sys.base_prefix,
        "wasmtime": locations[0] if locations else "",
        "wasm_rule": WASM_RULE,
        "masked_proc": list(MASKED_PROC),
        "read_only_proc": list(READ_ONLY_PROC),
    }
