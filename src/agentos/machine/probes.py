"""What this host lets an ordinary process do, tried one by one: for `agentos doctor`.

Run in a bare interpreter (`python -I -S start.py probes`), single-threaded as user namespaces need it. Each probe
is a child that does the thing and ends; one line of JSON says what came of all of them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import signal
import termios
from collections.abc import Callable

from agentos.linux import mounts, privileges, seccomp, syscalls

_SECONDS = 2
_KVM_GET_API_VERSION, _KVM_CREATE_VM = 0xAE00, 0xAE01  # linux/kvm.h
_LANDLOCK_CREATE_RULESET, _LANDLOCK_VERSION = 444, 1  # asm-generic/unistd.h, linux/landlock.h
_NAMESPACES = {
    "mnt": syscalls.CLONE_NEWNS,
    "pid": syscalls.CLONE_NEWPID,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}


class _Refused(Exception):
    """Something did not come about: errno (0 where the kernel gave none) and the reason."""


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _step("unshare(CLONE_NEWUSER)", lambda: syscalls.unshare(syscalls.CLONE_NEWUSER))
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        _step(f"writing {name}", lambda name=name, content=content: _write(name, content))  # type: ignore[misc]


def _write(name: str, content: str) -> None:
    fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content.encode())
    finally:
        os.close(fd)


def _step(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        error.add_note(what)
        raise


def user_namespace() -> str:
    """It must be a useful one: AppArmor on Ubuntu lets it be made and then takes its capabilities away."""
    _enter_user_namespace()
    _step("unshare(CLONE_NEWNS)", lambda: syscalls.unshare(syscalls.CLONE_NEWNS))
    _step("mounting a tmpfs", lambda: os.close(mounts.make_filesystem("tmpfs", {}, 0)))
    return ""


def namespaces() -> str:
    """The others, in a user namespace."""
    _enter_user_namespace()
    for name, flag in _NAMESPACES.items():
        _step(f"a {name} namespace", lambda flag=flag: syscalls.unshare(flag))  # type: ignore[misc]
    return ", ".join(_NAMESPACES)


def proc() -> str:
    """A /proc of its own for a new pid namespace: refused where the one that is there has masked parts."""
    _enter_user_namespace()
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID)
    return _in_child(lambda: _step("mounting proc", lambda: os.close(mounts.make_filesystem("proc", {}, 0))))


def _in_child(action: Callable[[], object]) -> str:
    """Only a child is in the new pid namespace."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, _outcome(lambda: str(action() or "")).encode())
        os._exit(0)
    os.close(write)
    outcome = json.loads(os.read(read, 4096))
    if outcome["ok"]:
        return str(outcome["detail"])
    raise _Refused(outcome["errno"], outcome["detail"])


def overlay() -> str:
    """An overlay with its layers on a tmpfs, in a user namespace."""
    _enter_user_namespace()
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    mounts.attach(mounts.make_filesystem("tmpfs", {}, 0), "/tmp")
    for name in ("lower", "upper", "work"):
        os.mkdir(f"/tmp/{name}")
    options = {"lowerdir": "/tmp/lower", "upperdir": "/tmp/upper", "workdir": "/tmp/work", "userxattr": ""}
    _step("mounting an overlay", lambda: os.close(mounts.make_filesystem("overlay", options, 0)))
    return ""


def filter_() -> str:
    """The filter of VMs' programs: loaded, and then it refuses what it should."""
    privileges.set_no_new_privs()
    seccomp.load(seccomp.build_filter(platform.machine()))
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        # Without the filter it would be ENOTTY, whatever else binds this process.
        fcntl.ioctl(fd, termios.TIOCSTI, b"x")
    except PermissionError:
        return ""
    except OSError:
        pass
    raise _Refused(0, "it was loaded and refuses nothing")


def landlock() -> str:
    """Only told: VMs do not use it."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    if version < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return f"ABI {version}"


def kvm() -> str:
    """A virtual machine without memory or processor is made. That says nothing of whether a guest would boot."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
    _step("KVM_CREATE_VM", lambda: fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
    return f"API {version}, takes KVM_CREATE_VM"


PROBES: dict[str, Callable[[], str]] = {
    "user_namespace": user_namespace,
    "namespaces": namespaces,
    "proc": proc,
    "overlay": overlay,
    "filter": filter_,
    "landlock": landlock,
    "kvm": kvm,
}


def _outcome(action: Callable[[], str]) -> str:
    try:
        return json.dumps({"ok": True, "detail": action(), "errno": 0})
    except _Refused as refused:
        number, reason = refused.args
        return json.dumps({"ok": False, "detail": reason, "errno": number})
    except OSError as error:
        notes = getattr(error, "__notes__", [])
        what = f"{notes[-1]}: " if notes else ""
        name = errno.errorcode.get(error.errno or 0, "")
        detail = f"{what}{error.strerror or error} ({name})"
        return json.dumps({"ok": False, "detail": detail, "errno": error.errno or 0})


def run(probe: Callable[[], str]) -> dict[str, object]:
    """What came of a probe, in a child of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            signal.alarm(_SECONDS)
            os.write(write, _outcome(probe).encode())
        finally:
            os._exit(0)
    os.close(write)
    try:
        text = os.read(read, 65536)
    finally:
        os.close(read)
    _, status = os.waitpid(pid, 0)
    if not text:
        return {"ok": False, "detail": f"the probe ended with wait status {status}", "errno": 0}
    found: dict[str, object] = json.loads(text)
    return found


def main() -> None:
    """Run all probes and print what came of them."""
    print(json.dumps({name: run(probe) for name, probe in PROBES.items()}))
