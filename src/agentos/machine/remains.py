"""What tells the host that nothing is left of a VM: the zygote's last word, or, where that has died, init's end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

from agentos.machine.channel import ChannelBroken, read


class Remains:
    """Of one VM. Safe to use from several threads; whoever has it closes it.

    The zygote sends a descriptor of init (pidfd) when that is made, and later a byte: nothing of the VM is left. Init
    is the last of a VM's processes to end; so if the zygote ends before it says so, what is waited for is init's end.
    """

    def __init__(self, sock: socket.socket, forget: Callable[[Remains], None]) -> None:
        self.lost = False
        """Whether the zygote ended before the VM did."""
        sock.setblocking(False)
        self._sock = sock
        self._forget = forget
        self._lock = threading.Lock()
        self._init_fd = -1
        self._over = False

    def fileno(self) -> int:
        """What is readable when there is reason to look again; after a look it may be another."""
        return self._init_fd if self.lost and self._init_fd >= 0 else self._sock.fileno()

    @property
    def ended(self) -> bool:
        """Whether the VM has ended, or its zygote has."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return self._over or bool(poll.poll(0))

    def look(self) -> bool:
        """Take in the next that is said. Returns whether nothing is left of the VM."""
        with self._lock:
            if not self._over:
                self._over = _readable(self._init_fd) if self.lost else self._hear()
            return self._over

    def _hear(self) -> bool:
        try:
            said, fds = read(self._sock, 16)
        except BlockingIOError:
            return False
        except ChannelBroken:  # no room for the descriptor: what comes next says the rest
            return False
        if fds:
            self._init_fd = fds[0]
        self.lost = not said
        # Of a VM without an init no guest has ever run.
        return (self._init_fd < 0 or _readable(self._init_fd)) if self.lost else not fds

    def wait(self, seconds: float) -> bool:
        """Block until nothing is left, for this time at most. Returns whether that is seen to be so."""
        deadline = time.monotonic() + seconds
        while not self.look():
            with self._lock:
                if self._over:
                    return True
                try:
                    fd = os.dup(self.fileno())  # who has it may close it meanwhile
                except OSError:
                    return False
            try:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return False
            finally:
                os.close(fd)
        return True

    def kill(self) -> None:
        """SIGKILL to init, and so to all that is in the VM. No effect when it has ended, or was not made yet."""
        self.look()
        with self._lock:
            if self._init_fd >= 0 and not self._over:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._init_fd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it: nobody waits any more. No effect the second time."""
        with self._lock:
            self._over = True
            self._sock.close()
            if self._init_fd >= 0:
                os.close(self._init_fd)
                self._init_fd = -1
        self._forget(self)


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
