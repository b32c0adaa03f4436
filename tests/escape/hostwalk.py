"""A file worker as one would write it first, on the host: for one mutation only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any


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
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/status", encoding="ascii") as file:
                status = file.read()
        except OSError:
            continue
        inner = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
        if (
            status.startswith("Name:\tinit\n")
            and inner[2:] == ["1"]
            and parent(parent(int(name))) == os.getppid()
        ):
            found.append((os.stat(f"/proc/{name}").st_ctime_ns, f"/proc/{name}/root"))
    return max(found)[1]


def parent(pid: int) -> int:
    """The parent of a process."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return int(file.read().rpartition(")")[2].split()[1])


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
