"""What holds for every test: it leaves nothing behind, and in CI a test that cannot run has failed."""

from __future__ import annotations

import dataclasses
import gc
import glob
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator

import pytest

from agentos import background, host

MUST_RUN = os.environ.get("AGENTOS_TESTS_MUST_RUN") == "1"
OTHER_HOSTS = [
    "the memory controller is not on version 2",
    "this kernel has no 32-bit calls",
    "a parent cgroup may have less",
    "no filter for ",
    "the other numbers of x86",
    "this distribution's chromium is a snap",
]
"""Reasons to skip that name another kind of host: the rest would be a capability that CI lacks."""
OF_ROOT = [r"\broot\b", r"\bcgroup", r"\bcontroller"]
"""Reasons that an ordinary user may have besides."""
PATIENCE = 3.0
"""Seconds after which what a test started must be gone: the kernel ends processes and mounts in its own time."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With AGENTOS_TESTS_MUST_RUN=1 a skip for want of a capability is a failure."""
    report = yield
    if MUST_RUN and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        accepted = OTHER_HOSTS + (OF_ROOT if os.geteuid() != 0 else [])
        if not any(re.search(one, reason) for one in accepted):
            report.outcome = "failed"
            report.longrepr = f"{reason}: but with AGENTOS_TESTS_MUST_RUN=1 it must run"
    return report


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Descriptors, children, threads, mounts and cgroups are after a test what they were before.

    The default host's zygote with its pool and the thread of agentos.sync may come to stay.
    """
    before = belongings()
    yield
    deadline = time.monotonic() + PATIENCE
    while (left := belongings() - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not left, f"left behind: {dict(left)}"


def belongings() -> Counter[str]:
    """What this process has, in words, with how many of each."""
    fds, children, threads = of_the_session()
    have: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in fds:
            try:
                have[f"descriptor {re.sub(r'[0-9]+', 'N', os.readlink(f'/proc/self/fd/{name}'))}"] += 1
            except FileNotFoundError:
                pass  # that of the listing itself
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
                have.update("child process" for pid in file.read().split() if int(pid) not in children)
        except (FileNotFoundError, ProcessLookupError):
            pass  # a thread that has ended since
    have.update(f"thread {one.name}" for one in threading.enumerate() if one not in threads)
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        have.update(f"mount {line.split()[4]}" for line in file)
    have["cgroups in use"] = cgroups_in_use()
    return have


def of_the_session() -> tuple[set[int], set[int], set[threading.Thread]]:
    """Descriptors, children and threads that the default host and agentos.sync hold."""
    fds: set[int] = set()
    children: set[int] = set()
    threads: set[threading.Thread] = set()
    default = host._default
    if default is not None:
        factory = default._factory
        if factory.zygote is not None:
            fds.add(factory.zygote.fileno())
            children.add(factory.zygote.pid)
            threads.add(factory.zygote.thread)
        for raw in factory.pool.ready():
            held = [getattr(raw, one.name) for one in dataclasses.fields(raw)] + [raw.remains._sock]
            held += [part for one in held if isinstance(one, tuple) for part in one]
            fds |= {
                one if isinstance(one, int) else one.fileno()
                for one in held
                if isinstance(one, int | socket.socket) and not isinstance(one, bool)
            }
    behind = background._background
    if behind is not None:
        loop = behind.loop
        fds |= {loop._selector.fileno(), loop._ssock.fileno(), loop._csock.fileno()}  # type: ignore[attr-defined]
        threads.add(behind.thread)
        executor = loop._default_executor  # type: ignore[attr-defined]
        threads |= executor._threads if executor is not None else set()
    return fds, children, threads


def cgroups_in_use() -> int:
    """cgroups of the default host's VMs that hold a process, the pool's not counted."""
    default = host._default
    if default is None or default._factory.zygote is None:
        return 0
    homes = [
        state["directory"] for state in default._factory.cgroups["controllers"].values() if state["directory"]
    ]
    if not homes:
        return 0
    used = 0
    for path in glob.glob(f"{homes[0]}/agentos-*-{default._factory.zygote.pid}-*/vm-*/cgroup.procs"):
        try:
            with open(path, encoding="ascii") as file:
                used += bool(file.read())
        except OSError:
            pass  # removed meanwhile
    return max(0, used - len(default._factory.pool.ready()))
