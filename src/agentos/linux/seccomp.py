"""The system-call filter of a VM's programs: built once as bytes, then loaded by every process it is for.

An allow-list in the tradition of the default profile of moby for a process without capabilities, with less in
it: every call that is left out stands below with its reason, and calls with a dangerous argument are looked
into. The answers are chosen for programs that can fall back:

    ALLOW           the kernel decides, with the ids and capabilities that the caller has
    EPERM           the call exists and is refused
    ENOSYS          the call is unknown here: newer than the table, gone from the kernel, or done without
    another error   what a kernel without that one feature answers
    KILL            a call of another architecture (int 0x80, x32), where these numbers mean other calls

The filter is no boundary of its own: it keeps programs away from kernel code that no VM needs and from what
namespaces do not separate. It sees numbers and pointers, never what a pointer points at, seccomp(2).
What the process gave up before it comes here is not this module's business.
"""

from __future__ import annotations

import ctypes
import errno

from agentos.linux import syscalls
from agentos.linux.bpf import (
    ARCH,
    INSTRUCTION_SIZE,
    NUMBER,
    any_bit,
    argument,
    at_least,
    dispatch,
    look_at,
    one_of,
    ret,
)
from agentos.linux.syscall_table import NUMBERS

# linux/seccomp.h
_KILL = ret(0x80000000)  # SECCOMP_RET_KILL_PROCESS
_ALLOW = ret(0x7FFF0000)  # SECCOMP_RET_ALLOW
_SECCOMP_MODE_FILTER = 2
_PR_SET_SECCOMP = 22  # linux/prctl.h


def _error(number: int) -> bytes:
    return ret(0x00050000 | number)  # SECCOMP_RET_ERRNO


_EPERM = _error(errno.EPERM)
_ENOSYS = _error(errno.ENOSYS)

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_X32_BIT = 0x40000000  # __X32_SYSCALL_BIT of asm/unistd.h
_NO_CALL = 0xFFFFFFFF  # -1: what syscall(-1) asks for, and what a tracer writes to skip a call

# Calls that are allowed whatever their arguments. Names that an architecture lacks do not matter there.
_ALLOWED = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek sendfile splice tee
    copy_file_range readahead fadvise64 fallocate truncate ftruncate sync fsync fdatasync syncfs
    sync_file_range

    open openat openat2 creat close close_range dup dup2 dup3 fcntl flock pipe
    memfd_create eventfd eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime
    inotify_init inotify_init1 inotify_add_watch inotify_rm_watch
    select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2

    stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 getdents getdents64
    getcwd chdir fchdir mkdir mkdirat rmdir rename renameat renameat2 link linkat unlink unlinkat
    symlink symlinkat readlink readlinkat umask chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat
    utime utimes futimesat utimensat
    setxattr lsetxattr fsetxattr setxattrat getxattr lgetxattr fgetxattr getxattrat
    listxattr llistxattr flistxattr listxattrat removexattr lremovexattr fremovexattr removexattrat

    mmap munmap mremap mprotect msync mincore brk remap_file_pages mlock mlock2 munlock mlockall munlockall
    membarrier pkey_mprotect pkey_alloc pkey_free mseal map_shadow_stack
    shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr

    fork vfork execve execveat exit exit_group wait4 waitid arch_prctl set_tid_address restart_syscall
    set_robust_list get_robust_list rseq futex futex_waitv futex_wake futex_wait futex_requeue
    getpid getppid gettid getpgid setpgid getpgrp getsid setsid pidfd_open
    kill tkill tgkill pidfd_send_signal rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait
    rt_sigqueueinfo rt_tgsigqueueinfo rt_sigsuspend sigaltstack pause uretprobe uprobe

    getuid geteuid getgid getegid getresuid getresgid getgroups setuid setgid setreuid setregid
    setresuid setresgid setfsuid setfsgid setgroups capget capset
    landlock_create_ruleset landlock_add_rule landlock_restrict_self

    getrlimit getrusage times sysinfo uname getcpu getrandom getpriority setpriority ioprio_get ioprio_set
    sched_yield sched_setparam sched_getparam sched_setscheduler sched_getscheduler sched_setattr
    sched_getattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval sched_setaffinity
    sched_getaffinity

    time gettimeofday clock_gettime clock_getres adjtimex clock_adjtime nanosleep clock_nanosleep
    alarm getitimer setitimer timer_create timer_settime timer_gettime timer_getoverrun timer_delete

    connect accept accept4 bind listen shutdown getsockname getpeername getsockopt
    sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg
"""

# Calls that are refused with EPERM, under the reason why.
_REFUSED: dict[str, str] = {
    "reads, writes or steals from other processes; with one user id that could be the VM's init": """
        ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd kcmp""",
    "makes, enters or rearranges namespaces and mounts; new namespaces open much more of the kernel": """
        setns chroot pivot_root mount umount2 open_tree open_tree_attr move_mount mount_setattr
        fsopen fsconfig fsmount fspick""",
    "opens files by their number, past every directory's permissions (the Shocker escape)": """
        name_to_handle_at open_by_handle_at""",
    "works past this filter: io_uring can open the sockets that socket() refuses": """
        io_uring_setup io_uring_enter io_uring_register""",
    "runs or loads the caller's code in the kernel, or replaces the kernel": """
        bpf init_module finit_module delete_module kexec_load kexec_file_load""",
    "holds kernel threads at a chosen page fault, the lever of many exploits": "userfaultfd",
    "lends the caller's pages to a pipe, whose reader may see later writes (CVE-2020-29374)": "vmsplice",
    "watches the whole machine's processor, memory or kernel log": "perf_event_open syslog lookup_dcookie",
    "keyrings come down from the host's session, and no namespace of their own separates them": """
        add_key request_key keyctl""",
    "watches or blocks file accesses of a whole file system": "fanotify_init fanotify_mark",
    "16-bit segments: old kernel code (CVE-2017-17053) that only emulators need": "modify_ldt",
    "pages that the host cannot see, each of which splits the kernel's large mappings": "memfd_secret",
    "places memory on the host's nodes; as in moby's profile without CAP_SYS_NICE": """
        mbind set_mempolicy set_mempolicy_home_node get_mempolicy move_pages migrate_pages""",
    "belongs to the machine and its administrator, not to a VM": """
        reboot swapon swapoff quotactl quotactl_fd acct settimeofday clock_settime sethostname setdomainname
        iopl ioperm vhangup lsm_get_self_attr lsm_set_self_attr lsm_list_modules""",
    "old and without users": "uselib ustat sysfs",
}

# Calls that are answered with ENOSYS, under the reason why.
_ABSENT: dict[str, str] = {
    "its flags lie behind a pointer; libcs fall back to clone() on ENOSYS, and only then": "clone3",
    "its contexts are counted for the whole machine (fs.aio-max-nr): one VM could use up all": """
        io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents""",
    "shows the page cache that VMs share; before Linux 6.14 for every readable file": "cachestat",
    "tells what /proc/self/mountinfo tells, which can be covered": "statmount listmount",
    "an ioctl by path; its few users fall back to the ioctl": "file_getattr file_setattr",
    "a number that no kernel serves any more or ever did": """
        _sysctl create_module get_kernel_syms query_module nfsservctl getpmsg putpmsg afs_syscall tuxcall
        security vserver set_thread_area get_thread_area epoll_ctl_old epoll_wait_old""",
}

# linux/sched.h: every CLONE_NEW* flag. The kernel reads the low half only, so the filter does too.
_NAMESPACE_FLAGS = 0x7E020080
_CLONE_NEWCGROUP = 0x02000000

# linux/socket.h, linux/net.h, linux/in.h
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_SOCK_TYPE_MASK = 0xF
_SOCK_STREAM, _SOCK_DGRAM, _SOCK_RAW = 1, 2, 3
_STREAM_PROTOCOLS = (0, 6)  # default, TCP
_DATAGRAM_PROTOCOLS, _DATAGRAM_PROTOCOLS6 = (0, 17, 1), (0, 17, 58)  # default, UDP, ICMP or ICMPv6
_RAW_PROTOCOLS = (0, 1, 6, 17, 58, 255)
_NETLINK_ROUTE = 0

# asm-generic/ioctls.h
_TIOCSTI = 0x5412  # types into the terminal that a caller shares with its parent
_TIOCLINUX = 0x541C  # pastes the selection of a console, the same by another name
_TIOCSETD = 0x5423  # loads line disciplines, kernel modules with a record (CVE-2017-2636, CVE-2023-6546)
# linux/sockios.h: bridges, VLANs and DLCIs (before Linux 5.12), whose modules are loaded for whoever asks
_MODULE_IOCTLS = (0x8940, 0x8941, 0x89A0, 0x89A1, 0x8982, 0x8983, 0x8980, 0x8981)

# asm-generic/socket.h: SO_ATTACH_FILTER, _BPF, _REUSEPORT_CBPF, _REUSEPORT_EBPF
_SOL_SOCKET = 1
_SOCKET_PROGRAMS = (26, 50, 51, 52)
_NEW_LISTENER = 0x8  # SECCOMP_FILTER_FLAG_NEW_LISTENER of linux/seccomp.h
_NOTIFICATION_PIPE = 0x80  # O_NOTIFICATION_PIPE of linux/watch_queue.h

_PERSONALITIES = (
    0,  # PER_LINUX
    0x0008,  # PER_LINUX32: uname says i686
    0x20000,  # UNAME26
    0x20008,
    0x40000,  # ADDR_NO_RANDOMIZE: the thread sanitizer and reproducible builds start themselves again with it
    0xFFFFFFFF,  # only asks
)

# linux/prctl.h
_LAST_PRCTL = 78  # PR_FUTEX_HASH, of Linux 6.16
_NAMED_PRCTLS = (0x53564D41, 0x59616D61, 0x41555856)  # PR_SET_VMA, PR_SET_PTRACER, PR_GET_AUXV
_REFUSED_PRCTLS = (
    35,  # PR_SET_MM: forges the caller's command line and auxiliary vector as others see them in /proc
    62,  # PR_SCHED_CORE: a cookie of one's own leaves the VM's and idles the core's other thread
    67,  # PR_SET_MEMORY_MERGE: pages shared with other VMs tell their contents by time (CVE-2015-2877)
)
_MADV_MERGEABLE = 12  # asm-generic/mman-common.h; the same for one mapping

_RLIMIT_CORE = 4  # asm-generic/resource.h
_NOTHING_DONE = _error(0)  # the call returns 0

# linux/stat.h
_S_IFMT, _S_IFCHR, _S_IFBLK = 0xF000, 0x2000, 0x6000


def build_filter(arch: str) -> bytes:
    """Build the filter for `arch`, "x86_64" or "aarch64", as an array of struct sock_filter.

    Raises ValueError for another architecture.
    """
    if arch not in NUMBERS:
        raise ValueError(f"no system calls known for {arch}: only for {', '.join(NUMBERS)}")
    numbers = NUMBERS[arch]
    answers = dict.fromkeys(_ALLOWED.split(), _ALLOW)
    answers |= dict.fromkeys(" ".join(_REFUSED.values()).split(), _EPERM)
    answers |= dict.fromkeys(" ".join(_ABSENT.values()).split(), _ENOSYS)
    answers |= _looked_into()
    # A number without a name is a newer call. A name without an answer is a KeyError here, never a hole.
    calls = dispatch({number: answers[name] for name, number in numbers.items()}, otherwise=_ENOSYS)
    if arch == "x86_64":
        calls = at_least(_X32_BIT, one_of((_NO_CALL,), _ENOSYS, _KILL), calls)
    return look_at(ARCH, one_of((_AUDIT_ARCH[arch],), look_at(NUMBER, calls), _KILL))


def load(program: bytes) -> None:
    """Put the calling thread and all it starts under `program`, for good and on top of earlier filters.

    The caller has no_new_privs or CAP_SYS_ADMIN in its user namespace, and should have no other threads.
    Raises OSError, seccomp(2) says which: EACCES without those rights, EINVAL for a program that is none.
    """
    counted = _CountedProgram(len(program) // INSTRUCTION_SIZE, program)
    try:
        syscalls.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(counted))
    except OSError as error:
        error.add_note("prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER)")
        raise


class _CountedProgram(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _looked_into() -> dict[str, bytes]:
    """Return the rules of the calls whose arguments decide.

    Arguments that the kernel declares as int are compared by their low half alone: it ignores the other, so a
    comparison of all 64 bits could be slipped past (CVE-2019-10063).
    """
    socket = _socket()
    device = one_of((_TIOCSTI, _TIOCLINUX, _TIOCSETD, *_MODULE_IOCTLS), _EPERM, _ALLOW)
    return {
        "clone": look_at(argument(0), any_bit(_NAMESPACE_FLAGS, _EPERM, _ALLOW)),
        # For the spawner, which has CAP_SYS_ADMIN in the VM's user namespace; the kernel refuses it to all others.
        "unshare": look_at(argument(0), one_of((_CLONE_NEWCGROUP,), _ALLOW, _EPERM)),
        "socket": socket,
        "socketpair": socket,
        "setsockopt": _socket_option(),
        # A listener holds its filter when the process has ended: see _socket_option.
        "seccomp": look_at(argument(1), any_bit(_NEW_LISTENER, _error(errno.EINVAL), _ALLOW)),
        # Without keyrings there is nothing to be notified of (CVE-2022-0995).
        "pipe2": look_at(argument(1), any_bit(_NOTIFICATION_PIPE, _error(errno.ENOPKG), _ALLOW)),
        "ioctl": look_at(argument(1), device),
        "personality": look_at(argument(0), one_of(_PERSONALITIES, _ALLOW, _EPERM)),
        "prctl": look_at(argument(0), _prctl()),
        "madvise": look_at(argument(2), one_of((_MADV_MERGEABLE,), _error(errno.EINVAL), _ALLOW)),
        "setrlimit": look_at(argument(0), one_of((_RLIMIT_CORE,), _NOTHING_DONE, _ALLOW)),
        "prlimit64": _limit(),
        "mknod": _make_node(argument(1)),
        "mknodat": _make_node(argument(2)),
    }


def _socket() -> bytes:
    """Allow local sockets, TCP, UDP and ping, and the route netlink that getifaddrs(3) reads.

    AF_VSOCK reaches the hypervisor past every network namespace. Types and protocols are listed too: asking
    for a rare one loads its module (CVE-2017-6074), SOCK_PACKET is AF_PACKET by another name (packet(7)), and
    SOCK_SEQPACKET with protocol 0 can be SCTP. A protocol that does not go with the type, such as UDP as a
    stream, has the kernel look for a module each time: it starts modprobe as the host's root, and counts its
    time to nobody. The errors are those of a kernel built without it.
    """
    family, type_, protocol = argument(0), argument(1), argument(2)
    no_protocol = _error(errno.EPROTONOSUPPORT)

    def internet(datagram: tuple[int, ...]) -> bytes:
        answer = _error(errno.ESOCKTNOSUPPORT)
        known = {_SOCK_STREAM: _STREAM_PROTOCOLS, _SOCK_DGRAM: datagram, _SOCK_RAW: _RAW_PROTOCOLS}
        for one, protocols in known.items():
            answer = one_of((one,), look_at(protocol, one_of(protocols, _ALLOW, no_protocol)), answer)
        return look_at(type_, answer, mask=_SOCK_TYPE_MASK)

    netlink = look_at(protocol, one_of((_NETLINK_ROUTE,), _ALLOW, no_protocol))
    others = one_of((_AF_NETLINK,), netlink, _error(errno.EAFNOSUPPORT))
    others = one_of((_AF_INET,), internet(_DATAGRAM_PROTOCOLS), others)
    others = one_of((_AF_INET6,), internet(_DATAGRAM_PROTOCOLS6), others)
    return look_at(family, one_of((_AF_UNIX,), _ALLOW, others))


def _socket_option() -> bytes:
    """Refuse programs for sockets. What they are compiled to is counted for the machine (net.core.bpf_jit_limit).

    One VM could use that up with a few thousand sockets; no VM could then be booted, nor anybody but root load a
    filter. Those of seccomp(2) end with their process, so that the limit of processes bounds them.
    """
    programs = one_of(_SOCKET_PROGRAMS, _error(errno.ENOPROTOOPT), _ALLOW)
    return look_at(argument(1), one_of((_SOL_SOCKET,), look_at(argument(2), programs), _ALLOW))


def _prctl() -> bytes:
    """Allow the options up to Linux 6.18, less the refused; a newer one is EINVAL, as on an older kernel."""
    options = dict.fromkeys((*range(1, _LAST_PRCTL + 1), *_NAMED_PRCTLS), _ALLOW)
    options |= dict.fromkeys(_REFUSED_PRCTLS, _EPERM)
    return dispatch(options, otherwise=_error(errno.EINVAL))


def _limit() -> bytes:
    """Allow prlimit(2) to read any limit and to set the caller's own, but for that of core files.

    Whoever has the same user id may otherwise set those of the VM's spawner, or with one id for all those of its
    init. And init's limit of core files, 1, is the one value with which the kernel starts no program of the host
    (core(5)): a program that sets its own, mostly to 0, is told that it has.
    """
    limited = one_of((_RLIMIT_CORE,), _if_null(3, _NOTHING_DONE, _EPERM), _ALLOW)
    of_itself = look_at(argument(0), one_of((0,), look_at(argument(1), limited), _EPERM))
    return _if_null(2, _ALLOW, of_itself)


def _if_null(index: int, then: bytes, otherwise: bytes) -> bytes:
    """Run `then` if a pointer is NULL, of which both halves count."""
    low = look_at(argument(index), one_of((0,), then, otherwise))
    return look_at(argument(index, high=True), one_of((0,), low, otherwise))


def _make_node(mode: int) -> bytes:
    """Allow regular files, fifos and sockets, but no device, mknod(2)."""
    return look_at(mode, one_of((_S_IFCHR, _S_IFBLK), _EPERM, _ALLOW), mask=_S_IFMT)
