"""A launcher: a child of init that waits for one job, gives up its privileges and becomes that job.

Forking is the slow part of starting a program, and it needs no knowledge of the program. So init forks a
launcher ahead of need; the host sends the job straight to it, with the descriptors for stdio. Until then
it holds nothing but its socket. A job is one of

- `exec`: become a program, with pipes or a new pty for its stdio;
- `files`: stay, and serve the file actions over the socket;
- `connect`: connect to a TCP port inside the VM, hand the socket to the host, and end.

The answer is an error (`{"error": errno, "step": ...}`), a pty's master or a socket with the descriptor
attached, or just the end of the stream, which close-on-exec gives when a program has taken over.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from typing import Any, NoReturn

from agentos.linux import privileges, pty, seccomp, syscalls
from agentos.machine import fileserver
from agentos.machine.channel import BlockingChannel, ChannelBroken, Message

WASM_RUNNER = "/opt/agentos/bin/wasm"
LINEAGE_BASE = 1 << 40
"""RLIMIT_RTTIME values from here on mark which launch a process descends from."""


class Confinement:
    """What every launcher of a VM is bound by, decided once by init."""

    def __init__(self, mode: str, last_cap: int, filter_program: bytes) -> None:
        self.mode = mode
        self.last_cap = last_cap
        self.filter_program = filter_program

    def apply(self, mark: int, *, fake_root: bool) -> None:
        """All that does not depend on the job: run right after the fork, ahead of need."""
        if fake_root:
            self._become_namespace_root()
        privileges.drop_bounding(self.last_cap, keep=privileges.ROOT_CAPS)
        privileges.set_no_new_privs()
        privileges.set_undumpable()
        # No process can raise a hard limit, and the filter forbids to set this one at all: every descendant
        # carries the mark, through setsid, double forks and execs. Nothing here runs real-time, so it limits nothing.
        resource.setrlimit(resource.RLIMIT_RTTIME, (LINEAGE_BASE + mark, LINEAGE_BASE + mark))
        seccomp.load(self.filter_program)

    def _become_namespace_root(self) -> None:
        """With a single mapped id there is no uid 0: one more user namespace shows this process tree a root."""
        uid, gid = os.getuid(), os.getgid()
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        for name, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, content.encode())
            finally:
                os.close(fd)


class JobFailed(Exception):
    """A step of a job failed: reported to the host, and the launcher ends."""

    def __init__(self, step: str, error: OSError) -> None:
        super().__init__(step)
        self.step = step
        self.errno = error.errno or 0


def run(sock: socket.socket, mark: int, confinement: Confinement, *, fake_root: bool) -> int:
    """The launcher's whole life, in the forked child. Returns the exit code where nothing was exec'd."""
    channel = BlockingChannel(sock)
    try:
        try:
            confinement.apply(mark, fake_root=fake_root)
        except OSError as error:
            raise JobFailed("confine", error) from error
        job, fds = channel.receive()
        code: int = _JOBS[job["kind"]](channel, job, fds, confinement.mode)
        return code
    except JobFailed as failure:
        channel.send({"error": failure.errno, "step": failure.step})
        return 127
    except ChannelBroken:
        return 126
    except Exception as error:  # a defect of ours: the host must hear of it, or its caller would wait in vain
        channel.send({"error": 0, "step": f"launcher: {error!r}"[:200]})
        return 126


def _take_ids(job: Message, mode: str, *, keep_root: bool = False) -> None:
    uid = int(job["uid"])
    try:
        if mode == "single":
            syscalls.capset(0, 0)
        elif keep_root:
            # uid 0 without a capability, with the user's file system ids: the VM's user can not signal it.
            os.setgroups([])
            syscalls.setfsgid(uid)
            syscalls.setfsuid(uid)
            syscalls.capset(0, 0)
        else:
            capabilities = privileges.ROOT_CAPS if uid == 0 else 0
            if not capabilities:
                privileges.drop_root_caps()
            privileges.become(uid, uid, capabilities=capabilities, set_groups=True)
    except OSError as error:
        raise JobFailed("ids", error) from error


def _exec(channel: BlockingChannel, job: Message, fds: list[int], mode: str) -> int:
    _take_ids(job, mode)
    privileges.set_undumpable()
    os.umask(0o022)
    cwd = job["cwd"]
    try:
        os.chdir(cwd)
    except OSError as error:
        raise JobFailed("chdir", error) from error
    if job.get("pty"):
        _open_terminal(channel, *job["pty"])
    else:
        _redirect(fds, stdin=bool(job.get("stdin")))
    environment = dict(job["env"])
    try:
        _become_program(job["argv"], environment, cwd)
    except OSError as error:
        raise JobFailed("exec", error) from error


def _open_terminal(channel: BlockingChannel, rows: int, cols: int) -> None:
    try:
        master, slave = pty.open_pair()
        pty.set_size(master, rows, cols)
        channel.send({"pty": True}, [master])
        os.close(master)
        pty.make_controlling(slave)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
    except OSError as error:
        raise JobFailed("pty", error) from error


def _redirect(fds: list[int], *, stdin: bool) -> None:
    try:
        source = fds.pop(0) if stdin else os.open("/dev/null", os.O_RDONLY)
        for target, fd in enumerate((source, fds[0], fds[1])):
            os.dup2(fd, target)
    except (OSError, IndexError) as error:
        raise JobFailed("stdio", error if isinstance(error, OSError) else OSError(22, "stdio")) from error


def _become_program(argv: list[str], env: dict[str, str], cwd: str) -> NoReturn:
    """execve(2) of argv[0], looked up as execvp(3) does. Returns only by raising OSError."""
    path = _find_program(argv[0], env.get("PATH", os.defpath))
    try:
        os.execve(path, argv, env)
    except OSError as error:
        # ENOEXEC: this kernel hands no .wasm to the runner by itself; EACCES: the module lacks the execute bit.
        if error.errno not in (8, 13) or not _is_wasm(path):
            raise
        os.execve(WASM_RUNNER, [WASM_RUNNER, path, *argv[1:]], env)


def _find_program(name: str, path: str) -> str:
    if "/" in name:
        return name
    denied = False
    for directory in path.split(":"):
        candidate = f"{directory or '.'}/{name}"
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            denied = True
    if name.endswith(".wasm") and os.path.isfile(name):
        return f"./{name}"
    raise (
        PermissionError(13, "Permission denied", name)
        if denied
        else FileNotFoundError(2, "No such file", name)
    )


def _is_wasm(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.read(fd, 4) == b"\0asm"
    except OSError:
        return False
    finally:
        os.close(fd)


def _files(channel: BlockingChannel, job: Message, fds: list[int], mode: str) -> int:
    _take_ids(job, mode, keep_root=True)
    privileges.set_undumpable()
    os.umask(0o022)
    fileserver.serve(channel.sock.fileno())
    return 0


def _connect(channel: BlockingChannel, job: Message, fds: list[int], mode: str) -> int:
    _take_ids(job, mode)
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.connect((address, int(job["port"])))
            except OSError as error:
                failure = error
                continue
            channel.send({"connected": True}, [sock.fileno()])
            return 0
    raise JobFailed("connect", failure)


_JOBS: dict[str, Any] = {"exec": _exec, "files": _files, "connect": _connect}


def fork_launcher(sock: socket.socket, mark: int, confinement: Confinement, *, fake_root: bool) -> int:
    """Fork a launcher that listens on `sock` (closed here). Returns its pid."""
    pid = os.fork()
    if pid:
        sock.close()
        return pid
    code = 125
    try:
        _forget_init(sock)
        code = run(socket.socket(fileno=3), mark, confinement, fake_root=fake_root)
    finally:
        os._exit(code)


def _forget_init(sock: socket.socket) -> None:
    """In the child: a session of its own, signals as a program expects them, no descriptor but the socket, at 3."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    privileges.default_signals()
    if sock.fileno() != 3:
        os.dup2(sock.detach(), 3, inheritable=False)
    else:
        sock.detach()
    os.closerange(4, 1 << 20)
