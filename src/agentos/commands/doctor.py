"""`agentos doctor`: what this host offers to VMs, found out by doing it, in a VM that is booted for it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from agentos import VM, __version__
from agentos.commands.hello_wasm import module
from agentos.errors import AgentOSError, BootFailed
from agentos.host import Host
from agentos.machine.factory import Factory

MODES = {
    "root": "root: every VM has a range of user ids of its own",
    "subuid": "an ordinary user with subordinate ids: VMs share that range, apart from the user's own id",
    "single": "an ordinary user without subordinate ids: a VM has one id, the user's, and a root in name only",
}
SWITCHES = {
    "/proc/sys/user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=15000"),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile that allows userns",
    ),
}
PROGRAMS = ("bash", "python3", "node", "git", "gcc", "make")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `ok` None: only told. A required one that is not ok makes the whole fail."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""
    required: bool = False


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("doctor", help="say what this host offers to VMs, and what it lacks")
    parser.add_argument("--json", action="store_true", help="as one JSON object, for programs")
    parser.set_defaults(run=lambda arguments: run(as_json=arguments.json))


def run(*, as_json: bool = False) -> int:
    """Check and report. Returns 1 when a VM can not be booted here."""
    checks = asyncio.run(examine())
    ok = all(one.ok for one in checks if one.required)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(one) for one in checks]}, indent=2))
    else:
        for one in checks:
            _print(one)
        print("\nVMs can be booted here." if ok else "\nVMs can not be booted here.")
    return 0 if ok else 1


def _print(check: Check) -> None:
    sign, colour = {True: ("ok", "32"), False: ("FAIL" if check.required else "no", "31"), None: ("", "0")}[
        check.ok
    ]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        sign = f"\x1b[{colour}m{sign:<4}\x1b[0m"
    print(f"{sign:<4} {check.name}: {check.detail}")
    if check.remedy and not check.ok:
        print(f"     -> {check.remedy}")


async def examine() -> list[Check]:
    """All checks, in the order in which they are told."""
    python = f"{platform.python_version()} ({sys.executable})"
    checks = [
        Check("agentos", None, f"{__version__}, Python {python}"),
        Check("kernel", None, f"{platform.release()} on {platform.machine()}"),
    ]
    started = time.perf_counter()
    host = Host()
    try:
        factory = await host.ready()
        checks.append(Check("runs as", None, MODES[factory.facts.mode]))
        async with VM(host=host) as vm:
            result = await vm.exec("echo works")
            took = (time.perf_counter() - started) * 1000
            works = result.stdout == "works\n"
            detail = (
                f"booted and ran a command, {took:.0f} ms with all that is made once"
                if works
                else repr(result)
            )
            checks.append(Check("VM", works, detail, required=True))
            checks += await _inside(vm)
            checks += _of_host(factory)
    except AgentOSError as error:
        checks.append(Check("VM", False, error.message, _remedy(error), required=True))
    finally:
        await host.close()
    return checks


def _remedy(error: AgentOSError) -> str:
    said = str(error.details.get("remedy", "")) if isinstance(error, BootFailed) else ""
    for path, (bad, command) in SWITCHES.items():
        try:
            with open(path, encoding="ascii") as file:
                if file.read().strip() == bad:
                    return f"this host forbids user namespaces to ordinary users: {command}"
        except OSError:
            continue
    return said


async def _inside(vm: VM) -> list[Check]:
    # Nobody listens there: a loopback that is up refuses, one that is not has no route.
    refused = await vm.exec("exec 3<>/dev/tcp/127.0.0.1/9")
    up = "refused" in refused.stderr
    checks = [Check("loopback", up, "up, and nothing else" if up else refused.stderr.strip())]
    found = (await vm.exec(f"for name in {' '.join(PROGRAMS)}; do command -v $name; done")).stdout.split()
    names = [os.path.basename(path) for path in found]
    missing = [name for name in PROGRAMS if name not in names]
    detail = ", ".join(names) + (f"; not {', '.join(missing)}" if missing else "")
    checks.append(Check("programs", not missing, detail, "install on the host what VMs shall have"))
    await vm.files.write_file("hello.wasm", module("works\n"), mode=0o755)
    direct = await vm.exec_file("./hello.wasm")
    told = "run as programs" if direct.stdout == "works\n" else direct.stderr.strip().splitlines()[-1]
    checks.append(Check("WebAssembly", direct.stdout == "works\n", told, "pip install wasmtime"))
    shell = await vm.exec("./hello.wasm; exit $?")
    if direct.ok and not shell.ok:
        checks.append(
            Check(
                "WebAssembly from a shell",
                False,
                "only as `wasm hello.wasm`",
                "Linux 6.7 has binfmt_misc per VM",
            )
        )
    size = (await vm.exec("touch /usr/local/probe", user="root")).ok
    told = "root in a VM can install packages" if size else "/usr is read-only in VMs, for their root too"
    checks.append(Check("writable /usr", size, told, "" if size else "run as root on Linux 5.12 or later"))
    return checks


def _of_host(factory: Factory) -> list[Check]:
    cgroups: Mapping[str, Any] = factory.cgroups
    enforced, not_enforced = list(cgroups["enforced"]), list(cgroups["not_enforced"])
    checks = []
    if enforced:
        checks.append(Check("limits by cgroup", True, ", ".join(enforced)))
    if not_enforced:
        problems = [one for state in cgroups["controllers"].values() for one in state["problems"]]
        why = f" ({problems[0]['what']})" if problems else ""
        remedy = f"run as root, or in a cgroup that is delegated to this user{why}"
        checks.append(Check("limits without cgroup", False, ", ".join(not_enforced), remedy))
    if factory.facts.mode == "single":
        checks.append(
            Check(
                "subordinate ids",
                False,
                "none",
                "install uidmap (newuidmap), and usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER",
            )
        )
    return checks
