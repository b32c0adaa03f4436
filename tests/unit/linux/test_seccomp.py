"""The filter's program, run by a small machine of classic BPF; no kernel is asked.

What must be refused and what must be allowed is written out here a second time, not taken from the source.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentos.linux.bpf import INSTRUCTION_SIZE, any_bit, at_least, dispatch, look_at, one_of, ret
from agentos.linux.seccomp import build_filter
from agentos.linux.syscall_table import NUMBERS

X86_64, AARCH64, I386, ARM = 0xC000003E, 0xC00000B7, 0x40000003, 0x40000028  # linux/audit.h
AUDIT_ARCH = {"x86_64": X86_64, "aarch64": AARCH64}
ARCHES = tuple(AUDIT_ARCH)

KILL, ALLOW = "KILL_PROCESS", "ALLOW"
ACTIONS = {0x80000000: KILL, 0x7FFF0000: ALLOW}
ALL_ONES = 0xFFFFFFFF_FFFFFFFF
ELSEWHERE = 0xDEADBEEF_00000000  # a high half that the kernel ignores where it wants an int


@dataclass(frozen=True, slots=True)
class Run:
    action: str
    steps: int


def execute(program: bytes, arch: int, number: int, arguments: tuple[int, ...] = ()) -> Run:
    """Run `program` as the kernel does and fail on anything that its checker or a reader would not take."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), INSTRUCTION_SIZE)]
    accumulator = at = steps = 0
    while True:
        assert 0 <= at < len(code), "left the program"
        operation, if_true, if_false, operand = code[at]
        at, steps = at + 1, steps + 1
        if operation == 0x20:
            assert operand % 4 == 0
            assert operand <= len(data) - 4
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif operation == 0x54:
            accumulator &= operand
        elif operation == 0x05:
            at += operand
        elif operation in (0x15, 0x35, 0x45):
            holds = {
                0x15: accumulator == operand,
                0x35: accumulator >= operand,
                0x45: accumulator & operand != 0,
            }[operation]
            at += if_true if holds else if_false
        else:
            assert operation == 0x06, "an instruction that the filter has no use for"
            if operand >> 16 == 0x0005:
                return Run(errno.errorcode[operand & 0xFFFF], steps)
            return Run(ACTIONS[operand], steps)


PROGRAMS = {arch: build_filter(arch) for arch in ARCHES}


def answer(arch: str, name: str, *arguments: int) -> str:
    return execute(PROGRAMS[arch], AUDIT_ARCH[arch], NUMBERS[arch][name], arguments).action


# ---------------------------------------------------------------- every name


def split(names: str) -> list[str]:
    return names.split()


REFUSED = split("""
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd kcmp
    name_to_handle_at open_by_handle_at vmsplice fanotify_init fanotify_mark modify_ldt chroot
    keyctl add_key request_key bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    mount umount2 open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick mount_setattr pivot_root
    setns unshare init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff
    quotactl quotactl_fd acct settimeofday clock_settime sethostname setdomainname lookup_dcookie
    syslog iopl ioperm vhangup memfd_secret mbind set_mempolicy get_mempolicy set_mempolicy_home_node
    move_pages migrate_pages lsm_get_self_attr lsm_set_self_attr lsm_list_modules uselib ustat sysfs
""")

ABSENT = split("""
    clone3 cachestat statmount listmount file_getattr file_setattr
    io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents
    _sysctl create_module get_kernel_syms query_module nfsservctl getpmsg putpmsg afs_syscall tuxcall security
    vserver set_thread_area get_thread_area epoll_ctl_old epoll_wait_old
""")

BY_ARGUMENT = split(
    "clone socket socketpair setsockopt seccomp pipe2 ioctl personality prctl madvise mknod mknodat setrlimit prlimit64"
)

NEEDED = split("""
    read write openat close mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn execve
    exit_group wait4 futex futex_waitv set_robust_list rseq getrandom pidfd_open pidfd_send_signal
    epoll_pwait2 close_range openat2 faccessat2 fchmodat2 statx memfd_create membarrier sendmsg recvmsg
    setsockopt accept4
    fchown fchownat setuid setgid setgroups setresuid setresgid capset
    setxattr fsetxattr setxattrat getxattrat listxattrat removexattrat
    seccomp landlock_restrict_self mseal map_shadow_stack shmget mq_open copy_file_range splice tee
""")
NEEDED_ON_X86_64 = split("open stat fork vfork pipe access chown lchown arch_prctl uretprobe uprobe")


@pytest.mark.parametrize("arch", ARCHES)
def test_every_named_call_is_refused_absent_looked_into_or_allowed(arch: str) -> None:
    """Each name of the table gets the answer that is written in this file, and all others are allowed."""
    for name in NUMBERS[arch]:
        if name in BY_ARGUMENT:
            continue
        expected = "EPERM" if name in REFUSED else "ENOSYS" if name in ABSENT else ALLOW
        for value in (0, 1, ALL_ONES):
            assert answer(arch, name, *[value] * 6) == expected, name


@pytest.mark.parametrize("arch", ARCHES)
def test_what_programs_cannot_do_without_is_allowed(arch: str) -> None:
    """The names that libcs, interpreters and package managers live on are in the table and allowed."""
    for name in NEEDED + (NEEDED_ON_X86_64 if arch == "x86_64" else []):
        assert answer(arch, name) == ALLOW, name


def test_the_lists_of_this_file_name_real_calls() -> None:
    """A misspelt name here would test nothing."""
    known = set(NUMBERS["x86_64"]) | set(NUMBERS["aarch64"])
    assert set(REFUSED + ABSENT + BY_ARGUMENT + NEEDED + NEEDED_ON_X86_64) <= known


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("arch", ARCHES)
def test_a_number_without_a_name_is_unknown(arch: str) -> None:
    """Newer calls and the gaps of the table give ENOSYS, so that a newer libc falls back."""
    named = set(NUMBERS[arch].values())
    unnamed = [number for number in (*range(1024), 0x3FFFFFFF, 0xFFFFFFFF) if number not in named]
    assert 470 in unnamed
    assert {execute(PROGRAMS[arch], AUDIT_ARCH[arch], number).action for number in unnamed} == {"ENOSYS"}


def test_x32_numbers_kill() -> None:
    """Every number with the x32 bit ends the process, -1 apart, which asks for no call at all."""
    for number in (0x40000000, 0x40000000 | 59, 0x40000000 | 520, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE):
        assert execute(PROGRAMS["x86_64"], X86_64, number).action == KILL


@pytest.mark.parametrize(
    ("arch", "other"), [("x86_64", I386), ("x86_64", AARCH64), ("aarch64", ARM), ("aarch64", X86_64)]
)
def test_another_architecture_kills(arch: str, other: int) -> None:
    """The same numbers mean other calls there, so not even read or exit pass."""
    for number in (0, 1, 60, 93, 310, 0xFFFFFFFF):
        assert execute(PROGRAMS[arch], other, number).action == KILL


def test_the_table_agrees_with_known_numbers() -> None:
    """Numbers taken from the kernel's tables by hand: the first, the last and those around every gap."""
    x86_64 = {
        "read": 0, "clone": 56, "ptrace": 101, "prctl": 157, "setrlimit": 160, "chroot": 161, "openat": 257,
        "unshare": 272, "prlimit64": 302, "setns": 308, "rseq": 334, "uretprobe": 335, "uprobe": 336,
    }  # fmt: skip
    aarch64 = {
        "io_setup": 0, "ioctl": 29, "renameat": 38, "umount2": 39, "chroot": 51, "unshare": 97, "ptrace": 117,
        "setrlimit": 164, "prctl": 167, "clone": 220, "recvmmsg": 243, "wait4": 260, "prlimit64": 261,
        "setns": 268, "rseq": 293, "kexec_file_load": 294,
    }  # fmt: skip
    common = {
        "pidfd_send_signal": 424, "io_uring_setup": 425, "mount_setattr": 442, "futex_waitv": 449,
        "set_mempolicy_home_node": 450, "cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453,
        "futex_wake": 454, "futex_wait": 455, "futex_requeue": 456, "statmount": 457, "listmount": 458,
        "lsm_get_self_attr": 459, "lsm_list_modules": 461, "mseal": 462, "setxattrat": 463,
        "removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468, "file_setattr": 469,
    }  # fmt: skip
    for arch, own in (("x86_64", x86_64), ("aarch64", aarch64)):
        assert {name: NUMBERS[arch][name] for name in own | common} == own | common
        assert len(set(NUMBERS[arch].values())) == len(NUMBERS[arch])
        assert max(NUMBERS[arch].values()) == 469


def header_numbers(path: str) -> dict[str, int]:
    with open(path) as file:
        words = [line.split() for line in file if line.startswith("#define __NR_")]
    return {word[1].removeprefix("__NR_"): int(word[2]) for word in words if word[2].isdigit()}


@pytest.mark.skipif(not os.path.exists("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), reason="no headers")
def test_the_table_agrees_with_the_installed_header() -> None:
    """Whatever this machine's kernel headers name has the same number here, if the table reaches so far."""
    headers = header_numbers("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    table = NUMBERS["x86_64"]
    assert {name: table.get(name) for name, number in headers.items() if number <= 469} == {
        name: number for name, number in headers.items() if number <= 469
    }


# ---------------------------------------------------------------- arguments

both = pytest.mark.parametrize("arch", ARCHES)


@both
@pytest.mark.parametrize(
    "flag", [0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
)
def test_clone_makes_no_namespaces(arch: str, flag: int) -> None:
    """Each CLONE_NEW flag is refused, alone, with SIGCHLD, and among a thread's flags."""
    for flags in (flag, flag | 17, flag | 0x3D0F00, flag | ELSEWHERE):
        assert answer(arch, "clone", flags) == "EPERM"


@both
def test_clone_makes_processes_and_threads(arch: str) -> None:
    """fork, vfork, posix_spawn and pthread_create are plain clones."""
    for flags in (0, 17, 0x4111, 0x1200011, 0x3D0F00, 0x1000):
        assert answer(arch, "clone", flags) == ALLOW


@both
@pytest.mark.parametrize("call", ["socket", "socketpair"])
def test_sockets_are_local_internet_or_route_netlink(arch: str, call: str) -> None:
    """What programs use is allowed, with the flags in the type and rubbish in the ignored halves too."""
    stream, datagram, raw, sequenced, cloexec = 1, 2, 3, 5, 0o2000000
    for family, type_, protocol in (
        (1, stream, 0), (1, datagram, 0), (1, sequenced, 0), (2, stream, 0), (2, stream, 6),
        (2, datagram, 17), (2, datagram, 1), (10, stream, 0), (10, datagram, 58), (2, raw, 1), (2, raw, 255),
        (16, raw, 0), (16, datagram, 0),
    ):  # fmt: skip
        assert answer(arch, call, family, type_ | cloexec | 0o4000, protocol) == ALLOW
        assert answer(arch, call, ELSEWHERE | family, ELSEWHERE | type_, ELSEWHERE | protocol) == ALLOW


@both
@pytest.mark.parametrize("call", ["socket", "socketpair"])
def test_no_other_socket(arch: str, call: str) -> None:
    """Other families, SOCK_PACKET and rare protocols are answered as by a kernel built without them."""
    vsock, packet, alg = 40, 17, 38
    for family in {*range(50), vsock, packet, alg, 0xFFFFFFFF} - {1, 2, 10, 16}:
        assert answer(arch, call, family, 1, 0) == "EAFNOSUPPORT"
        assert answer(arch, call, ELSEWHERE | family, 1, 0) == "EAFNOSUPPORT"
    for protocol in set(range(1, 23)):  # 9 is NETLINK_AUDIT, 12 NETLINK_NETFILTER, 15 NETLINK_KOBJECT_UEVENT
        assert answer(arch, call, 16, 3, protocol) == "EPROTONOSUPPORT"
    for family in (2, 10):
        for type_ in (0, 4, 5, 6, 10, 15):  # 5 is SCTP's, 6 DCCP's, 10 SOCK_PACKET
            assert answer(arch, call, family, type_, 0) == "ESOCKTNOSUPPORT"
        for protocol in (2, 33, 115, 132, 136, 256, 262):  # DCCP, L2TP, SCTP, UDP-Lite, SMC, MPTCP
            assert answer(arch, call, family, 1, protocol) == "EPROTONOSUPPORT"


@both
def test_no_protocol_that_does_not_go_with_the_type(arch: str) -> None:
    """The kernel would look for a module that makes it go, each time."""
    stream, datagram = 1, 2
    for family, type_, protocols in (
        (2, stream, {0, 6}), (10, stream, {0, 6}), (2, datagram, {0, 17, 1}), (10, datagram, {0, 17, 58}),
    ):  # fmt: skip
        for protocol in range(300):
            expected = ALLOW if protocol in protocols else "EPROTONOSUPPORT"
            assert answer(arch, "socket", family, type_, protocol) == expected
            assert (
                answer(arch, "socket", ELSEWHERE | family, 0x80800 | type_, ELSEWHERE | protocol) == expected
            )


@both
def test_no_programs_for_sockets(arch: str) -> None:
    """SO_ATTACH_FILTER and its kin are unknown; the same numbers at other levels, and other options, are not."""
    for option in range(100):
        expected = "ENOPROTOOPT" if option in (26, 50, 51, 52) else ALLOW
        assert answer(arch, "setsockopt", 3, ELSEWHERE | 1, ELSEWHERE | option) == expected
        assert answer(arch, "setsockopt", 3, 6, option) == ALLOW
        assert answer(arch, "setsockopt", 3, 0, option) == ALLOW


@both
def test_filters_end_with_their_processes(arch: str) -> None:
    """seccomp(2) gives out no listener, whatever other flags are there."""
    for flags in (0, 1, 2, 4, 16, 32, ELSEWHERE):
        assert answer(arch, "seccomp", 1, flags) == ALLOW
        assert answer(arch, "seccomp", 1, ELSEWHERE | flags | 8) == "EINVAL"


@both
def test_pipes_carry_no_notifications(arch: str) -> None:
    """O_NOTIFICATION_PIPE is answered as by a kernel without watch queues."""
    for flags in (0, 0o2000000, 0o4000, 0o40000, ELSEWHERE):
        assert answer(arch, "pipe2", 0, flags) == ALLOW
        assert answer(arch, "pipe2", 0, flags | 0x80) == "ENOPKG"


@both
def test_ioctl_loads_no_modules(arch: str) -> None:
    """Those of bridges, VLANs and DLCIs are refused; those that programs list interfaces with are not."""
    for request in (0x8940, 0x8941, 0x89A0, 0x89A1, 0x8982, 0x8983, 0x8980, 0x8981):
        assert answer(arch, "ioctl", 3, ELSEWHERE | request) == "EPERM"
    for request in (0x8910, 0x8912, 0x8913, 0x8915, 0x8927, 0x8933, 0x8942, 0x8946):
        assert answer(arch, "ioctl", 3, request) == ALLOW


@both
def test_ioctl_cannot_type_into_the_terminal(arch: str) -> None:
    """TIOCSTI, TIOCLINUX and TIOCSETD are refused whatever stands in the high half; others are not."""
    for request in (0x5412, 0x541C, 0x5423):
        for high in (0, 1 << 32, ELSEWHERE, 0xFFFFFFFF_00000000):
            assert answer(arch, "ioctl", 0, high | request) == "EPERM"
    for request in (0x5401, 0x5402, 0x5410, 0x5413, 0x5414, 0x541B, 0x5421, 0x40045431, 0x80045430):
        assert answer(arch, "ioctl", 0, request) == ALLOW


@both
def test_personality_is_harmless(arch: str) -> None:
    """uname's disguises and fixed addresses are allowed; executable data and a page 0 are not."""
    for persona in (0, 8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF, ALL_ONES):
        assert answer(arch, "personality", persona) == ALLOW
    for persona in (0x0400000, 0x0100000, 0x0200000, 0x440000, 1, 0x40008):
        assert answer(arch, "personality", persona) == "EPERM"


@both
def test_prctl_options(arch: str) -> None:
    """Three options are refused, those of Linux 6.18 allowed, newer and invented ones unknown."""
    refused = {35, 62, 67}  # PR_SET_MM, PR_SCHED_CORE, PR_SET_MEMORY_MERGE
    for option in range(1, 79):
        assert answer(arch, "prctl", ELSEWHERE | option) == ("EPERM" if option in refused else ALLOW)
    for option in (0x53564D41, 0x59616D61, 0x41555856):
        assert answer(arch, "prctl", option) == ALLOW
    for option in (0, 79, 80, 200, 0x53564D40, 0x59616D62, 0xFFFFFFFF):
        assert answer(arch, "prctl", option) == "EINVAL"


@both
def test_madvise_offers_no_pages_for_merging(arch: str) -> None:
    """MADV_MERGEABLE is answered as by a kernel without KSM."""
    assert answer(arch, "madvise", 0, 4096, ELSEWHERE | 12) == "EINVAL"
    assert {answer(arch, "madvise", 0, 4096, advice) for advice in (0, 4, 8, 13, 14, 21, 25)} == {ALLOW}


def test_mknod_makes_no_devices() -> None:
    """Regular files and fifos can be made; device nodes cannot, whatever the permission bits say."""
    for arch, call, before in (("x86_64", "mknod", 1), ("x86_64", "mknodat", 2), ("aarch64", "mknodat", 2)):
        for kind in (0, 0o100000, 0o010000, 0o140000):
            assert answer(arch, call, *[7] * before, kind | 0o644) == ALLOW
        for kind in (0o020000, 0o060000):
            for extra in (0, 0o666, 0o7777, 0x10000, ELSEWHERE):
                assert answer(arch, call, *[7] * before, kind | extra) == "EPERM"


@both
def test_only_a_cgroup_namespace_may_be_unshared(arch: str) -> None:
    """The spawner marks lineages with one; the kernel asks CAP_SYS_ADMIN of it, which no program has."""
    assert answer(arch, "unshare", 0x02000000) == ALLOW
    for flags in (
        0,
        0x10000000,
        0x00020000,
        0x20000000,
        0x40000000,
        0x02000000 | 0x10000000,
        0x7E020080,
        ALL_ONES,
    ):
        assert answer(arch, "unshare", flags) == "EPERM", hex(flags)


# ---------------------------------------------------------------- the program as such

words = st.one_of(st.integers(0, 600), st.integers(0, 0xFFFFFFFF))
longs = st.one_of(st.integers(0, 64), words, st.integers(0, ALL_ONES))


@given(
    arch=st.sampled_from(ARCHES),
    audit_arch=st.one_of(st.sampled_from([X86_64, AARCH64, I386]), words),
    number=words,
    arguments=st.tuples(*[longs] * 6),
)
def test_every_run_ends_in_an_answer(
    arch: str, audit_arch: int, number: int, arguments: tuple[int, ...]
) -> None:
    """Random calls never leave the program, and only the own architecture's named calls can be allowed."""
    run = execute(PROGRAMS[arch], audit_arch, number, arguments)
    if audit_arch != AUDIT_ARCH[arch]:
        assert run.action == KILL
    if run.action == ALLOW:
        assert number in NUMBERS[arch].values()


@both
def test_the_program_is_small_and_flat(arch: str) -> None:
    """A call is answered within 15 instructions when its arguments do not matter, in 30 when they do."""
    program = PROGRAMS[arch]
    assert len(program) // INSTRUCTION_SIZE <= 480
    steps = {name: execute(program, AUDIT_ARCH[arch], NUMBERS[arch][name]).steps for name in NUMBERS[arch]}
    assert max(count for name, count in steps.items() if name not in BY_ARGUMENT) <= 15
    deepest = max(
        execute(program, AUDIT_ARCH[arch], NUMBERS[arch][name], arguments).steps
        for name in BY_ARGUMENT
        if name in NUMBERS[arch]
        for arguments in ((10, 3, 255), (40, 3, 9), (62, 0, 0), (0xFFFFFFFF, 0xF, 0), (15, 15, 0))
    )
    assert deepest <= 30


@both
def test_every_instruction_stays_inside(arch: str) -> None:
    """No jump of any instruction, reached or not, leads behind the end, and the last one returns."""
    program = PROGRAMS[arch]
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), INSTRUCTION_SIZE)]
    assert len(program) % INSTRUCTION_SIZE == 0
    assert code[-1][0] == 0x06
    for at, (operation, if_true, if_false, operand) in enumerate(code):
        farthest = operand if operation == 0x05 else max(if_true, if_false)
        assert at + 1 + farthest < len(code) or operation == 0x06


def test_the_same_arguments_build_the_same_bytes() -> None:
    """The program can be built once and kept."""
    assert build_filter("x86_64") == build_filter("x86_64")


def test_an_architecture_without_a_table_is_an_error() -> None:
    """A filter is never guessed."""
    with pytest.raises(ValueError, match="riscv64"):
        build_filter("riscv64")


# ---------------------------------------------------------------- the assembler

ONE, TWO, THREE = (ret(0x50000 | number) for number in (1, 2, 3))
NAMES = {ONE: errno.errorcode[1], TWO: errno.errorcode[2], THREE: errno.errorcode[3]}


def run_on(block: bytes, value: int) -> str:
    return execute(look_at(0, block), 0, value).action


@given(
    cases=st.dictionaries(st.integers(0, 1000), st.sampled_from([ONE, TWO]), max_size=400),
    values=st.lists(words, max_size=20),
)
def test_dispatch_finds_each_case(cases: dict[int, bytes], values: list[int]) -> None:
    """Every case and its neighbours get their own block, also beyond the reach of a short jump."""
    block = dispatch(cases, THREE)
    for value in {*values, *cases, *(case + 1 for case in cases), *(case - 1 for case in cases if case)}:
        assert run_on(block, value) == NAMES[cases.get(value, THREE)]


LONG = one_of(tuple(range(254)), ONE, ONE)


@given(values=st.sets(words, min_size=1, max_size=200), probe=words, then=st.sampled_from([ONE, LONG]))
def test_one_of_is_membership(values: set[int], probe: int, then: bytes) -> None:
    """Whatever the number of values and the size of the block behind them."""
    assert len(LONG) // INSTRUCTION_SIZE > 255
    for value in {*values, probe}:
        assert run_on(one_of(tuple(values), then, TWO), value) == NAMES[ONE if value in values else TWO]


@given(bound=words, value=words)
def test_comparisons_are_unsigned(bound: int, value: int) -> None:
    """at_least and any_bit look at all 32 bits."""
    assert run_on(at_least(bound, ONE, TWO), value) == NAMES[ONE if value >= bound else TWO]
    assert run_on(any_bit(bound, ONE, TWO), value) == NAMES[ONE if value & bound else TWO]
