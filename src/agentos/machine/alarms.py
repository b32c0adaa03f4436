"""Which limits a VM has reached: told by the kernel where a cgroup says so, and by what could not be done.

One epoll serves all VMs of an event loop, because the control files of cgroups say with EPOLLPRI that they have
changed, which event loops do not wait for. Where the kernel counts but wakes nobody, one timer does (`_Rounds`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
from collections.abc import Callable
from weakref import WeakKeyDictionary

from agentos.linux.cgroups import Cgroup
from agentos.linux.cgroups.files import Figure
from agentos.machine.factory import RESERVED_PROCESSES
from agentos.model import LimitReached, Limits

_LOOK_SECONDS = 0.1
"""From the kernel's sign, which version 1 gives before it kills, to the one look at the figures in that time."""
_NAME_SECONDS = 1.0
"""From a kill for want of memory to its being told without a name: who was killed takes time to end."""
_BURST_SECONDS = 1.0
"""A limit that is reached again and again is told once in that time."""
_ROUND_SECONDS = 1.0
"""Between two looks at what a kernel counts without saying so, as long as something may run."""
_STARTLESS_ROUNDS = 16
"""After so many looks without a start through the API, whether anything runs in the VM is found out."""
_SERVANTS = 2
"""Processes of a VM in which nothing runs: init and a spawner. A file worker or a connector counts as if something did:
they end soon after their work."""
_REMEDIES = {
    "memory_bytes": "the VM's processes wanted more memory than it has, and the kernel killed one",
    "processes": "the VM's processes wanted to be more than it may have",
    "terminals": "all terminals of the VM are open",
    "disk_bytes": "the VM's files take up all that they may",
    "disk_files": "the VM has as many files as it may",
    "runaway_bytes": "a command wrote more than one may, and was stopped",
    "network_connections": "as many connections out of the VM are open as may be; further ones wait",
    "live_processes": "as many commands run as may be started through the API at once",
}


class Alarms:
    """Counts and tells. `told` is called once for each burst, on the event loop."""

    def __init__(self, limits: Limits, told: Callable[[LimitReached], None]) -> None:
        self.hits: dict[str, int] = {}
        """Limit -> how often it was told."""
        self._limits = limits
        self._told = told
        self._quiet_until: dict[str, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cgroup: Cgroup | None = None
        self._fds: dict[str, int] = {}
        self._oom_kills: Figure | None = None
        self._seen = {"memory": 0, "pids": 0}
        self._looks: dict[str, asyncio.TimerHandle] = {}
        self._victim: tuple[int | None, str | None] = (None, None)
        self._nameless: asyncio.TimerHandle | None = None
        """A kill of the kernel's that may yet turn out to be of a command."""
        self.made_room = False
        """Whether the reserve may start programs beyond the limit."""
        self._pids_seen = b""
        self.watched = False
        """Whether a timer looks at it."""
        self._silent = False
        """Whether the kernel may count refused forks and wake nobody: version 1 does so from Linux 6.11 on."""
        self.startless = 0
        """Looks since the last start through the API."""
        self._full: object = None

    def start(self, loop: asyncio.AbstractEventLoop, cgroup: Cgroup) -> None:
        """The VM runs: from now on what is reached is told."""
        self._loop, self._cgroup = loop, cgroup

    def listen(self) -> None:
        """Hear what the kernel has to say, as far as the host has cgroups. No effect when the VM has ended."""
        if self._loop is None or self._cgroup is None:
            return
        with contextlib.suppress(FileNotFoundError):  # the VM is ending
            for name, (fd, events) in self._cgroup.alarms().items():
                self._fds[name] = fd
                _poller(self._loop).add(fd, events, functools.partial(self._sign, name))
            self._silent = "pids" in self._fds and self._cgroup.homes["pids"][0] == 1
            self._pids_changed()  # it is another VM's count where the cgroup is used again
            # What happened before.
            for name in self._fds:
                self._later(name)
            self.watch()

    def watch(self) -> None:
        """Something is being started: where the kernel tells nobody of refused forks, look from time to time."""
        self.startless = 0
        if self._silent and not self.watched and not _Rounds.heard and self._loop is not None:
            self.watched = True
            _rounds(self._loop).add(self)

    def stop(self) -> None:
        """The VM has ended. No effect when it was not started."""
        if self._loop is None:
            return
        for timer in self._looks.values():
            timer.cancel()
        if self._nameless is not None:
            self._nameless.cancel()
        if self._loop in _ROUNDS:
            _ROUNDS[self._loop].remove(self)
        self.watched = self._silent = False
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            _poller(self._loop).remove(fd)
            os.close(fd)
        if self._oom_kills is not None:
            self._oom_kills.close()
        self._loop = None

    def oom_kills(self) -> int:
        """Processes of the VM that the kernel has killed for want of memory: those seen before it ended."""
        if self._oom_kills is None and self._loop is not None and self._cgroup is not None:
            with contextlib.suppress(FileNotFoundError):  # the VM is ending
                self._oom_kills = self._cgroup.open_oom_kills()
        return 0 if self._oom_kills is None else self._oom_kills.read()

    def reached(self, limit: str, *, pid: int | None = None, command: str | None = None) -> None:
        """A limit was reached, by process `pid` if that is known."""
        loop = self._loop
        if loop is None or loop.time() < self._quiet_until.get(limit, 0.0):
            return
        self._quiet_until[limit] = loop.time() + _BURST_SECONDS
        self.hits[limit] = self.hits.get(limit, 0) + 1
        value = getattr(self._limits, limit)
        message = f"{_REMEDIES[limit]} ({limit} is {value}; raise it with Limits({limit}=...))"
        self._told(LimitReached(limit, value, message, pid, command))

    def killed(self, pid: int | None, command: str) -> None:
        """A program that was started through the API ended for want of memory."""
        self._victim = (pid, command)
        if self._nameless is not None:
            self._tell_of_memory()
        elif "memory" not in self._looks:
            self._later("memory")

    def disk(self, full: object) -> None:
        """How a program has left the VM's disk: a full one is told of once, until it has room again."""
        if full != self._full and full in ("disk_bytes", "disk_files"):
            self.reached(str(full))
        self._full = full

    def make_room(self) -> None:
        """Let the reserve start programs beyond the limit: each user of the VM is still held to it (RLIMIT_NPROC)."""
        if not self.made_room and self._cgroup is not None:
            self.made_room = True
            self._let_there_be(self._limits.processes + RESERVED_PROCESSES)

    def settle(self) -> None:
        """After something has ended: is the room still needed?"""
        if self.made_room and self._cgroup is not None:
            with contextlib.suppress(OSError):  # the VM is ending
                if (self._cgroup.pids_current() or 0) < self._limits.processes:
                    self.made_room = False
                    self._let_there_be(self._limits.processes)

    def look_round(self) -> bool:
        """Have forks been refused since the last look? Then do as for a sign. Says whether to look again."""
        if not self._silent or _Rounds.heard:
            return False
        self._ask_for_pids()
        self.startless += 1
        if self.startless % _STARTLESS_ROUNDS:
            return True
        assert self._cgroup is not None
        try:
            if (self._cgroup.pids_current() or 0) > _SERVANTS + 1:
                return True
            # One may be no more than what is left of the process that made the VM.
            return len(self._cgroup.processes()) > _SERVANTS
        except OSError:  # the VM is ending
            return False

    def _ask_for_pids(self) -> None:
        if not _Rounds.heard and "pids" not in self._looks and self._pids_changed():
            assert self._cgroup is not None
            with contextlib.suppress(OSError):  # the VM is ending
                # What has been refused may have ended since: with room for more, the next refusal is not counted.
                if (self._cgroup.pids_current() or 0) >= self._limits.processes:
                    self.make_room()
            self._later("pids")

    def _pids_changed(self) -> bool:
        """Whether pids.events says something else than at the last call."""
        before = self._pids_seen
        if "pids" in self._fds:
            try:
                self._pids_seen = os.pread(self._fds["pids"], 64, 0)
            except OSError:
                pass  # the VM is ending
        return self._pids_seen != before

    def _let_there_be(self, processes: int) -> None:
        assert self._cgroup is not None
        with contextlib.suppress(OSError):  # the VM is ending
            self._cgroup.set_limits({**self._cgroup.limits, "pids": processes})

    def _sign(self, name: str) -> None:
        """The kernel says that something has changed."""
        if name == "pids":
            # A file that goes away is a sign too, but no event.
            if self._pids_changed() and self._cgroup is not None and self._cgroup.homes["pids"][0] == 1:
                _Rounds.heard = True
            self.make_room()
        if name not in self._looks:
            self._later(name)

    def _later(self, name: str) -> None:
        if self._loop is not None:
            self._looks[name] = self._loop.call_later(_LOOK_SECONDS, self._look_and_rearm, name)

    def _look_and_rearm(self, name: str) -> None:
        del self._looks[name]
        if self._loop is None:
            return
        before = self._seen[name]
        with contextlib.suppress(OSError):  # the VM is ending
            self._look(name)
        if name == "memory" and self._victim[1] is not None:
            self._tell_of_memory()
        elif name == "memory" and self._seen[name] > before and self._nameless is None:
            self._nameless = self._loop.call_later(_NAME_SECONDS, self._tell_of_memory)
        elif name == "pids" and self._seen[name] > before:
            self.reached("processes")
        if name in self._fds:
            _poller(self._loop).rearm(self._fds[name])

    def _tell_of_memory(self) -> None:
        if self._nameless is not None:
            self._nameless.cancel()
            self._nameless = None
        (pid, command), self._victim = self._victim, (None, None)
        self.reached("memory_bytes", pid=pid, command=command)

    def _look(self, name: str) -> None:
        assert self._cgroup is not None
        self._seen[name] = self.oom_kills() if name == "memory" else self._cgroup.pids_limit_hits()


class _Poller:
    """The epoll of one event loop. A descriptor that is ready is told once, and again after `rearm`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._callbacks: dict[int, tuple[int, Callable[[], None]]] = {}
        loop.add_reader(self._epoll.fileno(), self._ready)

    def add(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        self._callbacks[fd] = (events | select.EPOLLONESHOT, callback)
        self._epoll.register(fd, events | select.EPOLLONESHOT)

    def rearm(self, fd: int) -> None:
        events, _ = self._callbacks[fd]
        # Having been read from its beginning, it is ready when it changes next: an eventfd(2) or a control file.
        with contextlib.suppress(OSError):  # nothing new; or the VM is ending
            if not events & select.EPOLLIN:
                os.lseek(fd, 0, os.SEEK_SET)
            os.read(fd, 4096)
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        self._epoll.unregister(fd)
        del self._callbacks[fd]
        if not self._callbacks:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            del _POLLERS[self._loop]

    def _ready(self) -> None:
        for fd, _ in self._epoll.poll(0):
            if fd in self._callbacks:
                self._callbacks[fd][1]()


class _Rounds:
    """One timer for all VMs of an event loop, for what has no event. It stands still where nothing runs."""

    heard = False
    """Whether this kernel has told of a refused fork in a cgroup of version 1: then nobody needs to look."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: set[Alarms] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, alarms: Alarms) -> None:
        self._watched.add(alarms)
        self._go_on()

    def remove(self, alarms: Alarms) -> None:
        self._watched.discard(alarms)
        self._go_on()

    def _round(self) -> None:
        self._timer = None
        for one in list(self._watched):
            one.watched = one.look_round()
            if not one.watched:
                self._watched.discard(one)
        self._go_on()

    def _go_on(self) -> None:
        if self._watched:
            self._timer = self._timer or self._loop.call_later(_ROUND_SECONDS, self._round)
            return
        if self._timer is not None:
            self._timer.cancel()
        _ROUNDS.pop(self._loop, None)


_ROUNDS: WeakKeyDictionary[asyncio.AbstractEventLoop, _Rounds] = WeakKeyDictionary()


def _rounds(loop: asyncio.AbstractEventLoop) -> _Rounds:
    found = _ROUNDS.get(loop)
    if found is None:
        found = _ROUNDS[loop] = _Rounds(loop)
    return found


_POLLERS: WeakKeyDictionary[asyncio.AbstractEventLoop, _Poller] = WeakKeyDictionary()


def _poller(loop: asyncio.AbstractEventLoop) -> _Poller:
    found = _POLLERS.get(loop)
    if found is None:
        found = _POLLERS[loop] = _Poller(loop)
    return found
