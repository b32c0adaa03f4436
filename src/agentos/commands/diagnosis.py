"""What `agentos doctor` finds: each line is something that was done here, not a version that was read."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentos import VM, Limits, __version__
from agentos.commands.hello_wasm import module
from agentos.errors import AgentOSError, BootFailed
from agentos.host import Host
from agentos.machine import start
from agentos.machine.disk import Disks
from agentos.machine.factory import Factory
from agentos.model import ISOLATION

HOST, VMS, LIMITS, PROMISES = "This host", "A VM, booted for this", "Limits", "What follows"
MODES = {
    "root": "root: every VM has a range of user ids of its own",
    "subuid": "an ordinary user with subordinate ids: VMs share that range, apart from the user's own id",
    "single": "an ordinary user without subordinate ids: a VM has one id, the user's, and a root in name only",
}
PROGRAMS = ("bash", "python3", "node", "git", "gcc", "make")
CONTAINERS = "see docs/containers.md"
FILTERED = f"a seccomp filter is around this process: in a container, --security-opt seccomp=unconfined; {CONTAINERS}"
COVERED = f"parts of /proc are covered: in a container, --security-opt systempaths=unconfined; {CONTAINERS}"
IDMAPPING = "Linux 6.3 or later, or 5.19 with loop devices and mkfs.ext4"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `ok` None: only told. A required one that is not ok makes the whole fail."""

    group: str
    name: str
    ok: bool | None
    detail: str
    remedy: str = ""
    required: bool = False


async def examine() -> list[Check]:
    """All checks, in the order in which they are told."""
    python = f"{platform.python_version()} ({sys.executable})"
    checks = [
        Check(HOST, "agentos", None, f"{__version__}, Python {python}"),
        Check(HOST, "kernel", None, f"{platform.release()} on {platform.machine()}"),
    ]
    probed = await _probe()
    checks += _of_probes(probed)
    host = Host()
    try:
        began = time.perf_counter()
        factory = await host.ready()
        checks += _of_ids(factory)
        before = _open_descriptors()
        async with VM(host=host) as vm:
            result = await vm.exec("echo works")
            took = (time.perf_counter() - began) * 1000
            works = result.stdout == "works\n"
            detail = (
                f"booted and ran a command, {took:.0f} ms with all that is made once"
                if works
                else repr(result)
            )
            checks.append(Check(VMS, "boot", works, detail, required=True))
            checks += await _inside(vm)
            # What it takes to hear from the kernel of its limits is opened a little after the boot.
            await asyncio.sleep(0.05)
            descriptors = _open_descriptors() - before
        checks.append(await _network(host))
        checks += _of_limits(factory, descriptors)
        checks += _promises(factory)
    except AgentOSError as error:
        said = str(error.details.get("remedy", "")) if isinstance(error, BootFailed) else ""
        failed = [one.remedy for one in checks if one.required and not one.ok]
        remedy = (failed or [_forbidden(0) or said or "please report this"])[0]
        checks.append(Check(VMS, "boot", False, error.message, remedy, required=True))
    finally:
        await host.close()
    return checks


async def _probe() -> dict[str, dict[str, Any]]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", start.__file__, "probes", stdout=asyncio.subprocess.PIPE
    )
    output, _ = await child.communicate()
    found: dict[str, dict[str, Any]] = json.loads(output)
    return found


def _of_probes(probed: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    namespaces = probed["user_namespace"]
    checks = [
        Check(
            HOST, "user namespaces", namespaces["ok"],
            namespaces["detail"] or "made, and of use",
            _forbidden(int(namespaces["errno"])) or "see docs/rootless.md and docs/containers.md", required=True,
        )
    ]  # fmt: skip
    told = {
        "namespaces": ("other namespaces", "as for user namespaces"),
        "proc": ("a /proc of its own", COVERED),
        "overlay": ("overlay", "Linux 5.11 or later, with overlayfs"),
        "filter": ("system-call filter", "a kernel with CONFIG_SECCOMP_FILTER"),
    }
    for key, (name, remedy) in told.items():
        one = probed[key]
        if not namespaces["ok"] and not (key == "proc" and _is_covered()):
            # It was tried in a user namespace: nothing of its own is known to be wrong.
            remedy = "as for user namespaces"
        checks.append(Check(HOST, name, one["ok"], one["detail"] or "works", remedy, required=True))
    landlock, kvm = probed["landlock"], probed["kvm"]
    checks.append(Check(HOST, "Landlock", None, f"{landlock['detail']}; not used"))
    checks.append(
        Check(HOST, "KVM", None, f"{kvm['detail']}; not used (whether a guest boots was not tried)")
    )
    return checks


def _forbidden(number: int) -> str:
    """What forbids user namespaces here, and what to do about it; empty where that is not known."""
    if number == errno.ENOSPC or _sysctl("user/max_user_namespaces") == "0":
        return "user namespaces are switched off: sysctl -w user.max_user_namespaces=15000"
    if _sysctl("kernel/unprivileged_userns_clone") == "0" and os.geteuid() != 0:
        return "this host forbids user namespaces to ordinary users: sysctl -w kernel.unprivileged_userns_clone=1"
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1" and os.geteuid() != 0:
        return (
            "AppArmor forbids user namespaces to programs without a profile: sysctl -w "
            "kernel.apparmor_restrict_unprivileged_userns=0, or a profile with `userns,` for "
            f"{os.path.realpath(sys.executable)} in /etc/apparmor.d (docs/rootless.md has one)"
        )
    if _status("Seccomp") == "2":
        return FILTERED
    return ""


def _is_covered() -> bool:
    """Whether something is mounted over parts of /proc, but for where there is nothing to cover."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return any(one.startswith("/proc/") for one in points - {"/proc/sys/fs/binfmt_misc"})


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def _status(field: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return ""


def _of_ids(factory: Factory) -> list[Check]:
    facts = factory.facts
    told = MODES[facts.mode]
    if facts.mode != "root" and os.geteuid() == 0:
        told = f"root without CAP_SYS_ADMIN, and so as {told}"
    checks = [Check(HOST, "runs as", None, told)]
    if facts.mode != "root":
        checks.append(
            Check(
                HOST, "subordinate ids", facts.mode == "subuid", "in use" if facts.mode == "subuid" else "none",
                CONTAINERS if os.geteuid() == 0 else "install uidmap (newuidmap), and usermod "
                "--add-subuids 100000-165535 --add-subgids 100000-165535 USER",
            )
        )  # fmt: skip
    told = "VMs' root may install packages" if facts.idmap else "not for VMs' system directories"
    if facts.mode == "root" and not facts.idmap:
        told += "; all VMs have the same ids on the host"
    remedy = f"run as root on {IDMAPPING}, for a writable /usr"
    checks.append(Check(HOST, "id-mapped mounts", facts.idmap, told, remedy))
    return checks


async def _inside(vm: VM) -> list[Check]:
    # Nobody listens there: a loopback that is up refuses, one that is not has no route.
    refused = await vm.exec("exec 3<>/dev/tcp/127.0.0.1/9")
    up = "refused" in refused.stderr
    checks = [Check(VMS, "loopback", up, "up, and nothing else" if up else refused.stderr.strip())]
    found = (await vm.exec(f"for name in {' '.join(PROGRAMS)}; do command -v $name; done")).stdout.split()
    names = [os.path.basename(path) for path in found]
    missing = [name for name in PROGRAMS if name not in names]
    detail = ", ".join(names) + (f"; not {', '.join(missing)}" if missing else "")
    checks.append(Check(VMS, "programs", not missing, detail, "install on the host what VMs shall have"))
    await vm.files.write_file("hello.wasm", module("works\n"), mode=0o755)
    direct = await vm.exec_file("./hello.wasm")
    told = "run as programs" if direct.stdout == "works\n" else direct.stderr.strip().splitlines()[-1]
    checks.append(Check(VMS, "WebAssembly", direct.stdout == "works\n", told, "pip install wasmtime"))
    shell = await vm.exec("./hello.wasm; exit $?")
    if direct.ok and not shell.ok:
        remedy = "Linux 6.7 has binfmt_misc per VM"
        checks.append(Check(VMS, "WebAssembly from a shell", False, "only as `wasm hello.wasm`", remedy))
    writable = (await vm.exec("touch /usr/local/probe", user="root")).ok
    told = "root in a VM can install packages" if writable else "/usr is read-only in VMs, for their root too"
    remedy = "" if writable else f"run as root on {IDMAPPING}"
    checks.append(Check(VMS, "writable /usr", writable, told, remedy))
    return checks


async def _network(host: Host) -> Check:
    try:
        async with VM(host=host, network="host-egress") as vm:
            works = (await vm.exec("true")).ok
            # What the boot found out by trying decides whether programs are told of the proxy.
            diverted = "http_proxy" not in vm.spec.env
    except AgentOSError as error:
        return Check(VMS, "network egress", False, error.message, str(error.details.get("remedy", "")))
    if not works or diverted:
        return Check(
            VMS, "network egress", works, "for every program, by rules in the VM's own network namespace"
        )
    lacking = "for programs that heed http_proxy and its kin: the kernel has no nf_tables with tproxy"
    return Check(VMS, "network egress", True, lacking, "modprobe nft_tproxy nf_tables")


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _of_limits(factory: Factory, descriptors: int) -> list[Check]:
    cgroups: Mapping[str, Any] = factory.cgroups
    checks = []
    for controller, state in cgroups["controllers"].items():
        if state["version"] is not None:
            detail = f"version {state['version']}, {state['directory']}"
            checks.append(Check(LIMITS, f"cgroup {controller}", True, detail))
            continue
        problems = state["problems"] or [{"what": "not found"}]
        detail = "; ".join(sorted({str(one["what"]) for one in problems}))
        remedy = "run as root, or in a cgroup of your own: systemd-run --user --scope -p Delegate=yes agentos serve"
        if "Read-only" in detail:
            remedy = f"mount the container's cgroup writable: {CONTAINERS}"
        checks.append(Check(LIMITS, f"cgroup {controller}", False, detail, remedy))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = (soft - _open_descriptors()) // max(descriptors, 1)
    detail = f"{soft} for this process, {descriptors} for each idle VM: room for {room} VMs"
    checks.append(
        Check(LIMITS, "open files", room >= 100, detail, f"ulimit -n {hard if hard > soft else 65536}")
    )
    default = Limits()
    table, one = int(_sysctl("fs/file-max") or 0), default.processes * default.open_files
    detail = f"{table} for all, {one} for one VM at its default limits"
    remedy = "sysctl -w fs.file-max=9223372036854775807: then only memory limits them"
    checks.append(Check(LIMITS, "the kernel's files", table > 4 * one, detail, remedy))
    pids, terminals = int(_sysctl("kernel/pid_max") or 0), int(_sysctl("kernel/pty/max") or 0)
    checks.append(
        Check(
            LIMITS, "processes", pids >= 16 * default.processes,
            f"{pids} for all, {default.processes} for one VM at its default limits",
            "sysctl -w kernel.pid_max=4194304",
        )
    )  # fmt: skip
    checks.append(
        Check(
            LIMITS, "terminals", terminals >= 8 * default.terminals,
            f"{terminals} for all, {default.terminals} for one VM at its default limits",
            "sysctl -w kernel.pty.max=65536",
        )
    )  # fmt: skip
    from agentos.server.serve import default_data_dir  # slow to import, for a command that need not run

    directory = default_data_dir()
    while not directory.is_dir():
        directory = directory.parent
    trouble = Disks().trouble(str(directory)) if os.geteuid() == 0 else "only root can mount a disk image"
    remedy = "run as root" if os.geteuid() else "loop devices and mkfs.ext4 (package e2fsprogs)"
    detail = trouble or f"mounted in {directory}"
    checks.append(Check(LIMITS, "disk images", not trouble, detail, remedy))
    return checks


def _promises(factory: Factory) -> list[Check]:
    enforced, mode = set(factory.cgroups["enforced"]), factory.facts.mode
    memory = "memory" in enforced
    tiers = f"{', '.join(ISOLATION)} (SECURITY.md says what holds); no gVisor or microVM tier in this version"
    lines = [
        ("isolation", True, tiers, ""),
        ("ids of its own", mode == "root", "no two VMs share a host id" if mode == "root" else MODES[mode],
         "run as root"),
        ("memory", memory, "bounded for each VM as a whole" if memory else
         "bounded for each process only (RLIMIT_DATA), and for files in memory", "a cgroup with the memory controller"),
        ("number of processes", True, "bounded for each user of a VM (RLIMIT_NPROC in its user namespace)", ""),
        ("CPU", "cpu_weight" in enforced, "shared by weight between VMs"
         + (", with quotas" if "cpu_cores" in enforced else "") if "cpu_weight" in enforced else
         "shared between processes, not between VMs", "a cgroup with the cpu controller"),
        ("disk", True, "bounded in bytes and files; in storage without disk images the bound is looked after once a "
         "second (docs/storage.md)", ""),
    ]  # fmt: skip
    return [Check(PROMISES, name, ok, detail, remedy) for name, ok, detail, remedy in lines]
