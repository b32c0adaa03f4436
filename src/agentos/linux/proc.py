"""Readers of proc(5): the process table of the pid namespace that /proc belongs to.

Everything read here was written by whoever runs in that namespace: names and arguments are hostile
bytes, returned as text with surrogateescape and cut to a bound. A process that ends while it is read
is left out.
"""

from __future__ import annotations

import os

MAX_CMDLINE_BYTES = 8192
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICK_MS = 1000.0 / os.sysconf("SC_CLK_TCK")


def pids(proc: str = "/proc") -> list[int]:
    """Every pid in the namespace, ascending."""
    return sorted(int(name) for name in os.listdir(proc) if name.isdigit())


def read_small(path: str, limit: int = 65536) -> bytes:
    """At most `limit` bytes of a proc file, in one read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)


def parse_stat(text: bytes) -> tuple[int, str, list[bytes]]:
    """proc_pid_stat(5): pid, comm, and the fields from `state` on. comm may hold spaces and parentheses."""
    head, _, rest = text.rpartition(b")")
    pid, _, comm = head.partition(b"(")
    return int(pid), comm.decode("utf-8", "surrogateescape"), rest.split()


def split_cmdline(data: bytes) -> list[str]:
    """proc_pid_cmdline(5) as a list of arguments; the last may be cut short."""
    if not data:
        return []
    return [part.decode("utf-8", "surrogateescape") for part in data.rstrip(b"\0").split(b"\0")]


def read_process(pid: int, proc: str = "/proc") -> dict[str, object] | None:
    """One process as JSON values, or None when it is gone."""
    base = f"{proc}/{pid}"
    try:
        _, comm, fields = parse_stat(read_small(f"{base}/stat", 4096))
        cmdline = split_cmdline(read_small(f"{base}/cmdline", MAX_CMDLINE_BYTES))
        uid = os.stat(base).st_uid
        status_uid = _real_uid(read_small(f"{base}/status", 4096))
    except (OSError, ValueError, IndexError):
        return None
    return {
        "pid": pid,
        "ppid": int(fields[1]),
        "pgid": int(fields[2]),
        "sid": int(fields[3]),
        "state": fields[0].decode("ascii", "replace"),
        "comm": comm,
        "args": cmdline,
        "uid": status_uid if status_uid is not None else uid,
        "exe": _link(f"{base}/exe"),
        "cwd": _link(f"{base}/cwd"),
        "cpu_ms": (int(fields[11]) + int(fields[12])) * _TICK_MS,
        "threads": int(fields[17]),
        "start_ticks": int(fields[19]),
        "rss_bytes": int(fields[21]) * _PAGE_BYTES,
    }


def cpu_ms(pid: int, proc: str = "/proc") -> float:
    """CPU time of a process and of the children it has waited for, in milliseconds; 0 when it is gone."""
    try:
        _, _, fields = parse_stat(read_small(f"{proc}/{pid}/stat", 4096))
        return sum(int(field) for field in fields[11:15]) * _TICK_MS
    except (OSError, ValueError, IndexError):
        return 0.0


def _real_uid(status: bytes) -> int | None:
    start = status.find(b"\nUid:")
    return int(status[start + 5 :].split(None, 1)[0]) if start >= 0 else None


def _link(path: str) -> str | None:
    try:
        return os.fsdecode(os.readlink(path))
    except OSError:
        return None
