"""A file worker as one would write it first, on the host: for one mutation only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

PARENT, STARTED = 4, 22
"""Fields of proc_pid_stat(5)."""


def worker_on_the_host() -> socket.socket:
    """What stands in the place of the worker in the VM."""
    ours, theirs = socket.socketpair()
    with theirs:
        code = "from tests.escape.hostwalk import serve; serve()"
        command = [sys.executable, "-c", code, str(theirs.fileno())]
        subprocess.Popen(command, pass_fds=[theirs.fileno()])
    return ours


def root_of_the_vm() -> str:
    """The root directory of the init that was started last by this process's parent."""
    found = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        # Others come and go meanwhile, such as the processes that make other VMs.
        with suppress(FileNotFoundError, ProcessLookupError):
            if is_init(pid) and number(number(pid, PARENT), PARENT) == os.getppid():
                # Not the time of its directory: that is when somebody first looked, or did so again.
                found.append((number(pid, STARTED), pid))
    return f"/proc/{max(found)[1]}/root"


def is_init(pid: int) -> bool:
    """Whether a process is a VM's first."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        status = file.read()
    inner = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
    return status.startswith("Name:\tinit\n") and inner[2:] == ["1"]


def number(pid: int, field: int) -> int:
    """A field of a process's stat, proc_pid_stat(5), that is a number."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return int(file.read().rpartition(")")[2].split()[field - 3])


def serve() -> None:
    """Serve like the worker, with the host's own view of every path."""
    from agentos.linux import syscalls
    from agentos.machine import fileserver

    root = root_of_the_vm()
    user = os.stat(f"{root}/home/agentos").st_uid
    syscalls.setfsgid(user)
    syscalls.setfsuid(user)
    answer = fileserver._answer

    def on_the_host(link: Any, request: dict[str, Any]) -> Any:
        for name in ("path", "target"):
            if isinstance(request.get(name), str):
                request[name] = root + request[name]
        return answer(link, request)

    fileserver._answer = on_the_host
    fileserver.serve(int(sys.argv[1]))
