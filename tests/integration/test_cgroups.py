"""Cgroups on the real kernel, whichever version it has: limits hold, figures are right, nothing is left."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentos.linux.cgroups import Cgroup, CgroupSetup, Scope, detect, files, open_scope, sweep_stale
from agentos.linux.cgroups.delegation import LEAF

MIB = 1024 * 1024
SOURCE = str(Path(__file__).parents[2] / "src")
SLOW = float(os.environ.get("AGENTOS_TESTS_SLOWNESS", "1"))
"""How many times longer than usual a busy or emulated machine may take."""

SLEEP = ["sleep", "1000"]
SPIN = [sys.executable, "-S", "-c", "while True: pass"]
HOG = [sys.executable, "-S", "-c", "print(len(bytearray(b'x') * (200 * 1024 * 1024)))"]
# Says how many children it could have at once.
FORK = """
import os, signal
children = []
try:
    for _ in range(60):
        pid = os.fork()
        if not pid:
            signal.pause()
        children.append(pid)
except BlockingIOError:
    pass
print(len(children))
for pid in children:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""
# Says how many bytes it could send to itself over 40 connections.
UNREAD = """
import socket
server = socket.create_server(("127.0.0.1", 0))
kept, sent = [], 0
for _ in range(40):
    try:
        client = socket.create_connection(server.getsockname(), 5)
        client.setblocking(False)
        kept += [client, server.accept()[0]]
        while True:
            sent += client.send(bytes(1 << 20))
    except OSError:
        pass
print(sent)
"""
# Each process forks as long as it can, so that there is always a new one.
BOMB = """
import os
while True:
    try:
        os.fork()
    except BlockingIOError:
        pass
"""
OWNER = """
import json, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from agentos.linux.cgroups import detect, open_scope
group = open_scope(detect()).create("left", pids=50)
child = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, preexec_fn=group.join)
if sys.argv[2] == "frozen":
    group.freeze()
print(json.dumps([child.pid, group.to_dict()]), flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def setup() -> CgroupSetup:
    """What this machine offers; the tests are skipped where that is no memory limit."""
    found = detect()
    if "memory" not in found.limits:
        why = f"no usable cgroups: {found.problems}"
        if os.environ.get("AGENTOS_TESTS_MUST_RUN"):
            pytest.fail(why)
        pytest.skip(why)
    return found


@pytest.fixture
def scope(setup: CgroupSetup) -> Iterator[Scope]:
    made = open_scope(setup)
    try:
        yield made
    finally:
        made.close()
    assert [path for path in made.directories if os.path.exists(path)] == []


def start(group: Cgroup, command: list[str], cpu: int | None = None) -> subprocess.Popen[str]:
    def enter() -> None:
        group.join()
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})

    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def cpu_s(group: Cgroup) -> float:
    used = group.cpu_time_ns()
    assert used is not None
    return used / 1e9


def on_v1_only(setup: CgroupSetup) -> bool:
    return all(version == 1 for version, _ in setup.homes.values())


def test_detecting_leaves_nothing_and_tells_everything(setup: CgroupSetup) -> None:
    """Detection removes its probes, and what it says is JSON."""
    again = detect()
    assert again.homes == setup.homes
    left = {name for _, base in setup.homes.values() for name in files.children(base)}
    assert f"agentos-probe-{os.getpid()}" not in left
    said = json.loads(json.dumps(again.describe()))
    assert set(said["controllers"]) == {"memory", "pids", "cpu", "cpuacct", "freezer"}
    assert sorted(said["enforced"]) == sorted(again.limits)


def test_memory_hog_is_killed(scope: Scope) -> None:
    """A process that wants 200 MiB where 64 are allowed is killed, and counted once."""
    group = scope.create("hog", memory_bytes=64 * MIB)
    assert "memory" in group.enforced
    hog = start(group, HOG)
    assert hog.communicate() == ("", None)
    assert hog.returncode == -signal.SIGKILL
    assert group.oom_kills() == 1
    peak = group.memory_peak()
    assert peak is not None
    assert 32 * MIB < peak <= 64 * MIB


def test_what_sockets_hold_is_limited(scope: Scope, setup: CgroupSetup) -> None:
    """Data that was sent and that nobody reads: without a limit it could be all that the machine has for sockets."""
    group = scope.create("sockets", memory_bytes=64 * MIB)
    sender = start(group, [sys.executable, "-S", "-c", UNREAD])
    said, _ = sender.communicate(timeout=60 * SLOW)
    if setup.homes["memory"][0] == 2 and sender.returncode == -signal.SIGKILL:
        # Version 2 counts it as memory like any other, and may kill for it.
        assert group.oom_kills() == 1
    else:
        assert 0 < int(said) <= 48 * MIB


def test_memory_below_the_limit_is_left_alone(scope: Scope) -> None:
    """The same process lives where 400 MiB are allowed, and its memory is seen."""
    group = scope.create("fits", memory_bytes=400 * MIB)
    hog = start(group, HOG)
    assert hog.communicate()[0] == f"{200 * MIB}\n"
    assert group.oom_kills() == 0
    assert (group.memory_peak() or 0) > 200 * MIB


def test_process_limit(scope: Scope) -> None:
    """With 20 processes allowed, a process has 19 children and is refused the next."""
    group = scope.create("fork", pids=20)
    forker = start(group, [sys.executable, "-S", "-c", FORK])
    assert forker.communicate()[0] == "19\n"
    assert group.pids_limit_hits() >= 1
    assert group.pids_current() == 0


def sign(fd: int, events: int, seconds: float) -> bool:
    """Whether the kernel says something on an alarm within that time."""
    waiting = select.poll()
    waiting.register(fd, events)
    return bool(waiting.poll(seconds * 1000 * SLOW))


def test_the_kernel_tells_of_limits(scope: Scope, setup: CgroupSetup) -> None:
    """A kill for want of memory wakes who waits for it, a refused fork with version 2; and nothing does before."""
    group = scope.create("told", memory_bytes=64 * MIB, pids=20)
    alarms = group.alarms()
    try:
        assert set(alarms) == {"memory", "pids"} & set(setup.homes)
        for fd, events in alarms.values():
            assert not sign(fd, events, 0.0)
        end_of_hog = start(group, HOG)
        assert sign(*alarms["memory"], 10)
        end_of_hog.communicate()
        assert group.oom_kills() == 1
        if setup.homes["pids"][0] == 2:
            forking = start(group, [sys.executable, "-S", "-c", FORK])
            assert sign(*alarms["pids"], 10)
            forking.communicate()
            assert group.pids_limit_hits() == 1
    finally:
        for fd, _ in alarms.values():
            os.close(fd)


def test_cpu_quota(scope: Scope) -> None:
    """Half a core gives a busy process about half of the time that passes."""
    group = scope.create("busy", cpu_cores=0.5)
    busy = start(group, SPIN)
    try:
        time.sleep(0.5)
        before, began = cpu_s(group), time.monotonic()
        time.sleep(2)
        share = (cpu_s(group) - before) / (time.monotonic() - began)
    finally:
        end(busy)
    assert 0.3 < share < 0.6


def test_cpu_weight(scope: Scope) -> None:
    """On one CPU a cgroup of weight 800 gets several times what one of weight 100 gets."""
    groups = [scope.create("light", cpu_weight=100), scope.create("heavy", cpu_weight=800)]
    cpu = min(os.sched_getaffinity(0))
    busy = [start(group, SPIN, cpu) for group in groups]
    try:
        time.sleep(1.5)
        light, heavy = (cpu_s(group) for group in groups)
    finally:
        end(*busy)
    assert heavy > 3 * light


@pytest.mark.parametrize("cores", [0.001, 0.05, 1.5])
def test_any_quota_is_accepted(scope: Scope, cores: float) -> None:
    """Small and large quotas stay within what the kernel takes."""
    if cores > (os.cpu_count() or 1):
        pytest.skip("a parent cgroup may have less")
    assert "cpu_cores" in scope.create("quota", cpu_cores=cores).enforced


def test_add_moves_a_running_process(scope: Scope) -> None:
    """A process that runs already can be put in, and is in every hierarchy then."""
    group = scope.create("added")
    sleeper = subprocess.Popen(SLEEP)
    try:
        group.add(sleeper.pid)
        assert [files.processes(path) for path in group.directories] == [[sleeper.pid]] * len(
            group.directories
        )
        assert group.pids_current() == 1
    finally:
        sleeper.kill()
        sleeper.wait()


def test_adding_a_process_that_has_ended_fails(scope: Scope) -> None:
    """The error says which file refused."""
    group = scope.create("nobody")
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(ProcessLookupError) as caught:
        group.add(gone.pid)
    assert "cgroup.procs" in caught.value.__notes__[0]


def test_released_cgroup_starts_from_zero(scope: Scope, setup: CgroupSetup) -> None:
    """What one VM did is neither counted nor enforced for the next; version 1 reuses the directories."""
    first = scope.create("first", memory_bytes=64 * MIB, pids=10, cpu_cores=0.25, cpu_weight=10)
    start(first, HOG).communicate()
    start(first, [sys.executable, "-S", "-c", FORK]).communicate()
    assert first.oom_kills() == 1
    assert first.pids_limit_hits() >= 1
    assert scope.release(first) is on_v1_only(setup)

    second = scope.create("second", memory_bytes=300 * MIB, pids=40)
    assert (second.homes == first.homes) is on_v1_only(setup)
    assert second.name == "second"
    assert {"memory", "pids"} <= second.enforced <= {"memory", "swap", "pids"}
    usage = second.usage()
    assert [usage[key] for key in ("oom_kills", "pids_limit_hits", "cpu_time_ns")] == [0, 0, 0]
    assert (usage["memory_peak"] or 0) < 32 * MIB
    assert start(second, HOG).communicate()[0] == f"{200 * MIB}\n"
    assert start(second, [sys.executable, "-S", "-c", FORK]).communicate()[0] == "39\n"
    assert second.oom_kills() == 0


def test_limits_of_a_reused_cgroup_go_up_and_down(scope: Scope) -> None:
    """Memory and swap limits change in either direction, and to none, without the kernel refusing."""
    for size in (64, 256, 32, None, 128, 128):
        group = scope.create("sized", memory_bytes=None if size is None else size * MIB)
        assert ("memory" in group.enforced) is (size is not None)
        hog = start(group, HOG)
        hog.communicate()
        assert (hog.returncode == 0) is (size is None or size > 200)
        scope.release(group)


def test_free_cgroups_are_bounded(setup: CgroupSetup) -> None:
    """No more emptied cgroups are kept than asked for."""
    scope = open_scope(setup, max_free=2)
    try:
        kept = [scope.release(group) for group in [scope.create(str(number)) for number in range(4)]]
        assert sum(kept) == (2 if on_v1_only(setup) else 0)
        left = {len(files.children(path)) for path in scope.directories}
        assert left == {sum(kept)}
    finally:
        scope.close()


def test_release_kills_what_is_left(scope: Scope) -> None:
    """A process that outlived its VM does not live on in the next one's cgroup."""
    group = scope.create("left", pids=5)
    sleeper = start(group, SLEEP)
    scope.release(group)
    assert sleeper.wait() == -signal.SIGKILL
    sleeper.communicate()
    assert scope.create("next").processes() == []


def test_kill_ends_a_fork_bomb(scope: Scope) -> None:
    """Killing ends even processes that fork as fast as they can."""
    group = scope.create("bomb", pids=60, cpu_cores=1)
    bomb = start(group, [sys.executable, "-S", "-c", BOMB])
    began = time.monotonic()
    while (group.pids_current() or 0) < 60:
        assert time.monotonic() < began + 20 * SLOW
    assert group.kill(10 * SLOW)
    assert group.processes() == []
    bomb.communicate()


def test_freeze_stops_and_thaw_continues(scope: Scope, setup: CgroupSetup) -> None:
    """A frozen process takes no CPU time, dies of kill, and goes on when thawed."""
    if "freezer" not in setup.homes:
        pytest.skip("no freezer")
    group = scope.create("cold")
    busy = start(group, SPIN)
    try:
        assert group.freeze()
        before = cpu_s(group)
        time.sleep(0.3)
        assert cpu_s(group) == before
        group.thaw()
        began = time.monotonic()
        while cpu_s(group) <= before:
            assert time.monotonic() < began + 5 * SLOW
        assert group.freeze()
        assert group.kill()
    finally:
        end(busy)


def test_limit_that_the_kernel_refuses_makes_no_cgroup(scope: Scope) -> None:
    """Creation fails with the file's name in a note, and leaves no directory."""
    with pytest.raises(OSError) as caught:
        scope.create("wrong", memory_bytes=64 * MIB, pids=-5)
    assert caught.value.errno == errno.EINVAL
    assert "pids.max" in caught.value.__notes__[0]
    assert [files.children(path) for path in scope.directories] == [[]] * len(scope.directories)


def test_remove_waits_for_the_dying_and_refuses_the_living(scope: Scope) -> None:
    """Removal outlasts an exit that is under way, but does not kill."""
    group = scope.create("busy")
    sleeper = start(group, SLEEP)
    with pytest.raises(OSError) as caught:
        group.remove(timeout=0.05)
    assert caught.value.errno == errno.EBUSY
    assert "rmdir" in caught.value.__notes__[0]
    sleeper.kill()
    group.remove()
    assert [os.path.exists(path) for path in group.directories] == [False] * len(group.directories)
    group.remove()
    sleeper.communicate()


def test_figures_by_path(scope: Scope) -> None:
    """Another process gets the same figures out of the cgroup's JSON."""
    group = scope.create("seen", memory_bytes=64 * MIB, pids=10)
    start(group, HOG).communicate()
    other = Cgroup.from_dict(json.loads(json.dumps(group.to_dict())))
    assert other.usage() == group.usage()
    assert other.oom_kills() == 1
    assert (other.name, other.enforced, other.limits) == (group.name, group.enforced, group.limits)


@pytest.mark.parametrize("state", ["running", "frozen"])
def test_scope_of_a_killed_owner_is_swept(setup: CgroupSetup, scope: Scope, state: str) -> None:
    """What a killed host leaves is killed and removed; scopes of living hosts stay."""
    mine = scope.create("mine")
    sleeper = start(mine, SLEEP)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, SOURCE, state], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    try:
        pid, data = json.loads(owner.stdout.readline())
        left = Cgroup.from_dict(data)
        name = next(iter(left.directories)).split("/")[-2]
        assert left.processes() == [pid]
        assert name not in sweep_stale(setup)["removed"]
        assert left.processes() == [pid]
    finally:
        owner.kill()
        owner.communicate()
    swept = sweep_stale(setup)
    assert name in swept["removed"]
    assert swept["left"] == []
    assert left.processes() == []
    assert [os.path.exists(os.path.dirname(path)) for path in left.directories] == [False] * len(
        left.directories
    )
    assert mine.processes() == [sleeper.pid]
    end(sleeper)


class TestDelegation:
    """Version 2 only: a cgroup that holds processes hands nothing down until they have moved."""

    @pytest.fixture
    def session(self, setup: CgroupSetup) -> Iterator[str]:
        """A cgroup as a service manager makes for a session, with controllers to hand down."""
        version, base = setup.homes["memory"]
        if version != 2:
            pytest.skip("the memory controller is not on version 2")
        path = f"{base}/agentos-test-session"
        os.mkdir(path)
        for controller in ("memory", "pids", "cpu"):
            files.write(base + "/cgroup.subtree_control", f"+{controller}")
        try:
            yield path
        finally:
            files.destroy([path], time.monotonic() + 5)

    @staticmethod
    def detect_in(session: str) -> dict[str, dict[str, dict[str, object]]]:
        """What detection in a process of that cgroup says, after it also made a scope and closed it."""
        script = (
            "import json, os, sys\nsys.path.insert(0, sys.argv[1])\n"
            "from agentos.linux.cgroups import detect, files, open_scope\n"
            "files.write(sys.argv[2] + '/cgroup.procs', 0)\n"
            "found = detect()\n"
            "assert detect().homes == found.homes\n"
            "scope = open_scope(found)\nscope.create('x', pids=3)\nscope.close()\n"
            "print(json.dumps(found.describe()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, SOURCE, session], stdout=subprocess.PIPE, text=True, check=True
        )
        found: dict[str, dict[str, dict[str, object]]] = json.loads(done.stdout)
        return found

    def test_own_process_is_moved_to_a_leaf(self, session: str) -> None:
        """Alone in its cgroup, the process moves down and gets all controllers."""
        found = self.detect_in(session)
        assert found["controllers"]["memory"]["directory"] == session
        assert found["not_enforced"] == []
        assert files.children(session) == [LEAF]

    def test_a_stranger_is_not_moved(self, session: str) -> None:
        """Where another's process is in the way, nothing moves and the reason names it."""
        stranger = subprocess.Popen(SLEEP)
        try:
            files.write(session + "/cgroup.procs", stranger.pid)
            found = self.detect_in(session)
            assert found["controllers"]["memory"]["version"] is None
            problem = found["controllers"]["memory"]["problems"][-1]  # type: ignore[index]
            assert problem["errno"] == "EBUSY"
            assert str(stranger.pid) in problem["what"]
            # What version 2 has without controllers is used all the same.
            assert found["controllers"]["freezer"]["version"] == 2
            assert files.children(session) == []
            assert files.processes(session) == [stranger.pid]
        finally:
            stranger.kill()
            stranger.wait()

    @pytest.mark.skipif(os.geteuid() != 0, reason="the mark of a delegated cgroup is root's to set")
    def test_all_of_a_delegated_cgroup_are_moved(self, session: str) -> None:
        """systemd's mark of delegation makes every process of the cgroup ours to move."""
        os.setxattr(session, "trusted.delegate", b"1")
        stranger = subprocess.Popen(SLEEP)
        try:
            files.write(session + "/cgroup.procs", stranger.pid)
            assert self.detect_in(session)["not_enforced"] == []
            assert files.processes(f"{session}/{LEAF}") == [stranger.pid]
        finally:
            stranger.kill()
            stranger.wait()
