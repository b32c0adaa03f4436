"""The host's handle on the zygote: starts it, asks it for VMs, keeps a few booted ahead of need.

Nothing here belongs to an event loop: a VM is two sockets until somebody attaches them to one. So a pool
can be filled, and VMs can be made, from whatever loop or thread asks.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentos.errors import BootFailed
from agentos.linux import seccomp
from agentos.machine.channel import BlockingChannel, ChannelBroken, send
from agentos.machine.jobs import BASH, check_program
from agentos.machine.link import FIRST_NUMBER, WARM_UP, boot_error
from agentos.machine.plan import MASKED_PROC, READ_ONLY_PROC, UIDS, WASM_RULE, HostFacts, fittings_of, plan_vm
from agentos.model import VmSpec

_SOURCE = Path(__file__).resolve().parent
RESERVED_PROCESSES = 16
"""Beyond limits.processes, for init and its servants."""


@dataclass(slots=True)
class RawVm:
    """A VM that boots or has booted, not yet attached to an event loop. Whoever takes it owns both."""

    sock: socket.socket
    gone_fd: int
    """Reaches its end when nothing of the VM is left on this host."""
    spec: VmSpec
    spawner: tuple[socket.socket, int] | None = None
    """Socket and journal of a spawner of the spec's user, in a VM that is kept ready."""

    def close(self) -> None:
        """Let go of it: its init ends."""
        self.sock.close()
        if self.spawner is not None:
            self.spawner[0].close()
            os.close(self.spawner[1])
        os.close(self.gone_fd)


class Factory:
    """One zygote. Safe to use from several threads."""

    def __init__(self, pool_size: int = 0) -> None:
        self.pool_size = pool_size
        self.cgroups: dict[str, Any] = {}
        self._facts: HostFacts | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = threading.Lock()
        self._pool: deque[RawVm] = deque()
        self._pool_spec = VmSpec()
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
        self._fill_pool()

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
        """A VM of `spec`, booting or booted already. Never blocks for longer than a message takes to send."""
        if spec == self._pool_spec:
            with self._lock:
                taken = self._pool.popleft() if self._pool else None
            if taken is not None:
                return taken
        return self._make(spec)

    def refill(self) -> None:
        """Bring the pool back to its size: meant for when the VM just taken is up."""
        self._fill_pool()

    def _fill_pool(self) -> None:
        while True:
            with self._lock:
                if self._control is None or len(self._pool) >= self.pool_size:
                    return
            made = self._make(self._pool_spec)
            _get_ready(made)
            with self._lock:
                self._pool.append(made)

    def _make(self, spec: VmSpec) -> RawVm:
        plan = plan_vm(spec, self.facts)
        limits = spec.limits
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        gone_read, gone_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with self._lock:
                if self._control is None:
                    raise BootFailed("the host was closed", step="zygote", errno=0, remedy="")
                self._made += 1
                message = {
                    "name": f"vm-{self._made}",
                    "plan": plan,
                    "storage": spec.storage,
                    "image": spec.image,
                    "fittings": fittings_of(spec.image) if spec.image is not None else "",
                    "limits": {
                        # The VM's files are on a tmpfs, which the kernel accounts as its memory: without their
                        # share in the limit a full disk would be an out-of-memory kill.
                        "memory_bytes": limits.memory_bytes
                        + limits.shm_bytes
                        + (limits.disk_bytes if spec.storage is None else 0),
                        "pids": limits.processes + RESERVED_PROCESSES,
                        "cpu_cores": limits.cpu_cores,
                        "cpu_weight": limits.cpu_weight,
                    },
                }
                send(self._control, message, [theirs.fileno(), gone_write])
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
        ours.setblocking(False)
        return RawVm(ours, gone_read, spec)

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

    def close(self) -> None:
        """End the zygote and with it every VM that it made. Blocks until nothing of them is left."""
        with self._lock:
            control, self._control = self._control, None
            pool = list(self._pool)
            self._pool.clear()
        for raw in pool:
            raw.close()
        if control is not None:
            control.close()
        self._wait_for_zygote()

    def _wait_for_zygote(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.wait()


def _start_zygote(theirs: socket.socket) -> subprocess.Popen[bytes]:
    # An empty environment and no descriptor but the socket: everything in here is inherited by every VM's init.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SOURCE / "zygote_start.py"), str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={},
        cwd="/",
        start_new_session=True,
    )


def _get_ready(raw: RawVm) -> None:
    """Ask the VM for a spawner, and run a program once, so that the first that counts finds its files known."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    journal_read, journal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    request = {"op": "fork", "kind": "spawner", "uid": UIDS[raw.spec.user], "number": FIRST_NUMBER - 1}
    program = check_program(raw.spec, BASH, ["-c", "/bin/echo"])
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        send(raw.sock, request, [theirs.fileno(), journal_write])
        send(ours, {"job": WARM_UP, **program.job(quiet=True)}, [null, null, null])
    finally:
        theirs.close()
        os.close(journal_write)
        os.close(null)
    ours.setblocking(False)
    raw.spawner = (ours, journal_read)


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
