"""The VM's process table, as init reads it, made into ProcessInfo and into a tree."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from agentos.machine.plan import UIDS
from agentos.machine.spawner import WASM_RUNNER
from agentos.model import Driver, ProcessInfo, ProcessTreeNode

_DRIVERS = {
    "node": "node", "nodejs": "node", "deno": "deno", "bun": "bun", "java": "java", "ruby": "ruby", "php": "php",
    "perl": "perl", "wasmtime": "wasm", "wasmer": "wasm",
}  # fmt: skip
_USERS = {uid: name for name, uid in UIDS.items()}
_TICKS = os.sysconf("SC_CLK_TCK")


def driver_of(exe: str | None, comm: str, args: list[str]) -> Driver:
    """The runtime that runs a process: by its executable, not by the name that it gives itself."""
    if WASM_RUNNER in args[:3]:
        return "wasm"
    name = os.path.basename(exe or (args[0] if args else comm)).removesuffix(" (deleted)")
    if name.startswith(("python", "pypy")):
        return "python"
    return _DRIVERS.get(name.rstrip("0123456789.") or name, "native")


def process_info(entry: Mapping[str, Any], managed: Mapping[int, str | None]) -> ProcessInfo:
    """One process. `managed` has the mark's shell id, or None, for each pid that the API started."""
    pid = int(entry["pid"])
    args = [str(one) for one in entry["args"]]
    driver = driver_of(entry["exe"], str(entry["comm"]), args)
    if driver == "wasm" and WASM_RUNNER in args:
        args = args[args.index(WASM_RUNNER) + 1 :]
    state = str(entry["state"])
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return ProcessInfo(
        pid=pid, ppid=int(entry["ppid"]), pgid=int(entry["pgid"]), sid=int(entry["sid"]), driver=driver,
        command=args[0] if args else str(entry["comm"]), args=tuple(args[1:]), cwd=entry["cwd"],
        status="exited" if state in ("Z", "X") and int(entry["threads"]) <= 1 else "running", exit_code=None,
        start_time=boot + int(entry["start_ticks"]) / _TICKS, exit_time=None,
        user=_USERS.get(int(entry["uid"]), str(entry["uid"])), state=state, cpu_ms=float(entry["cpu_ms"]),
        rss_bytes=int(entry["rss_bytes"]), threads=int(entry["threads"]),
        managed=pid in managed, shell_id=managed.get(pid),
    )  # fmt: skip


def tree_of(processes: Iterable[ProcessInfo]) -> list[ProcessTreeNode]:
    """The processes as a forest by parent, children in order of pid. Those whose parent is not listed are roots.

    A table read while processes come and go may hold any parents, even a cycle: every process appears once.
    """
    listed = {one.pid: one for one in sorted(processes, key=lambda one: one.pid)}
    children: dict[int, list[int]] = {}
    roots = []
    for pid, one in listed.items():
        if one.ppid in listed and not _leads_to(one.ppid, pid, listed):
            children.setdefault(one.ppid, []).append(pid)
        else:
            roots.append(pid)
    built: dict[int, ProcessTreeNode] = {}
    for pid in _bottom_up(roots, children):
        built[pid] = ProcessTreeNode(listed[pid], tuple(built[child] for child in children.get(pid, ())))
    return [built[pid] for pid in roots]


def _leads_to(start: int, wanted: int, listed: Mapping[int, ProcessInfo]) -> bool:
    seen: set[int] = set()
    while start in listed and start not in seen:
        if start == wanted:
            return True
        seen.add(start)
        start = listed[start].ppid
    return False


def _bottom_up(roots: list[int], children: Mapping[int, list[int]]) -> list[int]:
    order: list[int] = []
    pending = list(roots)
    while pending:
        pid = pending.pop()
        order.append(pid)
        pending += children.get(pid, ())
    return order[::-1]
