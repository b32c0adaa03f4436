"""Giving up privileges: capabilities, ids, limits, signals, dumpability. All of it is for good."""

from __future__ import annotations

import os
import resource
import signal

from agentos.linux import syscalls

# linux/capability.h
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_SETGID, CAP_SETUID = 0, 1, 3, 4, 5, 6, 7
CAP_NET_BIND_SERVICE = 10
CAP_SYS_ADMIN = 1 << 21
"""As a mask."""
_LAST_CAP_FILE = "/proc/sys/kernel/cap_last_cap"

PACKAGE_CAPS = (CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_SETGID, CAP_SETUID)
"""What a package manager needs of root, all of it only over the VM's own ids and files."""
_KEPT_CAPS = (*PACKAGE_CAPS, CAP_NET_BIND_SERVICE)
ROOT_CAPS = sum(1 << cap for cap in _KEPT_CAPS)


def last_capability() -> int:
    """The highest capability number that this kernel knows."""
    with open(_LAST_CAP_FILE, "rb") as file:
        return int(file.read())


def drop_bounding(last_cap: int, keep: int = 0) -> None:
    """Drop every capability but those in the mask `keep` from the bounding set, capabilities(7)."""
    for cap in range(last_cap + 1):
        if not keep >> cap & 1:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, cap)


def set_no_new_privs() -> None:
    """execve(2) can grant nothing any more, PR_SET_NO_NEW_PRIVS."""
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def set_undumpable() -> None:
    """Nobody of the same user may trace this process or open its /proc files; execve(2) ends this."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def become(uid: int, gid: int, *, capabilities: int) -> None:
    """Take on `uid` and `gid`, without other groups, with exactly `capabilities` in the caller's user namespace."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    # Without it, capabilities go when the last id that is 0 does, capabilities(7).
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1 if capabilities else 0)
    os.setresuid(uid, uid, uid)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    syscalls.capset(capabilities, capabilities)


def default_signals() -> None:
    """Every signal back to its default disposition and unblocked, as execve(2) should find them."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def set_limit(which: int, soft: int, hard: int | None = None, *, pid: int = 0) -> None:
    """prlimit(2), never above the hard limit that is already there; without a `pid` for this process itself."""
    hard = soft if hard is None else hard
    ceiling = resource.prlimit(pid, which)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.prlimit(pid, which, (soft, hard))
