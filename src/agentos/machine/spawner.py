"""A spawner: a confined child of init that starts programs for one user of the VM, reaps and reports them.

It runs as that user with nothing of the user's code in it, and starts programs with posix_spawn(3), which
copies no memory. The one capability that it keeps lets it unshare a cgroup namespace before a program: that
changes nothing a program can see, but is inherited by all its descendants and can not be left without that
capability, which execve(2) takes away. So the namespace's inode number marks a lineage, through setsid and
double forks; it serves again when nothing is left that carries it. What outlives its
parent becomes the spawner's child (PR_SET_CHILD_SUBREAPER), not init's.

The guest's processes have the same user id and may kill or stop a spawner. The host then starts another, and
init inherits and reports what had been running.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Sequence
from typing import Any

from agentos.linux import privileges, pty, syscalls
from agentos.machine.channel import BlockingChannel, Message
from agentos.machine.confinement import SLICE_NS, Confinement
from agentos.machine.jobwire import JOURNAL_ENTRY, REPORT
from agentos.machine.lookup import find_program, is_wasm
from agentos.machine.reserve import Reserve

WASM_RUNNER = "/opt/agentos/bin/wasm"
SETTLE_MS = 2
"""After this the spawner does what can wait until a program has begun. Most commands have ended by then."""
_EVERY_SIGNAL = [*signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}]
_ENOEXEC, _EACCES = 8, 13
JOURNAL_FD = 4
"""A pipe that says of each job that it is about to start, and of a quiet one its pid.

The host reads it when it has to kill, or when this process has gone, and is not woken before.
"""


class _Failed(Exception):
    def __init__(self, step: str, error: OSError) -> None:
        self.step = step
        self.errno = error.errno or 0


def serve(
    channel: BlockingChannel, uid: int, confinement: Confinement, reserve: Reserve | None = None
) -> None:
    """The spawner's whole life, from the moment when it is confined. Ends with its channel."""
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    if reserve is not None:
        reserve.take_ids()
        Spawner(channel, reserve.start, slice_ns=None).run()
        return
    capabilities = privileges.CAP_SYS_ADMIN
    if uid == 0 and confinement.mode != "single":
        capabilities |= privileges.ROOT_CAPS
    confinement.take_ids(uid, capabilities=capabilities)
    Spawner(channel).run()


def _posix_spawn(path: str, argv: list[str], environment: dict[bytes, bytes], actions: list[Any]) -> int:
    # Signals by name: otherwise the C library asks for the disposition of each before it sets that.
    return os.posix_spawn(
        path, argv, environment, file_actions=actions, setsid=True, setsigmask=(), setsigdef=_EVERY_SIGNAL
    )


def end_of(status: int, usage: Any) -> list[int]:
    """How a program ended, for the host: status as waitpid(2) has it, CPU time in microseconds, greatest RSS in KiB."""
    return [status, int((usage.ru_utime + usage.ru_stime) * 1_000_000), usage.ru_maxrss]


Execute = Callable[[str, list[str], dict[bytes, bytes], list[Any]], int]
"""Starts a program in a session of its own: path, argv, environment and file actions, as os.posix_spawn has them."""


class Spawner:
    """The loop of a spawner. It waits for the host and for the ends of its children.

    Programs get time slices of `slice_ns`; None where `execute` sees to that.
    """

    def __init__(
        self, channel: BlockingChannel, execute: Execute = _posix_spawn, slice_ns: int | None = SLICE_NS
    ) -> None:
        self.channel = channel
        self.execute = execute
        self.slice_ns = slice_ns
        self.nice = max(os.getpriority(os.PRIO_PROCESS, 0), 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        self.ends_fd = syscalls.signalfd(signal.SIGCHLD)
        self.env: dict[bytes, bytes] = {}
        """Of the latest job: the host does not send it again while it stays the same."""
        self.jobs: dict[int, int] = {}
        """pid of a program that was started -> number of its job."""
        self.fresh = 0
        """pid of the latest program, until it has ended or is settled."""
        self.untold = -1
        """Number of the latest job, if the host was not told yet that it runs: of a quiet one, only once settled."""
        self.watched = False
        self.mark, self.mark_fd = _new_mark()
        self.mark_is_used = False
        self.bare = 0
        """The last job that has left nothing behind: its mark is carried by nobody."""
        self.marks: dict[int, int] = {}
        """Number of a job -> descriptor of its namespace. Held until the host will name that mark no more: a
        number that is free is given to the next namespace, and a late kill would hit another command."""
        self.null_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.children_fd = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)

    def run(self) -> None:
        """Serve until the channel ends; what still runs then goes to init."""
        ends_fd = self.ends_fd
        poll = select.poll()
        # Ends first: of what has ended, nobody need be told that it had started.
        poll.register(ends_fd, select.POLLIN)
        poll.register(self.channel.fileno(), select.POLLIN)
        while True:
            ready = poll.poll(SETTLE_MS if self.fresh else None)
            if not ready:
                self.settle()
            for fd, _ in ready:
                if fd == ends_fd:
                    os.read(ends_fd, 4096)
                    self.reap()
                else:
                    for message, fds in self.channel.receive_some():
                        self.handle(message, fds)

    def handle(self, message: Message, fds: list[int]) -> None:
        """A job, a signal to a program of a job, or the wish to hear of the ends of orphans."""
        if "job" in message:
            if self.fresh:
                self.settle()
            for number in message.get("forget", ()):
                self.forget(number)
            if self.mark_is_used:
                self.prepare()
            self.start(message, fds)
        elif "signal" in message:
            pid = int(message["pid"])
            if pid in self.jobs:
                _kill(pid, int(message["signal"]), group=bool(message["group"]))
        elif "tell" in message:
            # Jobs come in order: if that one runs and nothing was said of it, then it is the latest.
            if self.fresh:
                self.settle()
        elif self.are_strangers(os.pread(self.children_fd, 65536, 0)):
            self.watched = True
        else:
            self.channel.send({"reaped": 0})

    def start(self, job: Message, fds: list[int]) -> None:
        """Start one program; the answer is its pid and mark, or the step and errno that failed."""
        number = job["job"]
        if "env" in job:
            self.env = {os.fsencode(name): os.fsencode(value) for name, value in job["env"].items()}
        master = -1
        try:
            if "pty" in job:
                master, actions = _open_terminal(*job["pty"])
            else:
                actions = self.redirections(fds)
            # Before it can do anything, such as kill this process: no job is ever started a second time.
            self.note(number, 0)
            pid = _spawn(job, self.env, actions, self.execute)
        except _Failed as failed:
            os.chdir("/")
            self.channel.send({"failed": number, "errno": failed.errno, "step": failed.step})
        else:
            self.jobs[pid] = number
            self.fresh = pid
            self.untold = number
            self.marks[number] = self.mark_fd
            self.mark_is_used = True
            # Before its end is told: whoever reads the other ends then is to find no writer here.
            while fds:
                os.close(fds.pop())
            if "quiet" not in job:
                self.tell([master] if master >= 0 else ())
                self.set_slice(pid)
                return
            # This process stood still until the child, mostly on the same CPU, had executed the program: a short one
            # has ended by now, and what follows would only hold its report up.
            self.reap_early()
            if pid in self.jobs:
                self.note(number, pid)
                self.set_slice(pid)
        finally:
            for fd in (*fds, *([master] if master >= 0 else ())):
                os.close(fd)

    def redirections(self, fds: list[int]) -> list[Any]:
        """stdin (or nothing), stdout and stderr. Every other descriptor here is close-on-exec."""
        stdin = self.null_fd if len(fds) == 2 else fds[0]
        dup2 = os.POSIX_SPAWN_DUP2
        return [(dup2, stdin, 0), (dup2, fds[-2], 1), (dup2, fds[-1], 2)]

    def tell(self, fds: Sequence[int] = ()) -> None:
        """Tell the host of the latest program, where that was not done yet."""
        if self.untold >= 0:
            started: Message = {"started": self.untold, "pid": self.fresh, "mark": self.mark}
            self.untold = -1
            self.channel.send(started, fds)

    def settle(self) -> None:
        """The latest program goes on running: do what would have delayed its start."""
        self.tell()
        self.fresh = 0
        os.chdir("/")
        # Now, since nothing waits for it: the next job may come while these run.
        if self.mark_is_used:
            self.prepare()

    def prepare(self) -> None:
        """Take a mark for the next job that no process carries yet."""
        self.mark, self.mark_fd = _new_mark()
        self.mark_is_used = False

    def note(self, number: int, pid: int) -> None:
        """Write an entry of the journal."""
        entry = JOURNAL_ENTRY.pack(number, pid, self.mark)
        while True:
            try:
                os.write(JOURNAL_FD, entry)
                return
            except BlockingIOError:
                # As small as a page where the host has many pipes.
                self.channel.send({"journal": "full"})
                room = select.poll()
                room.register(JOURNAL_FD, select.POLLOUT)
                room.poll()

    def forget(self, number: int) -> None:
        """The host will not name this job's mark any more."""
        mark_fd = self.marks.pop(number, -1)
        if mark_fd == self.mark_fd and number == self.bare:
            self.mark_is_used = False
        elif mark_fd >= 0:
            os.close(mark_fd)

    def set_slice(self, pid: int) -> None:
        """Have a program that goes on running take turns with all others often."""
        if self.slice_ns is not None:
            with contextlib.suppress(OSError):  # it has ended already
                syscalls.sched_setattr(pid, slice_ns=self.slice_ns, nice=self.nice, reset_on_fork=True)

    def reap(self) -> None:
        """Collect every child that has ended, and report those that a job began."""
        try:
            self.collect(os.wait4(-1, os.WNOHANG))
        except ChildProcessError:
            return  # told of before

    def reap_early(self) -> None:
        """As `reap`, right after a child was started, and before the loop is told."""
        one = os.wait4(-1, os.WNOHANG)
        if one[0]:
            # The signals so far need not wake the loop, since all who sent them are collected after this.
            try:
                os.read(self.ends_fd, 4096)
            except BlockingIOError:
                pass
            self.collect(one)

    def collect(self, one: tuple[int, int, Any]) -> None:
        """Report `one`, as wait4(2) gives it, and all others that have ended. No effect where it is nobody."""
        ended = []
        others = b""
        while one[0]:
            ended.append((self.jobs.pop(one[0], None), *one))
            others = os.pread(self.children_fd, 65536, 0)
            if not others:
                break
            one = os.wait4(-1, os.WNOHANG)
        for number, pid, status, usage in ended:
            if number is not None:
                strangers = bool(others) and self.are_strangers(others)
                self.report(number, pid, status, usage, strangers=strangers)
            elif self.watched:
                self.watched = False
                self.channel.send({"reaped": pid})

    def report(self, number: int, pid: int, status: int, usage: Any, *, strangers: bool) -> None:
        """Tell the host that a job's program has ended, and whether there is anything that may be of its lineage."""
        if pid == self.fresh:
            if strangers:
                # The host will ask for the lineage, by the mark that is said here.
                self.tell()
            self.fresh = 0
            self.untold = -1
        if not strangers:
            self.bare = number
        self.channel.send_packed(REPORT.pack(number, *end_of(status, usage), strangers, full_disk()))

    def are_strangers(self, children: bytes) -> bool:
        """Whether one of these is none that a job began: whoever outlived its parent."""
        pids = children.split()
        return len(pids) > len(self.jobs) or any(int(pid) not in self.jobs for pid in pids)


def full_disk() -> int:
    """Index in jobwire.FULL_DISK, by the kernel's count; 0 where there is room."""
    counts = os.statvfs("/")
    if counts.f_bavail == 0:
        return 1
    return 2 if counts.f_files and counts.f_favail == 0 else 0


def _kill(pid: int, number: int, *, group: bool) -> None:
    try:
        (os.killpg if group else os.kill)(pid, number)
    except ProcessLookupError:
        pass


def _new_mark() -> tuple[int, int]:
    """Enter a new cgroup namespace, rooted where the old one is: its inode number, and a descriptor that keeps it."""
    syscalls.unshare(syscalls.CLONE_NEWCGROUP)
    fd = os.open("/proc/self/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    return os.fstat(fd).st_ino, fd


def _spawn(job: Message, environment: dict[bytes, bytes], actions: list[Any], execute: Execute) -> int:
    argv = job["argv"]
    try:
        # Not the caller's cwd but this process's: posix_spawn(3) as Python has it knows no other way.
        os.chdir(job["cwd"])
    except OSError as error:
        raise _Failed("chdir", error) from error
    try:
        path, as_bash = job["path"], job["as_bash"]
        if path is None:
            places = environment.get(b"PATH")
            path = find_program(
                argv[0], os.defpath if places is None else os.fsdecode(places), directories=as_bash
            )
        if as_bash:
            added = {b"PWD": os.getcwdb(), b"SHLVL": b"0", b"_": os.fsencode(path)}
            # If that fails, bash is to say what it makes of it.
            return execute(path, argv, {**environment, **added}, actions)
        try:
            return execute(path, argv, environment, actions)
        except OSError as error:
            # ENOEXEC: this kernel hands no .wasm to the runner by itself; EACCES: the module lacks the execute bit.
            if error.errno not in (_ENOEXEC, _EACCES) or not is_wasm(path):
                raise
            return execute(WASM_RUNNER, [WASM_RUNNER, path, *argv[1:]], environment, actions)
    except OSError as error:
        raise _Failed("exec", error) from error


def _open_terminal(rows: int, cols: int) -> tuple[int, list[Any]]:
    try:
        master = pty.open_master()
        try:
            pty.set_size(master, rows, cols)
            # The leader of a session without a terminal gets the first one that it opens, credentials(7).
            slave = (os.POSIX_SPAWN_OPEN, 0, pty.slave_path(master), os.O_RDWR, 0)
        except OSError:
            os.close(master)
            raise
    except OSError as error:
        raise _Failed("pty", error) from error
    return master, [slave, (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
