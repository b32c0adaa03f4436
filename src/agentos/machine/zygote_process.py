"""The zygote as the host process has it: it is started, asked, and cleaned up after when it has ended."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import platform
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agentos.errors import BootFailed
from agentos.linux import cgroups, seccomp
from agentos.machine.channel import BlockingChannel, Message, send
from agentos.machine.link import boot_error
from agentos.machine.plan import MASKED_PROC, READ_ONLY_PROC, WASM_RULE, HostFacts
from agentos.machine.remains import Remains

log = logging.getLogger("agentos.machine")

_SOURCE = Path(__file__).resolve().parent
_END_SECONDS = 20.0
"""How long the VMs of a zygote that was killed may take to end: what they wrote last is written out."""
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.ENOTCONN)


class ZygoteEnded(BootFailed):
    """The zygote ended before the VM was made: another zygote may make it."""

    @classmethod
    def of(cls, why: str) -> ZygoteEnded:
        """The error, where `why` says what was seen of it."""
        return cls(f"the zygote ended: {why}", step="zygote", errno=0, remedy="see what killed it: dmesg")


class ZygoteProcess:
    """A zygote that runs, or has ended. Safe to use from several threads.

    A thread waits for its end. However that comes, the thread then ends what is left of its VMs, calls `on_end`, and
    removes the cgroups.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        """Start it. Blocks for some 0.1 s. Raises BootFailed with what the host lacks."""
        self._lock = threading.Lock()
        self._vms: set[Remains] = set()
        self._on_end = on_end
        self._closed = False
        self._dropped = False
        self._seen_to = False
        self._owner = os.getpid()
        self._ended = False
        """Whether somebody has seen a sign of its end."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with theirs:
                self._process = _start(theirs)
            answer = _configure(self._control, self._process)
        except BaseException:
            self._control.close()
            raise
        self.pid = self._process.pid
        self.facts = HostFacts.from_json(answer["facts"])
        self.cgroups: dict[str, Any] = answer["cgroups"]
        self._scope: list[str] = answer["scope"]
        self.thread = threading.Thread(target=self._see_to_its_end, name="agentos-zygote", daemon=True)
        self.thread.start()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        if not self._ended:
            poll = select.poll()
            poll.register(self._control, 0)
            self._ended = bool(poll.poll(0))
        return self._ended

    def fileno(self) -> int:
        """Of its control socket."""
        return self._control.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Ask for something. Raises OSError when it has ended."""
        with self._lock:
            send(self._control, message, fds)

    def create(self, message: Message, channel_fd: int, disk: int | None) -> Remains:
        """Ask for a VM with this end of its channel. Raises ZygoteEnded, BootFailed where it was closed, OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        remains = Remains(ours, self._forget)
        with self._lock:
            self._vms.add(remains)
        try:
            with theirs:
                self.send(message, [channel_fd, theirs.fileno(), *([] if disk is None else [disk])])
        except OSError as error:
            remains.close()
            if self._closed:
                raise closed() from None
            if error.errno in _GONE:
                self._ended = True
                raise ZygoteEnded.of(str(error)) from None
            raise
        except BaseException:
            remains.close()
            raise
        return remains

    def _forget(self, remains: Remains) -> None:
        with self._lock:
            self._vms.discard(remains)
        if remains.lost:
            self._ended = True

    def _see_to_its_end(self) -> None:
        status = self._process.wait()
        self._ended = True
        if not self._closed:
            log.error("the zygote ended, and its VMs with it", extra={"pid": self.pid, "status": status})
        with self._lock:
            left = list(self._vms)
        for one in left:
            one.kill()  # they end by themselves, unless something keeps one from it
        for one in left:
            one.wait(_END_SECONDS)
        self._on_end()
        try:
            cgroups.remove(self._scope)
        except OSError as error:  # the next zygote tries it again
            log.error("cgroups of VMs are left", extra={"pid": self.pid, "error": str(error)})
        self._seen_to = True
        if self._dropped:
            self._control.close()

    def join(self) -> None:
        """Block until nothing is left of a zygote that has ended, or is ending."""
        self.thread.join()
        self._control.close()

    def close(self) -> None:
        """End it and with it every VM that it made. Blocks until nothing of them is left."""
        self._closed = True
        with self._lock:
            try:
                # Not only closed: a process that was forked from this one may have it too.
                self._control.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already
        self.join()

    @property
    def ours(self) -> bool:
        """Whether it is this process's, and not that of one which this process was forked from."""
        return os.getpid() == self._owner

    def drop(self) -> None:
        """As `close`, but its thread does the rest: nothing here waits, for a lock neither, as garbage is collected."""
        self._dropped = self._closed = True
        try:
            self._control.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already
        if self._seen_to:
            self._control.close()


def closed() -> BootFailed:
    """The error of asking a host that is closed."""
    return BootFailed("the host was closed", step="zygote", errno=0, remedy="")


def _start(theirs: socket.socket) -> subprocess.Popen[bytes]:
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


def _configure(control: socket.socket, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    channel = BlockingChannel(control)
    try:
        channel.send(_configuration())
        answer, _ = channel.receive()
        if "failed" in answer:
            raise boot_error({"step": answer["failed"], **answer})
    except BaseException as error:
        control.close()
        process.wait()
        if isinstance(error, OSError):
            text = "the zygote ended before it was ready"
            raise BootFailed(text, step="zygote", errno=0, remedy="") from None
        raise
    return answer


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
