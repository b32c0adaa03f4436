"""VMs that are booted before anybody asks: a few for each kind of VM that is kept ready, taken whole."""

from __future__ import annotations

import os
import select
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from agentos.errors import AgentOSError
from agentos.machine.channel import send
from agentos.machine.jobs import BASH, check_program
from agentos.machine.launcher import WARM_UP
from agentos.machine.link import FIRST_NUMBER
from agentos.machine.plan import UIDS
from agentos.machine.remains import Remains
from agentos.model import VmSpec

_BOOT_SECONDS = 20.0
SPARE = "spare-"
"""How the names of storage directories begin that nobody's files are in."""


@dataclass(slots=True)
class RawVm:
    """A VM that boots or has booted, not yet attached to an event loop. Whoever takes it owns both."""

    sock: socket.socket
    remains: Remains
    spec: VmSpec
    has_disk: bool = False
    """Whether the kernel bounds what it writes to its storage."""
    spawner: tuple[socket.socket, int] | None = None
    """Socket and journal of a spawner of the spec's user, in a VM that is kept ready."""

    def booted(self, seconds: float) -> bool:
        """Whether it comes to life within this time. Blocks."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000)) and not self.gone

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self.remains.ended

    def close(self) -> None:
        """Let go of it: its init ends."""
        self.sock.close()
        if self.spawner is not None:
            self.spawner[0].close()
            os.close(self.spawner[1])
        self.remains.close()


@dataclass(slots=True, eq=False)
class _Shelf:
    """The ready VMs of one kind. `beside`: where their storage directories are, None where they have none."""

    spec: VmSpec
    size: int
    beside: str | None
    vms: deque[RawVm] = field(default_factory=deque)


class Pool:
    """Ready VMs by their kind. Safe to use from several threads; `fill` blocks, nothing else does.

    `make` makes one; `abandon` is told of storage that is nobody's.
    """

    def __init__(self, make: Callable[[VmSpec], RawVm], abandon: Callable[[str], None]) -> None:
        self._make = make
        self._abandon = abandon
        self._lock = threading.Lock()
        self._filling = threading.Lock()
        self._shelves: list[_Shelf] = []
        self._open = True

    def keep(self, spec: VmSpec, size: int, beside: str | None = None) -> None:
        """From now on have `size` VMs of `spec` ready, with storage directories in `beside` where that is given."""
        with self._lock:
            if not any(one.spec == spec and one.beside == beside for one in self._shelves):
                self._shelves.append(_Shelf(spec, size, beside))

    @property
    def lacking(self) -> bool:
        """Whether `fill` has something to do."""
        return self._shortest() is not None

    def take(self, spec: VmSpec) -> RawVm | None:
        """A ready VM of `spec`, or None.

        Where the spec names a storage directory that does not exist, the VM's own is renamed to that: a VM does not
        mind, as it has the directory and not its path.
        """
        storage, beside = spec.storage, None
        if storage is not None:
            if os.path.lexists(storage):
                return None
            beside, spec = os.path.dirname(storage), replace(spec, storage=None)
        while (raw := self._pop(spec, beside)) is not None:
            if raw.gone:
                self.let_go(raw)
                continue
            if storage is not None:
                try:
                    os.rename(str(raw.spec.storage), storage)
                except OSError:
                    self.let_go(raw)
                    return None  # making it afresh will fail as well, and say why
                raw.spec = replace(spec, storage=storage)
            return raw
        return None

    def _pop(self, spec: VmSpec, beside: str | None) -> RawVm | None:
        with self._lock:
            for shelf in self._shelves:
                if shelf.vms and shelf.beside == beside and shelf.spec == spec:
                    return shelf.vms.popleft()
        return None

    def fill(self) -> None:
        """Bring every shelf to its size. A kind that cannot be made now is left: whoever asks for one is told why."""
        left: set[_Shelf] = set()
        with self._filling:
            while (shelf := self._shortest(left)) is not None:
                left.add(shelf)  # unless it gets one
                spec = shelf.spec if shelf.beside is None else _with_storage(shelf)
                try:
                    raw = self._make(spec)
                except (AgentOSError, OSError):
                    if spec.storage is not None:
                        self._abandon(spec.storage)
                    continue
                try:
                    _get_ready(raw)
                except OSError:  # it has ended
                    self.let_go(raw)
                    continue
                # Until its storage is mounted a VM does mind its directory's name.
                if shelf.beside is not None and not raw.booted(_BOOT_SECONDS):
                    self.let_go(raw)
                    continue
                left.discard(shelf)
                with self._lock:
                    shelf.vms.append(raw)

    def let_go(self, raw: RawVm) -> None:
        """End one that nobody has asked for."""
        raw.close()
        if raw.spec.storage is not None:
            self._abandon(raw.spec.storage)

    def _shortest(self, but: Collection[_Shelf] = ()) -> _Shelf | None:
        with self._lock:
            lacking = [
                one for one in self._shelves if self._open and len(one.vms) < one.size and one not in but
            ]
            return min(lacking, key=lambda one: len(one.vms), default=None)

    def drop(self, beside: str) -> list[RawVm]:
        """Keep none ready any more whose storage is in `beside`. Returns those that were."""
        with self._filling, self._lock:
            dropped = [one for one in self._shelves if one.beside == beside]
            self._shelves = [one for one in self._shelves if one.beside != beside]
        return [raw for shelf in dropped for raw in shelf.vms]

    def empty(self) -> list[RawVm]:
        """Take all out that are ready; `fill` makes others. Returns those that were."""
        with self._filling, self._lock:
            ready = [raw for shelf in self._shelves for raw in shelf.vms]
            for shelf in self._shelves:
                shelf.vms.clear()
        return ready

    def close(self) -> list[RawVm]:
        """Keep none ready any more, for good. Returns those that were."""
        with self._lock:
            self._open = False
        with self._filling, self._lock:
            shelves, self._shelves = self._shelves, []
        return [raw for shelf in shelves for raw in shelf.vms]

    def ready(self) -> list[RawVm]:
        """Those that are ready."""
        with self._lock:
            return [raw for shelf in self._shelves for raw in shelf.vms]


def _with_storage(shelf: _Shelf) -> VmSpec:
    return replace(shelf.spec, storage=f"{shelf.beside}/{SPARE}{uuid.uuid4().hex}")


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
    except OSError:
        ours.close()
        os.close(journal_read)
        raise
    finally:
        theirs.close()
        os.close(journal_write)
        os.close(null)
    ours.setblocking(False)
    raw.spawner = (ours, journal_read)
