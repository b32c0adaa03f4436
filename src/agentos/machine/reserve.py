"""A spawner of last resort: it starts programs where a guest has used up its processes, or kills every spawner.

It is forked when a spawner could not do it. It keeps the VM's uid 0 where there is one, so that the guest's
processes neither count against it nor may signal it, and it may have more processes than they. With a single id
they may kill it: then init stops all else in the VM until the next one has started its program. What it starts
gives that up just before execve(2): so it forks, which takes longer than posix_spawn(3) does.
"""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

from agentos.linux import privileges, syscalls
from agentos.machine.confinement import Confinement, go_before_init

FOR_PROGRAMS = 16
"""Processes beyond the limit that the programs started here may have, so that a shell among them can fork."""
FOR_ITSELF = 32
"""Processes beyond the limit up to which it starts programs."""


class Reserve:
    """Starts programs as `uid`, who may have `processes` processes."""

    def __init__(self, uid: int, processes: int, confinement: Confinement) -> None:
        self.uid = uid
        self.processes = processes
        self.confinement = confinement

    def take_ids(self) -> None:
        """Become what this process is until it ends. Paths are looked up with the rights of `uid`."""
        if self.confinement.mode == "single":
            self.confinement.take_ids(self.uid, capabilities=privileges.CAP_SYS_ADMIN)
            return
        kept = (privileges.CAP_SETUID, privileges.CAP_SETGID, privileges.CAP_KILL)
        capabilities = privileges.CAP_SYS_ADMIN | sum(1 << cap for cap in kept)
        if self.uid == 0:
            capabilities |= privileges.ROOT_CAPS
        self.confinement.take_ids(0, capabilities=capabilities)
        syscalls.setfsgid(self.uid)
        syscalls.setfsuid(self.uid)

    def start(self, path: str, argv: list[str], environment: dict[bytes, bytes], actions: list[Any]) -> int:
        """As os.posix_spawn, in a session of its own. Raises OSError when the program could not be executed."""
        failed_read, failed_write = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    self._become(path, argv, environment, actions)
                except OSError as error:
                    os.write(failed_write, (error.errno or 0).to_bytes(4, "little"))
                finally:
                    os._exit(127)
            os.close(failed_write)
            failed_write = -1
            number = int.from_bytes(os.read(failed_read, 4), "little")
        finally:
            os.close(failed_read)
            if failed_write >= 0:
                os.close(failed_write)
        if number:
            os.waitpid(pid, 0)
            raise OSError(number, os.strerror(number), path)
        return pid

    def _become(
        self, path: str, argv: list[str], environment: dict[bytes, bytes], actions: list[Any]
    ) -> None:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for action in actions:
            if action[0] == os.POSIX_SPAWN_OPEN:
                _, target, source, flags, mode = action
                fd = os.open(source, flags, mode)
            else:
                _, fd, target = action
            os.dup2(fd, target)
        # Where init has a higher priority, a lower one than that, but before all else that runs in the VM.
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) // 2)
        privileges.set_limit(resource.RLIMIT_NPROC, self.processes + FOR_PROGRAMS)
        syscalls.setfsuid(os.geteuid())
        go_before_init()
        as_root = self.uid == 0 and self.confinement.mode != "single"
        self.confinement.take_ids(self.uid, capabilities=privileges.ROOT_CAPS if as_root else 0)
        os.execve(path, argv, environment)
