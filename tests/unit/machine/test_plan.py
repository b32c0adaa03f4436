"""The plan: which steps, in which order, for each kind of host. No privileges needed: the plan is data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentos.errors import BootFailed
from agentos.machine.boot import _OPERATIONS
from agentos.machine.plan import (
    MASKED_PROC,
    READ_ONLY_PROC,
    HostFacts,
    Mode,
    Step,
    describe,
    fittings_of,
    plan_vm,
)
from agentos.model import Limits, Mount, VmSpec

STAGE = "/mnt"


def facts(mode: Mode, **changed: Any) -> HostFacts:
    """What a common host offers: merged /usr, two things to hide in /proc."""
    base: dict[str, Any] = {
        "mode": mode,
        "stage": STAGE,
        "idmap": mode == "root",
        "masked_files": ("kcore",),
        "masked_dirs": ("acpi",),
        "read_only": ("sys",),
        "package_dirs": ("/usr",),
        "extra_mounts": (("/host/wasmtime", "/opt/agentos/lib/wasmtime"),),
        "binfmt_misc": mode == "root",
    }
    return HostFacts(**{**base, **changed})


def outline(steps: list[Step]) -> list[str]:
    """Operation and target of each step."""
    shown = []
    for operation, arguments in steps:
        target = arguments.get("target") or arguments.get("path") or ""
        shown.append(
            f"{operation} {target.removeprefix(STAGE)}".strip() + (" idmap" if "idmap" in arguments else "")
        )
    return shown


SYSTEM = [
    "bind /root/dev",
    "remount /root/dev",
    "filesystem /root/dev/pts",
    "filesystem /root/dev/shm",
    "filesystem /root/dev/mqueue",
    "filesystem /root/proc",
    "bind /root/proc/sys",
    "bind /root/proc/kcore",
    "bind /root/proc/acpi",
    "bind /root/opt/agentos/lib/wasmtime",
    "pivot_root",
    "hostname",
    "loopback",
]


def test_as_root_with_idmapped_mounts() -> None:
    """Skeleton and software are seen through the VM's ids, under layers of its own."""
    assert outline(plan_vm(VmSpec(), facts("root"))) == [
        "private_mounts",
        "filesystem /layer",
        "bind /lower idmap",
        "overlay /root",
        "bind /lower.0 idmap",
        "overlay /root/usr",
        *SYSTEM,
        "binfmt_misc",
        "limits",
    ]


def test_what_the_skeleton_adds_to_the_software_lies_over_it() -> None:
    """Seen through the VM's ids as both are, and below what the VM itself writes."""
    steps = plan_vm(VmSpec(), facts("root", added_to=("/usr",)))
    usr = next(one for _, one in steps if one.get("target") == f"{STAGE}/root/usr")
    assert usr["lower"] == f"{STAGE}/lower/usr:{STAGE}/lower.0"


@pytest.mark.parametrize("mode", ["root", "subuid", "single"])
def test_without_idmapped_mounts_software_is_read_only(mode: Mode) -> None:
    """No ids can be shown in another way, so nobody in the VM may write there."""
    steps = plan_vm(VmSpec(), facts(mode, idmap=False, binfmt_misc=False))
    assert outline(steps) == [
        "private_mounts",
        *([] if mode == "root" else ["users_limits"]),
        "filesystem /layer",
        "overlay /root",
        "bind /root/usr",
        *SYSTEM,
        *(["root_namespace"] if mode == "single" else []),
        "limits",
    ]
    usr = next(arguments for operation, arguments in steps if arguments.get("target") == f"{STAGE}/root/usr")
    assert usr["attributes"] == ["ro", "nosuid", "nodev"]


def test_only_a_range_of_ids_has_a_group_for_terminals() -> None:
    """With a single id, gid 5 does not exist in the VM."""
    for mode, group in (("root", "5"), ("subuid", "5"), ("single", None)):
        steps = plan_vm(VmSpec(), facts(mode))  # type: ignore[arg-type]
        pts = next(arguments for _, arguments in steps if arguments.get("type") == "devpts")
        assert pts["options"].get("gid") == group
        assert "newinstance" in pts["options"]


def test_limits_reach_the_steps_that_enforce_them() -> None:
    """Disk, shared memory, terminals, processes and open files; without a cgroup, each process's memory."""
    limits = Limits(disk_bytes=11, disk_files=12, shm_bytes=13, processes=14, open_files=16, terminals=17)
    steps = plan_vm(VmSpec(limits=limits), facts("root"))
    named = {arguments.get("target"): arguments for _, arguments in steps}
    assert named[f"{STAGE}/layer"]["options"] == {"size": "11", "nr_inodes": "12", "mode": "0755"}
    assert named[f"{STAGE}/root/dev/shm"]["options"]["size"] == "13"
    assert named[f"{STAGE}/root/dev/pts"]["options"]["max"] == "17"
    assert steps[-1] == ("limits", {"open_files": 16})
    steps = plan_vm(VmSpec(limits=limits), facts("subuid", memory_cgroup=False))
    assert steps[-1] == ("limits", {"open_files": 16, "data_bytes": limits.memory_bytes})


def test_mounts_of_the_spec_come_before_the_pivot() -> None:
    """Each with a place made for it, and read-only unless it says otherwise."""
    spec = VmSpec(
        mounts=(Mount("/srv/data", "/data/"), Mount("/srv/work", "/home/agentos/work", read_only=False))
    )
    steps = plan_vm(spec, facts("root"))
    shown = outline(steps)
    at = shown.index("mount_point /root/data")
    assert shown[at : at + 5] == [
        "mount_point /root/data",
        "bind /root/data idmap",
        "mount_point /root/home/agentos/work",
        "bind /root/home/agentos/work idmap",
        "pivot_root",
    ]
    assert "ro" in steps[at + 1][1]["attributes"]
    assert "ro" not in steps[at + 3][1]["attributes"]


def test_a_writable_mount_as_root_needs_idmapping() -> None:
    """Without, its files would belong to nobody in the VM: said before anything is made."""
    spec = VmSpec(mounts=(Mount("/srv/work", "/work", read_only=False),))
    with pytest.raises(BootFailed, match="id-mapped") as caught:
        plan_vm(spec, facts("root", idmap=False))
    assert caught.value.details["remedy"]


SPECS = st.builds(
    VmSpec,
    hostname=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True),
    mounts=st.lists(
        st.builds(
            Mount,
            host_path=st.just("/srv"),
            guest_path=st.from_regex(r"/(data|opt|home)/[a-z]{1,8}", fullmatch=True),
            read_only=st.booleans(),
        ),
        max_size=4,
        unique_by=lambda mount: mount.guest_path,
    ).map(tuple),
)
FACTS = st.builds(
    HostFacts,
    mode=st.sampled_from(["subuid", "single", "root"]),
    stage=st.just(STAGE),
    idmap=st.just(True),
    masked_files=st.lists(st.sampled_from(MASKED_PROC), unique=True).map(tuple),
    read_only=st.lists(st.sampled_from(READ_ONLY_PROC), unique=True).map(tuple),
    host_dirs=st.sampled_from([("/usr",), ("/usr", "/bin", "/lib64"), ("/usr", "/nix/store")]),
    package_dirs=st.sampled_from([(), ("/usr",)]),
    binfmt_misc=st.booleans(),
)


@given(SPECS, FACTS)
def test_every_plan_is_one_that_can_be_applied(spec: VmSpec, host: HostFacts) -> None:
    """Known operations, each target once and below its parent, the same for equal input, and plain JSON."""
    steps = plan_vm(spec, host)
    assert steps == plan_vm(spec, host)
    assert json.loads(json.dumps(steps)) == [list(step) for step in steps]
    assert {operation for operation, _ in steps} <= set(_OPERATIONS)
    targets = [arguments["target"] for _, arguments in steps if "target" in arguments]
    assert len(set(targets)) == len(targets)
    order = [operation for operation, _ in steps]
    assert order[0] == "private_mounts"
    assert order[-1] == "limits"
    assert order.count("pivot_root") == 1
    mounting = {"filesystem", "bind", "overlay", "mount_point", "remount"}
    assert not mounting & set(order[order.index("pivot_root") :])
    for index, target in enumerate(targets):
        for later in targets[index + 1 :]:
            assert not target.startswith(f"{later}/"), f"{later} would hide {target}"
    assert HostFacts.from_json(json.loads(json.dumps(host.to_json()))) == host


def test_the_plan_prints_a_line_for_each_step() -> None:
    """For people who ask what is done to their host."""
    steps = plan_vm(VmSpec(), facts("root"))
    lines = describe(steps).splitlines()
    assert len(lines) == len(steps)
    assert lines[0].split() == ["1", "private_mounts"]
    assert any("pivot_root" in line for line in lines)


@pytest.mark.parametrize("mode", ["root", "single"])
def test_an_image_takes_the_place_of_the_hosts_software(mode: Mode) -> None:
    """The root is the image under its fittings; nothing of the host's software is mounted into it."""
    extras = (("/host/python", "/opt/python"), ("/host/wasmtime", "/opt/agentos/lib/wasmtime"))
    steps = plan_vm(VmSpec(image="/images/one"), facts(mode, extra_mounts=extras))
    seen = " idmap" if mode == "root" else ""
    shown = outline(steps)
    assert f"bind /image{seen}" in shown
    assert not [one for one in shown if "/root/usr" in one or "/root/opt/python" in one]
    assert "bind /root/opt/agentos/lib/wasmtime" in shown
    (overlay,) = [arguments for operation, arguments in steps if operation == "overlay"]
    over, under = overlay["lower"].split(":")
    assert under == f"{STAGE}/image"
    assert over == (f"{STAGE}/lower" if mode == "root" else f"{STAGE}/{fittings_of('/images/one')}")
    assert fittings_of("/images/one") != fittings_of("/images/two")
