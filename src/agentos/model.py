"""Frozen values that every layer shares: what a VM is made from, and what it answers.

Times are seconds (float), sizes are bytes. Field names are the wire's names in snake_case;
`actions` turns them into camelCase. Nothing here does anything: validation lives in `__post_init__`
and raises InvalidRequest, so that a wrong value never travels further than its constructor.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NewType, cast

from agentos.errors import AgentOSError, CommandFailed, InvalidRequest, IsolationUnavailable
from agentos.network.rules import Network
from agentos.printing import last_lines

HostPid = NewType("HostPid", int)
"""A pid as the host sees it. It never leaves the host; a plain `pid` is always the one inside the VM."""

MIB = 1024 * 1024
GIB = 1024 * MIB

StreamName = Literal["stdout", "stderr"]
Reason = Literal[
    "exited",
    "signaled",
    "timeout",
    "idleTimeout",
    "cpuTimeout",
    "oom",
    "outputLimit",
    "diskLimit",
    "vmStopped",
]
Driver = str
OnLeaderExit = Literal["drain", "wait", "kill"]
Encoding = Literal["utf8", "bytes"]

_STDERR_SHOWN = 2000
"""Characters of a failed command's stderr in the error's message, from its end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one VM may use. Each limit is named in the error that it causes.

    The first group is enforced by the kernel, the second by agentos.
    """

    memory_bytes: int = 1 * GIB
    """Memory of all the VM's processes together (cgroup; without one: RLIMIT_DATA for each process)."""
    processes: int = 512
    """Processes and threads alive at once in the VM, for each of its users (RLIMIT_NPROC in the user namespace), and
    a few more for both together (cgroup pids). Commands that the API starts have a small reserve beyond it."""
    cpu_cores: float | None = None
    """Cores' worth of CPU time, such as 0.5; None: only cpu_weight decides."""
    cpu_weight: int = 100
    """Share of the CPU against other VMs under contention (1 to 10000, as cgroup v2's cpu.weight)."""
    open_files: int = 4096
    """Descriptors of one process (RLIMIT_NOFILE)."""
    disk_bytes: int = 1 * GIB
    """Bytes in all the files that the VM wrote."""
    disk_files: int = 262_144
    """Files, directories and links that the VM made."""
    shm_bytes: int = 64 * MIB
    """Bytes in /dev/shm."""
    terminals: int = 256
    """Pseudoterminals open at once in the VM, shells included. The kernel has a few thousand for the whole machine
    (kernel.pty.max)."""

    log_bytes: int = 4 * MIB
    """Newest output retained for replay, for each spawned process."""
    scrollback_bytes: int = 1 * MIB
    """Newest output retained for replay, for each shell."""
    output_bytes: int = 16 * MIB
    """Captured bytes of each stream of one exec (the default and the greatest max_output_bytes)."""
    runaway_bytes: int = 64 * GIB
    """Bytes that one exec may write in all, captured or not, before it is stopped (reason outputLimit)."""
    live_processes: int = 256
    """Processes started with spawn or exec that run at once."""
    exited_processes: int = 256
    """Exited spawned processes that are remembered, oldest forgotten first."""
    exited_log_bytes: int = 16 * MIB
    """Output of exited spawned processes that is kept for replay, of all together; that of the oldest goes first.
    Of one that is lossless it is what was read: the rest is lossless_bytes'."""
    lossless_bytes: int = 32 * MIB
    """Output of lossless processes that nobody has read, of all together. Beyond it nothing is lost: each that runs
    waits for its reader once 64 KiB are unread, instead of log_bytes."""
    shells: int = 64
    """Shells open at once."""
    exited_shells: int = 64
    """Ended shells that are remembered."""
    argument_bytes: int = 512 * 1024
    """Command, arguments and environment of one process, together."""
    stdin_bytes: int = 4 * MIB
    """Bytes accepted for one process's stdin, or one shell's, and not yet taken by it: a write beyond waits."""
    file_bytes: int = 256 * MIB
    """Bytes that one read_file or write_file holds in memory (read_file_stream and write_file_stream: no bound)."""
    network_connections: int = 256
    """Connections out of the VM at once; further ones wait."""
    background_pipes: int = 64
    """Output pipes kept drained for background children that outlived their exec."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, name = getattr(self, one.name), f"limits.{one.name}"
            if one.name == "cpu_cores":
                if value is not None and (
                    isinstance(value, bool)
                    or not isinstance(value, int | float)
                    or not 0.01 <= value <= 10_000
                ):
                    raise InvalidRequest.argument(name, value, "a number from 0.01 to 10000, or None")
                continue
            least, most = _BOUNDS.get(one.name, (1, _MOST))
            check_count(name, value, least=least, most=most)


_MOST = 2**60
"""The greatest limit: some are added up, and the kernel counts to 2**63."""
_BOUNDS = {
    "processes": (1, 2**22),  # PID_MAX_LIMIT
    "cpu_weight": (1, 10_000),
    "open_files": (16, _MOST),  # with less a VM's own servants cannot work
    "terminals": (1, 2**20),  # NR_UNIX98_PTY_MAX
}
"""Least and greatest, where a VM could not be made otherwise."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of the host that a VM sees. Read-only unless said otherwise.

    As root, owners are the same inside as outside: what uid 1000 has on the host is the user agentos's in the VM, and
    what root has is root's.
    """

    host_path: str
    guest_path: str
    read_only: bool = True

    def __post_init__(self) -> None:
        for name in ("host_path", "guest_path"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
                raise InvalidRequest.argument(f"mount.{name}", value, "an absolute path")
        check_flag("mount.read_only", self.read_only)
        if ".." in self.guest_path.split("/"):
            raise InvalidRequest.argument("mount.guest_path", self.guest_path, "a path without ..")
        # As one directory has many paths, the one that is looked at here is the one that is mounted on.
        object.__setattr__(self, "guest_path", "/" + posixpath.normpath(self.guest_path).lstrip("/"))
        if self.guest_path.rstrip("/") in ("", "/proc", "/dev", "/sys") or self.guest_path.startswith(
            ("/proc/", "/dev/", "/sys/")
        ):
            raise InvalidRequest.argument(
                "mount.guest_path", self.guest_path, "a path outside /proc, /dev and /sys"
            )


ISOLATION = ("namespaces",)
"""Tiers that this version builds, weakest first."""
_TIERS_TO_COME = {
    "gvisor": "this version has no tier with a kernel in user space",
    "microvm": "this version has no tier with a hardware virtual machine for each VM",
}


@dataclass(frozen=True, slots=True)
class VmSpec:
    """All that decides what a VM is like. Two VMs of an equal spec differ only in what happens in them."""

    limits: Limits = field(default_factory=Limits)
    hostname: str = "agentos"
    user: str = "agentos"
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    network: Network = field(default_factory=Network)
    """What the VM may reach beyond itself; "none", "host-egress" or a list of texts will do: see Network."""
    image: str | None = None
    """Directory of the host with an unpacked root file system that the VM starts from; None: the host's software."""
    storage: str | None = None
    """Directory of the host that holds all the VM writes, and outlives it; None: memory, which does not.

    It is made if it does not exist. As root it holds a disk image, so that disk_bytes and disk_files are exact, as they
    are in memory; the image keeps the size that it was made with. Otherwise the directory holds the files themselves.
    """
    isolation: str = "namespaces"
    """The tier that keeps the VM apart, one of ISOLATION. A stronger one that is asked for and not to be had is an
    error (IsolationUnavailable) here, never replaced by a weaker one."""

    def __post_init__(self) -> None:
        if not isinstance(self.limits, Limits):
            raise InvalidRequest.argument("limits", self.limits, "a Limits")
        for index, mount in enumerate(self.mounts):
            if not isinstance(mount, Mount):
                raise InvalidRequest.argument(f"mounts[{index}]", mount, "a Mount")
        name = self.hostname
        if (
            not isinstance(name, str)
            or not 0 < len(name) <= 64
            or not all(c.isascii() and (c.isalnum() or c in "-.") for c in name)
        ):
            raise InvalidRequest.argument("hostname", name, "1 to 64 letters, digits, dots or hyphens")
        if self.user not in ("agentos", "root"):
            raise InvalidRequest.argument("user", self.user, "agentos or root")
        for name, path in (("image", self.image), ("storage", self.storage)):
            if path is not None and (not isinstance(path, str) or not path.startswith("/") or "\0" in path):
                raise InvalidRequest.argument(name, path, "an absolute path, or None")
        object.__setattr__(self, "network", Network.of(self.network))
        if isinstance(self.isolation, str) and self.isolation in _TIERS_TO_COME:
            raise IsolationUnavailable.of(self.isolation, _TIERS_TO_COME[self.isolation], list(ISOLATION))
        if self.isolation not in ISOLATION:
            raise InvalidRequest.argument("isolation", self.isolation, f"one of {', '.join(ISOLATION)}")
        check_env(self.env)


def check_text(name: str, value: object, *, empty: bool = True) -> str:
    """`value` as text that can be handed to the kernel. Raises InvalidRequest naming argument `name`."""
    if not isinstance(value, str):
        raise InvalidRequest.argument(name, value, "text")
    if "\0" in value:
        raise InvalidRequest.argument(name, value, "text without NUL")
    if not empty and not value:
        raise InvalidRequest.argument(name, value, "text that is not empty")
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidRequest.argument(name, value, "text that UTF-8 can hold") from None
    return value


def _is_plain(value: object) -> bool:
    """Whether there is nothing to check, which is so for most texts, and found out in less time."""
    return type(value) is str and value.isascii() and "\0" not in value


def check_texts(name: str, values: Sequence[object]) -> list[str]:
    """`values` as a list of what `check_text` takes. Raises InvalidRequest naming the first that is not."""
    texts = list(values)
    try:
        together = "".join(texts)  # type: ignore[arg-type]  # what is no text is found here, or below by name
        together.encode("utf-8", "surrogateescape")
    except (TypeError, UnicodeEncodeError):
        together = "\0"
    if "\0" in together:
        for index, one in enumerate(texts):
            if not _is_plain(one):
                check_text(f"{name}[{index}]", one)
    return cast(list[str], texts)


def check_env(env: object, name: str = "env") -> dict[str, str]:
    """`env` as a mapping of text to text. Raises InvalidRequest naming the variable that is not."""
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise InvalidRequest.argument(name, env, "a mapping of text to text")
    for key, value in env.items():
        if not isinstance(key, str) or not key or "=" in key:
            raise InvalidRequest.argument(f"{name} variable", key, "a name that is text without =")
        if not _is_plain(key):
            check_text(f"{name} variable", key)
        if not _is_plain(value):
            check_text(f"{name}[{key!r}]", value)
    return dict(env)


def check_data(name: str, data: object) -> bytes:
    """`data` as bytes; text as UTF-8. Raises InvalidRequest naming argument `name`."""
    if isinstance(data, str):
        try:
            return data.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise InvalidRequest.argument(name, data, "text that UTF-8 can hold") from None
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    raise InvalidRequest.argument(name, data, "text or bytes")


def check_count(name: str, value: object, *, least: int = 0, most: int = 2**63 - 1) -> int:
    """`value` as a whole number from `least` to `most`. Raises InvalidRequest naming argument `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f"from {least} to {most}" if most < 2**63 - 1 else f"of at least {least}"
        raise InvalidRequest.argument(name, value, f"a whole number {limit}")
    return value


def check_flag(name: str, value: object) -> bool:
    """`value` as a bool, and nothing that only counts as one. Raises InvalidRequest naming argument `name`."""
    if not isinstance(value, bool):
        raise InvalidRequest.argument(name, value, "True or False")
    return value


def check_seconds(name: str, value: object) -> float | None:
    """`value` as a time limit in seconds, None for none. Raises InvalidRequest naming argument `name`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise InvalidRequest.argument(name, value, "seconds, 0 or more, or None")
    return float(value)


def check_moment(name: str, value: object) -> float | None:
    """`value` as seconds since the epoch, None for none. Raises InvalidRequest naming argument `name`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise InvalidRequest.argument(name, value, "seconds since the epoch, or None")
    return float(value)


@dataclass(frozen=True, slots=True)
class TermSize:
    """A terminal's size in character cells."""

    cols: int = 80
    rows: int = 24

    def __post_init__(self) -> None:
        check_count("cols", self.cols, least=1, most=4096)
        check_count("rows", self.rows, least=1, most=4096)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and the children it waited for have used, as the kernel accounts it (getrusage(2))."""

    cpu_ms: float = 0.0
    max_rss_bytes: int = 0
    """Greatest resident size of any one of them; its floor is that of the spawner that started it."""


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended. `exit_code` is 128 + n where signal n ended it."""

    exit_code: int
    signal: str | None = None
    reason: Reason = "exited"
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class LimitReached:
    """A VM has come to one of its limits: the field of Limits, its value, and how to raise it.

    `pid` and `command` are of the program that ran into it, where that is known to have been one that the API
    started.
    """

    limit: str
    value: int
    message: str
    pid: int | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Orphan:
    """A process that outlived the leader of an exec."""

    pid: int
    command: str


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command did. `stdout` and `stderr` are str, or bytes with encoding="bytes"."""

    exit_code: int
    stdout: Any
    stderr: Any
    signal: str | None = None
    reason: Reason = "exited"
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    duration_ms: float = 0.0
    usage: Usage = field(default_factory=Usage)
    orphans: tuple[Orphan, ...] = ()
    limit: str | None = None
    """The field of Limits that ended it: memory_bytes with reason oom, runaway_bytes with outputLimit, disk_bytes or
    disk_files with diskLimit."""

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.exit_code == 0 and self.reason == "exited"

    def check(self) -> ExecResult:
        """This result, or CommandFailed where it is not ok: its message ends with the end of stderr.

        Everything is in the error's details.
        """
        if self.ok:
            return self
        why = f"exit code {self.exit_code}" if self.reason == "exited" else self.reason
        if self.reason == "signaled" and self.signal:
            why = f"killed by {self.signal}"
        stderr = _as_text(self.stderr)
        said = last_lines(stderr, _STDERR_SHOWN)
        if said:
            why += ("; stderr:\n" if "\n" in said else "; stderr: ") + said
        raise CommandFailed(
            f"command failed: {why}",
            exitCode=self.exit_code,
            reason=self.reason,
            signal=self.signal,
            stdout=_as_text(self.stdout),
            stderr=stderr,
        )


def _as_text(data: str | bytes) -> str:
    return data if isinstance(data, str) else data.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """Consecutive bytes of one stream. `offset` is the position of the first of them in that stream."""

    stream: StreamName
    data: bytes
    offset: int
    skipped: int = 0
    """Bytes of all streams that were dropped from the log just before this reader came to them: never silent."""


@dataclass(frozen=True, slots=True)
class OutputPage:
    """One answer of a log: what follows the cursor that was asked for.

    `cursor` continues after it. `truncated` says that the asked cursor lay before the oldest byte
    retained; `skipped` bytes are missing then. `exited` says that nothing will follow.
    """

    events: tuple[OutputChunk, ...]
    cursor: int
    truncated: bool = False
    skipped: int = 0
    exited: bool = False


@dataclass(frozen=True, slots=True)
class SpawnedProcess:
    """A process started through the API, running or exited. Times are seconds since the epoch."""

    pid: int
    command: str
    args: tuple[str, ...]
    running: bool
    exit_code: int | None
    signal: str | None
    reason: Reason | None
    start_time: float
    exit_time: float | None
    usage: Usage | None = None
    """What it has used, once it has exited."""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A process of the VM, whoever started it, as the VM's own /proc shows it."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    driver: Driver
    command: str
    args: tuple[str, ...]
    cwd: str | None
    status: Literal["running", "exited"]
    exit_code: int | None
    start_time: float
    exit_time: float | None
    user: str
    state: str
    """The kernel's letter: R running, S sleeping, D in uninterruptible sleep, T stopped, Z zombie."""
    cpu_ms: float
    rss_bytes: int
    threads: int
    managed: bool = False
    shell_id: str | None = None


@dataclass(frozen=True, slots=True)
class ProcessTreeNode:
    """A process and, under it, those that it is the parent of."""

    process: ProcessInfo
    children: tuple[ProcessTreeNode, ...] = ()


@dataclass(frozen=True, slots=True)
class ShellInfo:
    """A shell, running or ended."""

    shell_id: str
    pid: int
    command: str
    args: tuple[str, ...]
    cols: int
    rows: int
    running: bool
    exit_code: int | None
    start_time: float


@dataclass(frozen=True, slots=True)
class FileStat:
    """What stat(2) says of a path in the VM, the last symlink not followed."""

    path: str
    type: Literal["file", "directory", "symlink", "fifo", "socket", "block", "char"]
    size: int
    mode: int
    uid: int
    gid: int
    mtime: float
    target: str | None = None
    """Where a symlink points, as text."""

    @property
    def is_directory(self) -> bool:
        return self.type == "directory"


@dataclass(frozen=True, slots=True)
class DirEntry:
    """One name in a directory."""

    name: str
    path: str
    type: Literal["file", "directory", "symlink", "fifo", "socket", "block", "char"]
    size: int


@dataclass(frozen=True, slots=True)
class FileContent:
    """What reading one of several files gave: `content`, or the `error` that there was."""

    path: str
    content: bytes | None
    error: AgentOSError | None = None


@dataclass(frozen=True, slots=True)
class FileWritten:
    """What writing one of several files gave: the `error` that there was, if any."""

    path: str
    error: AgentOSError | None = None
