"""What the zygote holds for one VM, and what it tells the host of it: see `remains` for the other end."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from agentos.linux import cgroups
from agentos.machine.channel import BlockingChannel, send_some


class Vm:
    """One VM, until all of it is gone."""

    def __init__(
        self, plan: list[Any], cgroup: cgroups.Cgroup, told: socket.socket, slot: int, sync: BlockingChannel
    ) -> None:
        self.plan = plan
        self.cgroup = cgroup
        self.told = told
        """Where the host is told of its init, and when nothing of it is left."""
        self.slot = slot
        self.sync = sync
        """Brings PID 1's host pid, or ends without it when PID 1 could not be made."""
        self.prepared: list[int] = []
        """Mounts that go with the plan."""

    def name_init(self, host_pid: int) -> None:
        """Give the host a descriptor of PID 1, for the case that this process ends before the VM."""
        pidfd = os.pidfd_open(host_pid)
        try:
            send_some(self.told, b"i", [pidfd])
        finally:
            os.close(pidfd)

    def let_go(self) -> None:
        """It boots by itself from here on, or not at all: what only that needs goes."""
        self.sync.close()
        for fd in self.prepared:
            os.close(fd)
        self.prepared.clear()
        self.plan.clear()


def say_over(told: socket.socket) -> None:
    """Tell the host that nothing is left of a VM."""
    with contextlib.suppress(OSError):  # nobody waits for it
        told.send(b"o", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    told.close()
