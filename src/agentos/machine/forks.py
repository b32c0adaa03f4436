"""The zygote's handle on the seed: starts it, and asks it for each VM's first process."""

from __future__ import annotations

import os
import socket
import sys

from agentos.machine.channel import BlockingChannel, send_some
from agentos.machine.confinement import Confinement

_START = os.path.join(os.path.dirname(os.path.abspath(__file__)), "start.py")
_LIFELINE, _REQUESTS = 3, 4
"""The seed's descriptors."""


class Forks:
    """A running seed, which is the caller's child and in its namespaces. It ends with this."""

    def __init__(self, lifeline: int, confinement: Confinement, *, urgent: bool) -> None:
        """`urgent`: a VM's PID 1 is to run before the VM's own programs."""
        self._requests, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
        )
        # First to numbers that neither has, since each may have the other's.
        moves = [(lifeline, 100), (theirs.fileno(), 101), (100, _LIFELINE), (101, _REQUESTS)]
        actions = [
            *((os.POSIX_SPAWN_DUP2, old, new) for old, new in moves),
            (os.POSIX_SPAWN_CLOSE, 100),
            (os.POSIX_SPAWN_CLOSE, 101),
        ]
        argv = [sys.executable, "-I", "-S", _START, "seed", str(_LIFELINE), str(_REQUESTS)]
        os.posix_spawn(sys.executable, argv, {}, file_actions=actions)
        theirs.close()
        BlockingChannel(self._requests).send({"urgent": urgent, **confinement.to_json()})

    def ask(
        self, channel_fd: int, sync: socket.socket, joins: list[str], *, processes: int, owner: int | None
    ) -> None:
        """Have a first process forked, which has the other end of `sync`: see `seed.serve`. `sync` is closed here.

        `joins` are the control files of the cgroups that it is to join.
        """
        fds = [channel_fd, sync.fileno()]
        try:
            for path in joins:
                fds.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
            send_some(self._requests, b"%d %d" % (processes, -1 if owner is None else owner), fds)
        finally:
            sync.close()
            for fd in fds[2:]:
                os.close(fd)
