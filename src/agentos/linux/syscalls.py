"""Linux system calls that the standard library lacks, under their own names.

Prototypes are set once, at import. Every wrapper returns the call's result or raises plain OSError,
so that Python picks PermissionError and its kin; a note says which call it was and on what.
Constants carry the header that they come from. Nothing here decides anything.
"""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

# linux/sched.h
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# linux/mount.h
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
AT_RECURSIVE = 0x8000
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_IDMAP = 0x00100000

# linux/openat2.h
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

# asm/unistd.h: numbers from 424 on are the same on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _OPENAT2, _MOUNT_SETATTR = (
    428,
    429,
    430,
    431,
    432,
    437,
    442,
)
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}.get(os.uname().machine, -1)
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}.get(os.uname().machine, -1)

_SIGSET_BYTES = 128  # of the C library's sigset_t; the kernel's is shorter

_long = ctypes.c_long
_syscall = _libc.syscall
_syscall.restype = _long


def _prototype(name: str, *arguments: type) -> ctypes._NamedFuncPointer:
    function: ctypes._NamedFuncPointer = getattr(_libc, name)
    function.argtypes = list(arguments)
    function.restype = ctypes.c_int
    return function


_mount = _prototype(
    "mount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p
)
_umount2 = _prototype("umount2", ctypes.c_char_p, ctypes.c_int)
_unshare = _prototype("unshare", ctypes.c_int)
_setns = _prototype("setns", ctypes.c_int, ctypes.c_int)
_prctl = _prototype("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)
_prctl_text = _libc["prctl"]  # another object than the attribute, with a prototype of its own
_prctl_text.argtypes = [ctypes.c_int, ctypes.c_char_p]
_signalfd = _prototype("signalfd", ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_sethostname = _prototype("sethostname", ctypes.c_char_p, ctypes.c_size_t)
_capset = _prototype("capset", ctypes.c_void_p, ctypes.c_void_p)
_setfsuid = _prototype("setfsuid", ctypes.c_uint)
_setfsgid = _prototype("setfsgid", ctypes.c_uint)


def _failed(call: str, subject: str) -> OSError:
    number = ctypes.get_errno()
    error = OSError(number, os.strerror(number))
    error.add_note(f"{call}({subject})")
    return error


def _check(result: int, call: str, subject: str = "") -> int:
    if result < 0:
        raise _failed(call, subject)
    return result


def set_process_name(name: str) -> None:
    """PR_SET_NAME: what ps(1) shows as the command's name."""
    _check(_prctl_text(PR_SET_NAME, name.encode()[:15]), "prctl", "PR_SET_NAME")


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    code = _mount(source.encode(), os.fsencode(target), fstype.encode() or None, flags, data.encode() or None)
    _check(code, "mount", f"{fstype or source} on {target}")


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_umount2(os.fsencode(target), flags), "umount2", target)


def unshare(flags: int) -> None:
    """unshare(2). With CLONE_NEWUSER the caller must have a single thread."""
    _check(_unshare(flags), "unshare", hex(flags))


def signalfd(number: int) -> int:
    """signalfd(2) for one signal, close-on-exec and non-blocking; the caller blocks the signal."""
    mask = struct.pack("=Q", 1 << (number - 1)).ljust(_SIGSET_BYTES, b"\0")
    return _check(_signalfd(-1, mask, os.O_CLOEXEC | os.O_NONBLOCK), "signalfd", str(number))


def setns(fd: int, flags: int) -> None:
    """setns(2). For a user namespace the caller must have a single thread."""
    _check(_setns(fd, flags), "setns", hex(flags))


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    code = _syscall(
        _long(_PIVOT_ROOT), ctypes.c_char_p(os.fsencode(new_root)), ctypes.c_char_p(os.fsencode(put_old))
    )
    _check(code, "pivot_root", new_root)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2)."""
    return _check(_prctl(option, arg2, arg3, arg4, arg5), "prctl", str(option))


def sethostname(name: str) -> None:
    """sethostname(2)."""
    encoded = name.encode()
    _check(_sethostname(encoded, len(encoded)), "sethostname", name)


def setfsuid(uid: int) -> None:
    """setfsuid(2). The call reports no failure, so the result is read back."""
    _setfsuid(uid)
    if _setfsuid(0xFFFFFFFF) != uid:
        raise PermissionError(1, f"setfsuid({uid})")


def setfsgid(gid: int) -> None:
    """setfsgid(2). The call reports no failure, so the result is read back."""
    _setfsgid(gid)
    if _setfsgid(0xFFFFFFFF) != gid:
        raise PermissionError(1, f"setfsgid({gid})")


def capset(effective: int, permitted: int, inheritable: int = 0) -> None:
    """capset(2) of this thread, each argument a bit mask of capability numbers."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    low, high = 0xFFFFFFFF, 32
    data = (ctypes.c_uint32 * 6)(
        effective & low,
        permitted & low,
        inheritable & low,
        effective >> high,
        permitted >> high,
        inheritable >> high,
    )
    _check(_capset(header, data), "capset", hex(permitted))


def sched_setattr(
    pid: int = 0, *, slice_ns: int, nice: int | None = None, reset_on_fork: bool = False
) -> None:
    """sched_setattr(2) on `pid`, 0 for the caller, which stays at SCHED_OTHER: its time slice, and its nice value.

    Linux before 6.12 takes the slice and changes nothing.
    With `reset_on_fork` its children begin with the kernel's slice, and at nice 0 where its own is below.
    """
    if nice is None:
        nice = os.getpriority(os.PRIO_PROCESS, pid)
    # struct sched_attr of linux/sched/types.h, in its first version.
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, int(reset_on_fork), nice, 0, slice_ns, 0, 0)
    code = _syscall(_long(_SCHED_SETATTR), _long(pid), ctypes.c_char_p(attributes), _long(0))
    _check(code, "sched_setattr")


def open_tree(path: str, flags: int, dir_fd: int = -100) -> int:
    """open_tree(2): a descriptor of the mount at `path`, a detached copy with OPEN_TREE_CLONE."""
    code = _syscall(
        _long(_OPEN_TREE), _long(dir_fd), ctypes.c_char_p(os.fsencode(path)), _long(flags | OPEN_TREE_CLOEXEC)
    )
    return int(_check(code, "open_tree", path))


def move_mount(mount_fd: int, target_fd: int) -> None:
    """move_mount(2): attaches the detached mount `mount_fd` where `target_fd` points."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    empty = ctypes.c_char_p(b"")
    _check(
        _syscall(_long(_MOVE_MOUNT), _long(mount_fd), empty, _long(target_fd), empty, _long(flags)),
        "move_mount",
    )


def mount_setattr(mount_fd: int, *, attr_set: int, recursive: bool = False, userns_fd: int = 0) -> None:
    """mount_setattr(2) on the mount `mount_fd` itself, or on all below it too."""
    attributes = (ctypes.c_uint64 * 4)(attr_set, 0, 0, userns_fd)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    code = _syscall(
        _long(_MOUNT_SETATTR),
        _long(mount_fd),
        ctypes.c_char_p(b""),
        _long(flags),
        attributes,
        ctypes.c_size_t(32),
    )
    _check(code, "mount_setattr", hex(attr_set))


def fsopen(fstype: str) -> int:
    """fsopen(2): a new file system context of type `fstype`."""
    return int(
        _check(
            _syscall(_long(_FSOPEN), ctypes.c_char_p(fstype.encode()), _long(FSOPEN_CLOEXEC)),
            "fsopen",
            fstype,
        )
    )


def fsconfig(context_fd: int, command: int, key: str = "", value: str = "") -> None:
    """fsconfig(2): one parameter of a context, or FSCONFIG_CMD_CREATE."""
    key_c = ctypes.c_char_p(key.encode()) if key else None
    value_c = ctypes.c_char_p(os.fsencode(value)) if command == FSCONFIG_SET_STRING else None
    code = _syscall(_long(_FSCONFIG), _long(context_fd), _long(command), key_c, value_c, _long(0))
    _check(code, "fsconfig", f"{key}={value}")


def fsmount(context_fd: int, attributes: int) -> int:
    """fsmount(2): the context's file system as a detached mount."""
    return int(
        _check(
            _syscall(_long(_FSMOUNT), _long(context_fd), _long(FSMOUNT_CLOEXEC), _long(attributes)), "fsmount"
        )
    )


def openat2(dir_fd: int, path: str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): open `path` below `dir_fd` under the given rules of resolution."""
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, mode, resolve)
    code = _syscall(
        _long(_OPENAT2), _long(dir_fd), ctypes.c_char_p(os.fsencode(path)), how, ctypes.c_size_t(24)
    )
    return int(_check(code, "openat2", path))
