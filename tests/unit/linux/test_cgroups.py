"""What cgroups are found in the text of /proc, how control files are written and read, what is stale."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentos.linux.cgroups import (
    Cgroup,
    CgroupSetup,
    delegation,
    detect,
    files,
    find,
    none,
    open_scope,
    scope,
    v1,
    v2,
)
from agentos.linux.cgroups import sweep_stale as sweep

MIB = 1024 * 1024

V1_CGROUP = """\
12:pids:/user.slice/user-1000.slice/session-2.scope
11:memory:/user.slice/user-1000.slice/session-2.scope
10:cpu,cpuacct:/user.slice
9:freezer:/
1:name=systemd:/user.slice/user-1000.slice/session-2.scope
"""
V1_MOUNTS = """\
25 30 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
32 25 0:27 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,size=4096k,mode=755
33 32 0:28 / /sys/fs/cgroup/systemd rw,relatime shared:11 - cgroup cgroup rw,xattr,name=systemd
36 32 0:32 / /sys/fs/cgroup/pids rw,relatime shared:15 - cgroup cgroup rw,pids
37 32 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:16 - cgroup cgroup rw,cpu,cpuacct
38 32 0:34 / /sys/fs/cgroup/memory rw,relatime shared:17 - cgroup cgroup rw,memory
39 32 0:35 / /sys/fs/cgroup/freezer rw,relatime shared:18 - cgroup cgroup rw,freezer
"""
V2_CGROUP = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-u7.scope\n"
V2_MOUNTS = """\
25 30 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw
35 25 0:31 / /sys/fs/cgroup rw,nosuid,nodev,noexec shared:10 - cgroup2 cgroup2 rw,nsdelegate
"""
HYBRID_CGROUP = "8:pids:/\n4:memory:/jobs/81a2:15\n1:cpu:/\n0::/session\n"
HYBRID_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def own(cgroup: str, mounts: str, controller: str) -> list[str]:
    return find.own_directories(controller, find.parse_memberships(cgroup), find.parse_mounts(mounts))


@pytest.mark.parametrize(
    ("cgroup", "mounts", "controller", "expected"),
    [
        (
            V1_CGROUP,
            V1_MOUNTS,
            "memory",
            ["/sys/fs/cgroup/memory/user.slice/user-1000.slice/session-2.scope"],
        ),
        (V1_CGROUP, V1_MOUNTS, "cpu", ["/sys/fs/cgroup/cpu,cpuacct/user.slice"]),
        (V1_CGROUP, V1_MOUNTS, "cpuacct", ["/sys/fs/cgroup/cpu,cpuacct/user.slice"]),
        (V1_CGROUP, V1_MOUNTS, "freezer", ["/sys/fs/cgroup/freezer"]),
        (V1_CGROUP, V1_MOUNTS, find.V2, []),
        (V1_CGROUP, V1_MOUNTS, "hugetlb", []),
        (V2_CGROUP, V2_MOUNTS, find.V2, [f"/sys/fs/cgroup{V2_CGROUP[3:-1]}"]),
        (V2_CGROUP, V2_MOUNTS, "memory", []),
        # A colon in the path, and each version where its own mount is.
        (HYBRID_CGROUP, HYBRID_MOUNTS, "memory", ["/sys/fs/cgroup/memory/jobs/81a2:15"]),
        (HYBRID_CGROUP, HYBRID_MOUNTS, find.V2, ["/sys/fs/cgroup/unified/session"]),
        # In the file of memberships, but its hierarchy is not mounted here.
        (HYBRID_CGROUP, HYBRID_MOUNTS, "cpu", []),
        ("", V1_MOUNTS, "memory", []),
        (V1_CGROUP, "", "memory", []),
    ],
)
def test_own_directory(cgroup: str, mounts: str, controller: str, expected: list[str]) -> None:
    """Each controller's own directory is found where its own hierarchy is mounted."""
    assert own(cgroup, mounts, controller) == expected


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        # A container that shares the host's cgroup namespace sees only its own part of the hierarchy.
        ("/docker/3f1c", "/docker/3f1c", "/c"),
        ("/docker/3f1c/inner", "/docker/3f1c", "/c/inner"),
        ("/docker/3f1c22", "/docker/3f1c", None),
        ("/", "/docker/3f1c", None),
        # One with its own: the root is its own cgroup.
        ("/", "/", "/c"),
        ("/inner", "/", "/c/inner"),
        # Outside of the namespace's root: where that is mounted cannot be known.
        ("/../other", "/", None),
        ("/..", "/..", None),
        ("/..odd", "/", "/c/..odd"),
        # A mount made outside of the namespace.
        ("/", "/../..", None),
    ],
)
def test_locate(path: str, root: str, expected: str | None) -> None:
    """A cgroup is located through a mount of it or of one above it, and through no other."""
    mount = find.Mount(root, "/c", "cgroup2", frozenset())
    assert find.locate(path, mount) == expected


def test_locate_at_the_root_of_everything() -> None:
    """A hierarchy mounted on / has no empty path."""
    assert find.locate("/", find.Mount("/", "/", "cgroup2", frozenset())) == "/"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/plain", "/plain"),
        ("/with\\040space", "/with space"),
        ("/tab\\011line\\012end", "/tab\tline\nend"),
        ("/back\\134slash\\134040", "/back\\slash\\040"),
        ("/not\\9an\\04escape\\", "/not\\9an\\04escape\\"),
    ],
)
def test_escapes_of_mountinfo(text: str, expected: str) -> None:
    """Octal escapes are resolved once; anything else stays."""
    assert find.unescape(text) == expected


def test_escapes_in_paths() -> None:
    """A mount point and a mount's root with spaces are found; memberships are not escaped."""
    mounts = "35 25 0:31 /my\\040vm /mnt/c\\040g rw shared:1 master:2 - cgroup2 cgroup2 rw\n"
    assert own("0::/my vm/x\n", mounts, find.V2) == ["/mnt/c g/x"]


def test_the_newest_mount_comes_first_and_hidden_ones_do_not_count() -> None:
    """Two mounts of a hierarchy are both offered; one mounted over is not."""
    mounts = (
        "1 0 0:1 / /a rw - cgroup2 none rw\n"
        "2 0 0:1 / /b rw - cgroup2 none rw\n"
        "3 0 0:1 / /hidden rw - cgroup2 none rw\n"
        "4 3 0:9 / /hidden rw - tmpfs none rw\n"
    )
    assert own("0::/x\n", mounts, find.V2) == ["/b/x", "/a/x"]


def test_lines_that_are_not_understood() -> None:
    """Text of a future kernel, or cut off, is passed over."""
    assert find.parse_memberships("nonsense\n0:\n7:memory\n3:pids:/ok\n5:cpu:relative\n") == {"pids": "/ok"}
    assert find.parse_mounts("1 2\n- cgroup2\n1 2 0:1 / /x rw - \n1 2 0:1 / /x rw no dash\n") == []


def put(directory: Path, **contents: str) -> str:
    for name, text in contents.items():
        (directory / name.replace("__", ".")).write_text(text)
    return str(directory)


def got(directory: Path, name: str) -> str:
    return (directory / name).read_text()


def test_v2_memory_files(tmp_path: Path) -> None:
    """Limits and figures of version 2 memory go to and come from the documented files."""
    path = put(
        tmp_path,
        memory__max="max\n",
        memory__swap__max="max\n",
        memory__current="4096\n",
        memory__events="low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n",
    )
    memory = v2.Memory(path)
    memory.set_limit(64 * MIB, swap=True)
    assert (got(tmp_path, "memory.max")[:8], got(tmp_path, "memory.swap.max")[:1]) == ("67108864", "0")
    assert (memory.used(), memory.oom_kills()) == (4096, 2)
    assert memory.peak() is None, "before Linux 5.19 there is no memory.peak"
    put(tmp_path, memory__peak="8192\n")
    assert memory.peak() == 8192


def test_v2_other_files(tmp_path: Path) -> None:
    """So do those of processes and CPU."""
    path = put(
        tmp_path,
        pids__max="",
        pids__current="7\n",
        pids__events="max 5\n",
        cpu__max="",
        cpu__weight="",
        cpu__stat="usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
    )
    v2.Pids(path).set_limit(30)
    assert got(tmp_path, "pids.max") == "30"
    assert (v2.Pids(path).current(), v2.Pids(path).limit_hits()) == (7, 5)
    v2.Cpu(path).set_cores(0.5)
    v2.Cpu(path).set_weight(250)
    assert (got(tmp_path, "cpu.max"), got(tmp_path, "cpu.weight")) == ("50000 100000", "250")
    assert v2.Account(path).cpu_time_ns() == 1_500_000


def test_v1_swap_limit_is_never_below_that_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """memsw rises before the memory limit and falls after it: the kernel refuses any other order."""
    path = put(tmp_path, memory__limit_in_bytes="1000000", memory__memsw__limit_in_bytes="1000000")
    order: list[str] = []
    monkeypatch.setattr(
        v1, "write", lambda file, value: order.append(f"{file.split('memory.', 1)[1][:5]} {value}")
    )
    for limit in (2_000_000, 500_000, None):
        v1.Memory(path).set_limit(limit, swap=True)
    v1.Memory(path).set_limit(5, swap=False)
    assert order == [
        *("memsw 2000000", "limit 2000000"),
        *("limit 500000", "memsw 500000"),
        *("memsw -1", "limit -1"),
        "limit 5",
    ]


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (0.5, (50_000, 100_000)),
        (4, (400_000, 100_000)),
        (0.01, (1000, 100_000)),
        (0.005, (5000, 1_000_000)),
        (0.0001, (1000, 1_000_000)),
    ],
)
def test_quota(cores: float, expected: tuple[int, int]) -> None:
    """A quota is at least the kernel's least, 1 ms."""
    assert none.quota_us(cores) == expected


def test_without_any_cgroup_everything_does_nothing() -> None:
    """Where nothing is usable the same calls work, and nothing is said to be enforced."""
    made = open_scope(CgroupSetup({}, frozenset(), {}))
    group = made.create("vm", memory_bytes=MIB, pids=5, cpu_cores=1.0, cpu_weight=10)
    assert group.enforced == frozenset()
    assert group.limits["memory_bytes"] == MIB
    group.join()
    group.add(os.getpid())
    assert group.usage() == {
        "memory_used": None,
        "memory_peak": None,
        "oom_kills": 0,
        "pids_current": None,
        "pids_limit_hits": 0,
        "cpu_time_ns": None,
    }
    assert group.freeze() is False
    group.thaw()
    assert group.kill()
    assert group.processes() == []
    assert made.release(group) is False
    made.close()
    assert sweep(CgroupSetup({}, frozenset(), {})) == {"removed": [], "left": []}


def test_error_of_a_control_file_names_it(tmp_path: Path) -> None:
    """The path is in the error and, with the value, in its note."""
    with pytest.raises(FileNotFoundError) as caught:
        v2.Pids(str(tmp_path)).set_limit(5)
    assert caught.value.filename == f"{tmp_path}/pids.max"
    assert caught.value.__notes__ == [f"write 5 to {tmp_path}/pids.max"]
    assert not (tmp_path / "pids.max").exists()


def test_cgroup_as_json() -> None:
    """A cgroup survives JSON, without any file being there."""
    homes = {"memory": (1, "/nowhere/m/vm-1"), "pids": (2, "/nowhere/u/vm-1")}
    group = Cgroup("vm", homes, frozenset({"memory", "pids"}))
    again = Cgroup.from_dict(json.loads(json.dumps(group.to_dict())))
    assert (again.name, again.homes, again.to_dict()) == ("vm", homes, group.to_dict())
    assert again.directories == {"/nowhere/m/vm-1": 1, "/nowhere/u/vm-1": 2}
    with pytest.raises(ValueError, match="homes"):
        Cgroup.from_dict({"name": "vm"})


def test_unmounted_controllers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection without any hierarchy says why, per controller, and raises nothing."""
    monkeypatch.setattr(find, "parse_mounts", lambda text: [])
    found = detect()
    assert (found.homes, found.limits) == ({}, frozenset())
    said = json.loads(json.dumps(found.describe()))
    assert said["enforced"] == []
    for controller in ("memory", "pids", "cpu"):
        problems = said["controllers"][controller]["problems"]
        assert [(one["version"], one["errno"]) for one in problems] == [(1, "ENOENT"), (2, "ENOENT")]


def test_read_only_hierarchy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory in which no cgroup can be made is reported with the kernel's error."""
    monkeypatch.setattr(find, "own_directories", lambda *_: ["/proc/self"])
    found = detect()
    assert found.homes == {}
    assert found.problems["memory"][0]["directory"] == "/proc/self"
    assert found.problems["memory"][0]["errno"] in ("ENOENT", "EPERM", "EACCES", "EROFS")
    assert "mkdir /proc/self/agentos-probe-" in str(found.problems["memory"][0]["what"])


def test_directory_that_is_no_cgroup_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary directory takes mkdir but has no control files: not usable, and left as it was."""
    monkeypatch.setattr(find, "own_directories", lambda *_: [str(tmp_path)])
    assert detect().homes == {}
    assert list(tmp_path.iterdir()) == []


def test_leaf_is_not_nested() -> None:
    """A host that was started in another's leaf works beside it, not below."""
    assert delegation.above_leaf("/c/session/agentos-host") == "/c/session"
    assert delegation.above_leaf("/c/session") == "/c/session"


def test_staleness() -> None:
    """A scope is stale only if its owner is known to be gone: by pid, by start time, or a zombie."""
    mine = scope.scope_name(os.getpid())
    prefix, namespace, pid, started = mine.split("-")
    assert not scope._is_stale(mine)
    assert scope._is_stale(f"{prefix}-{namespace}-{pid}-{int(started) + 1}")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    theirs = scope.scope_name(gone.pid)
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    assert scope._is_stale(theirs)
    gone.wait()
    assert scope._is_stale(theirs)
    with pytest.raises(OSError) as caught:
        scope.scope_name(gone.pid)
    assert caught.value.errno == errno.ESRCH


@pytest.mark.parametrize(
    "name",
    ["agentos-host", "agentos-probe-1", "agentos-1-2", "agentos-1-2-x", "other-1-2-3", "agentos-1-2-3-4", ""],
)
def test_what_is_never_swept(name: str) -> None:
    """Names of another make, and scopes of another pid namespace, are left alone."""
    assert not scope._is_stale(name)
    assert not scope._is_stale(f"agentos-1-{2**22}-5")


def test_processes_of_a_directory_that_is_gone(tmp_path: Path) -> None:
    """A removed cgroup is empty, and removing it again is no error."""
    path = f"{tmp_path}/gone"
    assert files.processes(path) == []
    assert files.wait_empty(path, time.monotonic())
    files.remove(path, time.monotonic())
    files.destroy([path], time.monotonic())


def test_few_modules_are_imported() -> None:
    """The process that starts VMs stays small: nothing heavy comes in with this package."""
    package = str(Path(__file__).parents[3] / "src/agentos")
    # A bare package in place of agentos, whose own imports are not the matter here.
    code = (
        "import sys; agentos = type(sys)('agentos'); sys.modules['agentos'] = agentos\n"
        f"agentos.__path__ = [{package!r}]; import agentos.linux.cgroups\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    heavy = {"asyncio", "dataclasses", "logging", "pathlib", "subprocess", "threading", "typing"}
    assert heavy & set(done.stdout.split()) == set()
