"""VmSpec -> the ordered steps that make the VM, as data.

Pure: nothing here touches the kernel, so the order is tested without privileges and can be printed
(`describe`). This list is the only place where the order lives; `boot` applies it, step by step, inside
the new namespaces. A step is `(operation, arguments)`; arguments are JSON values.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

from agentos.errors import BootFailed
from agentos.model import VmSpec

Step = tuple[str, dict[str, Any]]
Mode = Literal["root", "subuid", "single"]

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
HOME = "/home/agentos"
OURS = "/opt/agentos/"
UIDS = {"root": 0, "agentos": 1000}
ID_COUNT = 65_536
TTY_GID = 5
VMS_OF_A_USER = 4
"""A VM that shares its host user with others gets this part of what the kernel counts for each user."""
WASM_RULE = r":wasm:M::\x00asm::/opt/agentos/bin/wasm:"

# Parts of /proc that speak of the whole host: hidden, or at least not writable.
MASKED_PROC = (
    "acpi", "asound", "config.gz", "driver", "fs", "interrupts", "kallsyms", "kcore", "key-users", "keys", "kmsg",
    "kpagecgroup", "kpagecount", "kpageflags", "latency_stats", "modules", "sched_debug", "scsi", "slabinfo",
    "softirqs", "timer_list", "timer_stats", "vmallocinfo", "zoneinfo",
)  # fmt: skip
READ_ONLY_PROC = ("bus", "irq", "sys", "sysrq-trigger", "pressure")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the zygote found on this host, by trying; everything in a plan that is not the spec's choice."""

    mode: Mode
    stage: str
    """Directory of the zygote's mount namespace in which VMs are put together."""
    idmap: bool
    """Whether mounts of the host's directories can be shown through a VM's ids."""
    masked_files: tuple[str, ...] = ()
    masked_dirs: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ()
    host_dirs: tuple[str, ...] = ("/usr",)
    """Directories of the host's software, shown read-only."""
    package_dirs: tuple[str, ...] = ()
    """Directories that a package manager writes to; writable per VM where idmap is true."""
    added_to: tuple[str, ...] = ()
    """Of `package_dirs` those to which the skeleton adds something."""
    extra_mounts: tuple[tuple[str, str], ...] = ()
    """(host path, guest path) of what agentos itself brings, read-only."""
    memory_cgroup: bool = True
    """Whether a cgroup limits the memory of all of a VM's processes together."""
    binfmt_misc: bool = False
    """Whether each VM can say for itself what runs .wasm files; otherwise the zygote may have, for all."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HostFacts:
        """From `to_json`'s values."""
        lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        lists["extra_mounts"] = tuple((pair[0], pair[1]) for pair in data.get("extra_mounts", ()))
        return cls(**{**data, **lists})


def plan_vm(spec: VmSpec, facts: HostFacts) -> list[Step]:
    """The steps that init applies, in order, from the fresh namespaces to a VM that can run programs."""
    stage, root = facts.stage, f"{facts.stage}/root"
    steps: list[Step] = [
        ("private_mounts", {}),
        # As root a VM has a host user of its own, to whom the kernel counts what it uses.
        *([] if facts.mode == "root" else [("users_limits", {"share": VMS_OF_A_USER})]),
        *_writable_layer(spec, facts),
        *(_system_directories(facts, root) if spec.image is None else []),
        *_devices(spec, facts, root),
        *_proc(facts, root),
    ]
    for source, target in facts.extra_mounts:
        if spec.image is not None and not target.startswith(OURS):
            continue  # a Python for those whose host has none: its libraries are the host's
        steps.append(_bind_host(source, root + target, ["ro", "nosuid", "nodev"]))
    for mount in spec.mounts:
        if facts.mode == "root" and not mount.read_only and not facts.idmap:
            raise BootFailed(
                "a writable host mount needs id-mapped mounts",
                step="mounts",
                errno=95,
                remedy="use Linux 6.3 or later, or 5.19 with loop devices and mkfs.ext4",
            )
        attributes = ["nosuid", "nodev"] + (["ro"] if mount.read_only else [])
        target = root + mount.guest_path.rstrip("/")
        steps.append(("mount_point", {"path": target}))
        steps.append(_bind_host(mount.host_path, target, attributes, idmap=facts.idmap))
    steps += [
        ("pivot_root", {"root": root, "detach": stage}),
        ("hostname", {"name": spec.hostname}),
        ("loopback", {}),
    ]
    if spec.network:
        routes = [[accept, network] for accept, network in spec.network.routes()]
        steps.append(("network", {"routes": routes}))
    if facts.binfmt_misc:
        steps.append(("binfmt_misc", {"rule": WASM_RULE}))
    if facts.mode == "single":
        steps.append(("root_namespace", {}))
    limits = {"open_files": spec.limits.open_files}
    if not facts.memory_cgroup:
        limits["data_bytes"] = spec.limits.memory_bytes
    steps.append(("limits", limits))
    return steps


def _writable_layer(spec: VmSpec, facts: HostFacts) -> list[Step]:
    """The root: an overlay of the skeleton under a layer that holds all the VM ever writes."""
    stage, layer = facts.stage, f"{facts.stage}/layer"
    if spec.storage is not None:
        # Seen through the VM's ids, so that on disk they are the same whichever range the VM was given.
        storage = _bind_host(spec.storage, layer, ["nosuid", "nodev"], idmap=facts.idmap)
        storage[1]["storage"] = True  # or the disk in it
        steps: list[Step] = [storage]
    else:
        options = {
            "size": str(spec.limits.disk_bytes),
            "nr_inodes": str(spec.limits.disk_files),
            "mode": "0755",
        }
        steps = [_filesystem("tmpfs", layer, options, ["nosuid", "nodev"])]
    lower = f"{stage}/skeleton" if spec.image is None else f"{stage}/{fittings_of(spec.image)}"
    if facts.idmap:
        steps.append(_bind_host(lower, f"{stage}/lower", ["nosuid", "nodev"], idmap=True))
        lower = f"{stage}/lower"
    if spec.image is not None:
        attributes = ["ro", "nosuid", "nodev"]
        steps.append(_bind_host(spec.image, f"{stage}/image", attributes, idmap=facts.idmap))
        lower = f"{lower}:{stage}/image"
    steps.append(_overlay(lower, layer, "root", f"{stage}/root"))
    return steps


def fittings_of(image: str) -> str:
    """The name, below the stage, of the layer that lies over an image."""
    return f"fittings.{hashlib.sha256(os.fsencode(image)).hexdigest()[:16]}"


def _system_directories(facts: HostFacts, root: str) -> list[Step]:
    steps: list[Step] = []
    for index, path in enumerate(facts.host_dirs):
        if facts.idmap and path in facts.package_dirs:
            lower = f"{facts.stage}/lower.{index}"
            steps.append(_bind_host(path, lower, ["nosuid", "nodev"], idmap=True))
            if path in facts.added_to:
                lower = f"{facts.stage}/lower{path}:{lower}"
            steps.append(
                _overlay(lower, f"{facts.stage}/layer", path.strip("/").replace("/", "-"), root + path)
            )
        else:
            steps.append(_bind_host(path, root + path, ["ro", "nosuid", "nodev"]))
    return steps


def _devices(spec: VmSpec, facts: HostFacts, root: str) -> list[Step]:
    pts = {"newinstance": "", "ptmxmode": "0666", "mode": "0620", "max": str(spec.limits.terminals)}
    if facts.mode != "single":
        pts["gid"] = str(TTY_GID)
    shm = {"size": str(spec.limits.shm_bytes), "nr_inodes": "16384", "mode": "1777"}
    return [
        # The zygote made the nodes once; only the directory is read-only, so that devices stay usable.
        _bind(f"{facts.stage}/dev", f"{root}/dev", []),
        ("remount", {"path": f"{root}/dev", "attributes": ["ro", "nosuid", "noexec"]}),
        _filesystem("devpts", f"{root}/dev/pts", pts, ["nosuid", "noexec"]),
        _filesystem("tmpfs", f"{root}/dev/shm", shm, ["nosuid", "nodev"]),
        _filesystem("mqueue", f"{root}/dev/mqueue", {}, ["nosuid", "nodev", "noexec"]),
    ]


def _proc(facts: HostFacts, root: str) -> list[Step]:
    proc = f"{root}/proc"
    steps: list[Step] = [_filesystem("proc", proc, {"hidepid": "invisible"}, ["nosuid", "nodev", "noexec"])]
    for name in facts.read_only:
        steps.append(_bind(f"{proc}/{name}", f"{proc}/{name}", ["ro", "nosuid", "nodev", "noexec"]))
    for name in facts.masked_files:
        steps.append(_bind(f"{facts.stage}/dev/null", f"{proc}/{name}", ["ro", "nosuid", "noexec"]))
    for name in facts.masked_dirs:
        steps.append(_bind(f"{facts.stage}/empty", f"{proc}/{name}", ["ro", "nosuid", "nodev", "noexec"]))
    return steps


def _bind(source: str, target: str, attributes: list[str]) -> Step:
    """Of what is in the stage, or in the VM already."""
    return "bind", {"source": source, "target": target, "attributes": attributes}


def _bind_host(source: str, target: str, attributes: list[str], *, idmap: bool = False) -> Step:
    """Of a path of the host, which the VM may not be able to reach: the zygote makes the mount and hands it over."""
    arguments = {"source": source, "target": target, "attributes": attributes, "handed_over": True}
    if idmap:
        arguments["idmap"] = True
    return "bind", arguments


def _filesystem(fstype: str, target: str, options: dict[str, str], attributes: list[str]) -> Step:
    return "filesystem", {"type": fstype, "target": target, "options": options, "attributes": attributes}


def _overlay(lower: str, layer: str, name: str, target: str) -> Step:
    return "overlay", {
        "lower": lower,
        "upper": f"{layer}/{name}",
        "work": f"{layer}/{name}.work",
        "target": target,
    }


def describe(steps: list[Step]) -> str:
    """One line for each step, numbered, for people."""
    lines = []
    for number, (operation, arguments) in enumerate(steps, 1):
        shown = " ".join(f"{key}={value}" for key, value in arguments.items() if value not in ([], {}, ""))
        lines.append(f"{number:3} {operation:<14} {shown}".rstrip())
    return "\n".join(lines)
