"""The filter in real processes of this kernel: what it refuses, what it kills, which programs live."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentos.linux import seccomp, syscalls
from agentos.linux.syscall_table import NUMBERS

MACHINE = os.uname().machine
if MACHINE not in NUMBERS:
    pytest.skip(f"no filter for {MACHINE}", allow_module_level=True)

PROGRAM = seccomp.build_filter(MACHINE)
MARK = 987_654_321  # microseconds of RLIMIT_RTTIME
RLIMIT_RTTIME = 15  # asm-generic/resource.h; Python's resource does not name it

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def enter_filter() -> None:
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.load(PROGRAM)


def in_child(body: Callable[[], Any], prepare: Callable[[], None] = enter_filter) -> Any:
    """Return what `body` returns, or raise what it raises, in a forked child after `prepare`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()  # so that vhangup(2), were it allowed, would meet no terminal
            prepare()
            answer = (True, body())
        except BaseException as error:
            answer = (False, error)
        os.write(writer, pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status))
    succeeded, value = pickle.loads(data)
    if not succeeded:
        raise value
    return value


def call(name: str, *arguments: int) -> str:
    """Return "ok" or the errno's name of one raw system call."""
    number = NUMBERS[MACHINE][name]
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_ulong(value) for value in arguments])
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def unknown(number: int) -> str:
    result = libc.syscall(ctypes.c_long(number))
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def names(text: str) -> list[str]:
    return [name for name in text.split() if name in NUMBERS[MACHINE]]


REFUSED = names("""
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd kcmp
    name_to_handle_at open_by_handle_at vmsplice fanotify_init fanotify_mark modify_ldt chroot
    keyctl add_key request_key bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    mount umount2 open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick mount_setattr pivot_root
    setns unshare init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff
    quotactl quotactl_fd acct settimeofday clock_settime sethostname setdomainname lookup_dcookie syslog
    iopl ioperm vhangup memfd_secret mbind set_mempolicy get_mempolicy move_pages migrate_pages
""")
UNKNOWN = names("clone3 cachestat statmount listmount file_getattr file_setattr _sysctl nfsservctl")
ALL_BITS = 0xFFFFFFFF_FFFFFFFF  # as every argument it makes no call do harm, were it let through


def test_refused_calls_fail_with_eperm() -> None:
    """Root with every capability gets EPERM from each call that is not for VMs."""
    answers = in_child(lambda: {name: call(name, *[ALL_BITS] * 6) for name in REFUSED})
    assert answers == dict.fromkeys(REFUSED, "EPERM")


def test_without_the_filter_the_kernel_looks_at_the_arguments() -> None:
    """The same calls with the same arguments fail otherwise without the filter: it was the filter."""
    probes = names("ptrace unshare setns process_vm_readv name_to_handle_at vmsplice kcmp")
    answers = in_child(lambda: {name: call(name, *[ALL_BITS] * 6) for name in probes}, prepare=lambda: None)
    assert "EPERM" not in answers.values()


def test_absent_and_newer_calls_fail_with_enosys() -> None:
    """What the filter hides or does not know looks like an older kernel."""
    answers = in_child(lambda: {name: call(name, *[ALL_BITS] * 6) for name in UNKNOWN})
    assert answers == dict.fromkeys(UNKNOWN, "ENOSYS")
    newer = in_child(lambda: [unknown(number) for number in (-1, 400, 470, 600, 9999)])
    assert newer == ["ENOSYS"] * 5


def test_no_namespaces_by_clone() -> None:
    """Each CLONE_NEW flag is refused, while fork and threads go on, libc's clone3 included."""
    flags = [0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
    assert in_child(lambda: {call("clone", flag | 17, 0, 0, 0, 0) for flag in flags}) == {"EPERM"}

    def forks_and_threads() -> tuple[int, list[int]]:
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        seen: list[int] = []
        thread = threading.Thread(target=seen.append, args=(1,))
        thread.start()
        thread.join()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen

    assert in_child(forks_and_threads) == (7, [1])


def test_sockets() -> None:
    """Local, internet and route netlink sockets open; vsock, packet, crypto and audit ones do not exist."""

    def opened(family: int, type_: int, protocol: int = 0) -> str:
        try:
            socket.socket(family, type_, protocol).close()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "ok"

    def attempts() -> dict[tuple[int, ...], str]:
        return {
            case: opened(*case)
            for case in ((1, 1), (2, 1), (2, 2), (10, 1), (16, 3, 0), (40, 1), (17, 3), (38, 5),
                         (16, 3, 9), (2, 10, 0x300), (2, 1, 132))
        }  # fmt: skip

    answers = in_child(attempts)
    assert [answers[case] for case in list(answers)[:5]] == ["ok"] * 5
    assert [answers[case] for case in list(answers)[5:]] == [
        "EAFNOSUPPORT", "EAFNOSUPPORT", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT",
        "EPROTONOSUPPORT",
    ]  # fmt: skip
    assert in_child(lambda: len(socket.socketpair())) == 2
    assert in_child(lambda: len(socket.if_nameindex())) > 0


def test_nobody_types_into_the_terminal() -> None:
    """TIOCSTI fails on the own controlling terminal, with any rubbish in the request's high half."""

    def push() -> list[str]:
        _, terminal = os.openpty()
        letter = ctypes.create_string_buffer(b"x")
        assert call("ioctl", terminal, 0x540E, 0) == "ok"  # TIOCSCTTY
        high = (0, 1 << 32, 0xDEADBEEF << 32)
        return [call("ioctl", terminal, bits | 0x5412, ctypes.addressof(letter)) for bits in high]

    assert in_child(push) == ["EPERM"] * 3


def test_argument_rules() -> None:
    """personality, prctl, madvise and mknod are refused only in what is harmful."""

    def attempts() -> dict[str, str]:
        buffer = ctypes.create_string_buffer(16)
        return {
            "ask personality": call("personality", 0xFFFFFFFF),
            "executable data": call("personality", 0x0400000),
            "PR_GET_NAME": call("prctl", 16, ctypes.addressof(buffer)),
            "PR_SET_MM": call("prctl", 35, 14, 0, 0, 0),
            "PR_SCHED_CORE": call("prctl", 62, 1, 0, 0, 0),
            "future option": call("prctl", 1000),
            "MADV_MERGEABLE": call("madvise", 0, 0, 12),
            "MADV_DONTNEED": call("madvise", 0, 0, 4),
        }

    assert in_child(attempts) == {
        "ask personality": "ok",
        "executable data": "EPERM",
        "PR_GET_NAME": "ok",
        "PR_SET_MM": "EPERM",
        "PR_SCHED_CORE": "EPERM",
        "future option": "EINVAL",
        "MADV_MERGEABLE": "EINVAL",
        "MADV_DONTNEED": "ok",
    }


def test_mknod_makes_fifos_but_no_devices(tmp_path: Path) -> None:
    """Not even root gets a device node; package managers can do all they do."""

    def attempts() -> list[bool]:
        os.mknod(tmp_path / "file", stat.S_IFREG | 0o600)
        os.mkfifo(tmp_path / "fifo")
        for kind in (stat.S_IFCHR, stat.S_IFBLK):
            with pytest.raises(PermissionError):
                os.mknod(tmp_path / "device", kind | 0o666, os.makedev(1, 3))
        os.chown(tmp_path / "file", os.getuid(), os.getgid())
        os.chmod(tmp_path / "file", 0o4755)
        return [path.exists() for path in (tmp_path / "file", tmp_path / "fifo", tmp_path / "device")]

    assert in_child(attempts) == [True, True, False]


def test_ids_can_still_be_changed() -> None:
    """A guest's root becomes another user, with the groups of that user."""
    if os.getuid() != 0:
        pytest.skip("only root changes ids")

    def become() -> tuple[list[int], tuple[int, int, int]]:
        os.setgroups([4321])
        os.setresgid(4321, 4321, 4321)
        os.setresuid(4321, 4321, 4321)
        return os.getgroups(), os.getresuid()

    assert in_child(become) == ([4321], (4321, 4321, 4321))


def run_code(machine_code: bytes) -> int:
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(machine_code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


INT_80_GETPID = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # mov eax, 20; int 0x80; ret


@pytest.mark.skipif(MACHINE != "x86_64", reason="the other numbers of x86")
def test_int_80_kills() -> None:
    """A 32-bit call out of a 64-bit program ends the process, where the kernel knows such calls at all."""
    without = in_child(lambda: run_code(INT_80_GETPID) == os.getpid(), prepare=lambda: None)
    if without is not True:
        pytest.skip("this kernel has no 32-bit calls")
    assert in_child(lambda: run_code(INT_80_GETPID)) == signal.SIGSYS


@pytest.mark.skipif(MACHINE != "x86_64", reason="the other numbers of x86")
def test_x32_numbers_kill() -> None:
    """getpid by its x32 number ends the process."""
    assert in_child(lambda: libc.syscall(ctypes.c_long(0x40000000 | 39))) == signal.SIGSYS


def test_the_filter_cannot_be_taken_off() -> None:
    """A later filter that allows everything changes nothing, and exec keeps the first."""
    allow_all = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)

    def again() -> tuple[str, str]:
        seccomp.load(allow_all)
        code = "import ctypes; print(ctypes.CDLL(None).unshare(0))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return call("unshare", 0), done.stdout.strip()

    assert in_child(again) == ("EPERM", "-1")


def test_load_says_which_call_failed() -> None:
    """Without no_new_privs a plain user is refused; a program that is none is invalid."""

    def failure(program: bytes) -> tuple[int | None, list[str]]:
        try:
            seccomp.load(program)
        except OSError as error:
            return error.errno, error.__notes__
        return None, []

    def as_user() -> None:
        if os.getuid() == 0:
            os.setresuid(4321, 4321, 4321)

    code, notes = in_child(lambda: failure(PROGRAM), prepare=as_user)
    assert code == errno.EACCES
    assert any("PR_SET_SECCOMP" in note for note in notes)
    assert in_child(lambda: failure(b""))[0] == errno.EINVAL


# ---------------------------------------------------------------- programs

PYTHON = """
import asyncio, multiprocessing, os, resource, sqlite3, ssl, subprocess, tempfile, threading
async def serve():
    async def echo(reader, writer):
        writer.write(await reader.readline()); await writer.drain(); writer.close()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"echo\\n")
    assert await reader.readline() == b"echo\\n"
    writer.close(); server.close()
    child = await asyncio.create_subprocess_exec("echo", "child", stdout=asyncio.subprocess.PIPE)
    assert (await child.communicate())[0] == b"child\\n"
asyncio.run(serve())
ssl.create_default_context()
with tempfile.TemporaryDirectory() as folder:
    base = sqlite3.connect(os.path.join(folder, "base")); base.execute("pragma journal_mode=wal")
    base.execute("create table t(x)"); base.execute("insert into t values(1)"); base.commit(); base.close()
assert subprocess.run("echo a | tr a b", shell=True, capture_output=True).stdout == b"b\\n"
def double(number): return 2 * number
if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(double, range(4)) == [0, 2, 4, 6]
    print("alive")
"""

NODE = """
const { Worker } = require('worker_threads'), http = require('http'), fs = require('fs');
const wasm = new Uint8Array([0,97,115,109,1,0,0,0,1,7,1,96,2,127,127,1,127,3,2,1,0,7,7,1,3,97,100,100,0,0,
  10,9,1,7,0,32,0,32,1,106,11]);
const add = new WebAssembly.Instance(new WebAssembly.Module(wasm)).exports.add;
let sum = 0; for (let i = 0; i < 1e6; i++) sum = add(sum, 1);
if (sum !== 1e6) throw new Error('wasm');
const server = http.createServer((request, response) => response.end('served')).listen(0, '127.0.0.1', () =>
  http.get({ port: server.address().port, host: '127.0.0.1' }, (response) =>
    response.on('data', () => {
      const worker = new Worker("require('worker_threads').parentPort.postMessage(1)", { eval: true });
      worker.on('message', () => require('child_process').exec('echo child', (error, out) => {
        fs.promises.readFile('/proc/self/status')
          .then(() => { console.log('alive'); process.exit(error ? 1 : 0); });
      }));
    })));
"""

BASH = """
set -euo pipefail
seq 1000 | sort -rn | head -n 3 | while read -r line; do echo "$line"; done > sorted
diff <(echo 1000) <(head -n 1 sorted)
coproc cat; echo back >&"${COPROC[1]}"; read -r word <&"${COPROC[0]}"; test "$word" = back
sleep 100 & kill $!; wait $! || true
trap 'echo alive' EXIT
"""

GIT = """
set -eu
git init -q repository && cd repository
git config user.email a@example.org && git config user.name a
echo one > file && git add file && git commit -qm one
git checkout -qb branch && echo two >> file && git commit -qam two
git clone -q . ../clone && git -C ../clone log --oneline | wc -l | grep -q 2
git gc -q && echo alive
"""

MAKE = """
set -eu
cat > main.c << 'END'
#include <pthread.h>
#include <stdio.h>
static void *say(void *p) { puts("alive"); return p; }
int main(void) { pthread_t t; pthread_create(&t, 0, say, 0); return pthread_join(t, 0); }
END
printf 'main: main.c\\n\\t@gcc -O2 -pthread -o main main.c\\n' > Makefile
make -j2 && ./main
"""

PERL = """
use strict; use IO::Socket::INET; use POSIX;
my $server = IO::Socket::INET->new(Listen => 1, LocalAddr => '127.0.0.1') or die "listen: $!";
if (!fork) {
    my $client = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $server->sockport) or die;
    print $client "alive"; exit
}
my $line = readline $server->accept; wait; print $line;
"""

TMUX = """
set -eu
export TERM=xterm
printf 'tty > terminal; tmux -S socket wait-for -S told; sleep 100\\n' > inside
tmux -S socket -f /dev/null new-session -d -x 80 -y 24 'sh inside'
tmux -S socket wait-for told
grep -q /dev/pts terminal && tmux -S socket list-sessions > sessions && tmux -S socket kill-server
test -s sessions && echo alive
"""

VIM = "printf 'dead\\n' > file; vim -Nu NONE -es -c '%s/dead/alive/' -c wq file < /dev/null; cat file"

HTOP = """
export TERM=xterm HOME=$PWD
printf q | timeout 20 script -qec htop screen > /dev/null
grep -q Load screen && echo alive
"""

NPM = """
set -eu
export HOME=$PWD npm_config_offline=true npm_config_update_notifier=false npm_config_cache=$PWD/cache
npm init -y > /dev/null
npm pkg set scripts.test='node -e "console.log(\\"alive\\")"'
npm test --silent
"""

DPKG = """
set -eu
umask 022
mkdir -p package/DEBIAN package/usr/bin root/var/lib/dpkg/{updates,info,triggers}
cat > package/DEBIAN/control << 'END'
Package: alive
Version: 1
Architecture: all
Maintainer: a <a@example.org>
Description: a
END
printf '#!/bin/sh\\nid -u > /dev/null\\necho alive > "$DPKG_ROOT/told"\\n' > package/DEBIAN/postinst
chmod 755 package/DEBIAN/postinst
echo 'echo alive' > package/usr/bin/alive
touch root/var/lib/dpkg/status root/var/lib/dpkg/available
dpkg-deb --root-owner-group -b package alive.deb > /dev/null
dpkg --root="$PWD/root" --force-script-chrootless --log=/dev/null -i alive.deb > /dev/null
test "$(stat -c %u root/usr/bin/alive)" = 0
cat root/told
"""

PROGRAMS = {
    "bash": ["bash", "-c", BASH],
    "git": ["bash", "-c", GIT],
    "gcc": ["bash", "-c", MAKE],
    "make": ["bash", "-c", MAKE],
    "perl": ["perl", "-e", PERL],
    "node": ["node", "-e", NODE],
    "npm": ["bash", "-c", NPM],
    "tmux": ["bash", "-c", TMUX],
    "vim": ["bash", "-c", VIM],
    "htop": ["bash", "-c", HTOP],
}


def run_filtered(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        cwd=folder,
        preexec_fn=enter_filter,
        capture_output=True,
        text=True,
        timeout=50,
        stdin=subprocess.DEVNULL,
    )


def assert_alive(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.stdout.strip(), done.returncode) == ("alive", 0), done.stderr


def need(program: str) -> None:
    """Skip the test without `program`, or fail it where every test must run."""
    if shutil.which(program) is None:
        if os.environ.get("AGENTOS_TESTS_MUST_RUN"):
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_live_under_the_filter(program: str, tmp_path: Path) -> None:
    """What agents run all day works: it starts processes, threads, servers and compilers."""
    need(program)
    assert_alive(run_filtered(PROGRAMS[program], tmp_path))


def test_python_lives_under_the_filter(tmp_path: Path) -> None:
    """asyncio, ssl, sqlite, subprocess and multiprocessing."""
    script = tmp_path / "script.py"
    script.write_text(PYTHON)
    assert_alive(run_filtered([sys.executable, str(script)], tmp_path))


def test_dpkg_installs_a_package_under_the_filter(tmp_path: Path) -> None:
    """As root: unpacking, changing owners and running the package's script."""
    need("dpkg")
    if os.getuid() != 0:
        pytest.skip("dpkg wants root")
    assert_alive(run_filtered(["bash", "-c", DPKG], tmp_path))
