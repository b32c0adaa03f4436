"""Applies a plan inside a VM's new namespaces: one function for each operation.

It runs in the short-lived parent of init, so that the memory it needs goes with it. Every step either
succeeds or raises StepFailed naming itself; nothing is skipped and nothing only warns.
"""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import stat
import struct
from collections.abc import Callable
from typing import Any

from agentos.linux import binfmt, mounts, privileges, proc, syscalls
from agentos.machine import outlets

Step = tuple[str, dict[str, Any]]

_PENDING_SIGNALS = 16_384
"""Queued signals and timers of a user of the VM: each takes kernel memory."""
_RLIMIT_NICE = 13  # asm-generic/resource.h
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40


class StepFailed(Exception):
    """A step of the plan failed: its name and target, and the kernel's errno."""

    def __init__(self, step: str, error: OSError) -> None:
        super().__init__(step, error)
        self.step = step
        self.error = error


class Boot:
    """The state that steps hand on: mounts that the zygote prepared, and what must stay open for the VM's life."""

    def __init__(self, prepared: list[int], init_pid: int) -> None:
        self.prepared = prepared
        self.init_pid = init_pid
        self.kept_fds: list[int] = []
        self.has_root_namespace = False
        """Whether the last of `kept_fds` is the user namespace that shows the VM's one id as root."""
        self._proc_self = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.outlets: dict[str, socket.socket] = {}
        """Handed out to the host when all is done."""

    def apply(self, steps: list[Step]) -> None:
        """Apply `steps` in order. Raises StepFailed at the first that fails."""
        for operation, arguments in steps:
            try:
                _OPERATIONS[operation](self, **arguments)
            except OSError as error:
                target = arguments.get("target") or arguments.get("path") or ""
                raise StepFailed(f"{operation} {target}".strip(), error) from error

    def private_mounts(self) -> None:
        syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)

    def filesystem(self, type: str, target: str, options: dict[str, str], attributes: list[str]) -> None:
        def make() -> None:
            mounts.attach(mounts.make_filesystem(type, options, mounts.attribute_bits(attributes)), target)

        if type == "proc":
            # A new proc is of the pid namespace of whoever makes it: our children are in the VM's, we are not.
            _in_child(make)
        else:
            make()

    def bind(
        self,
        source: str,
        target: str,
        attributes: list[str],
        handed_over: bool = False,
        idmap: bool = False,
        storage: bool = False,
    ) -> None:
        if handed_over:
            mount_fd = self.prepared.pop(0)
        else:
            mount_fd = mounts.clone(source, mounts.attribute_bits(attributes), recursive=True)
        mounts.attach(mount_fd, target)

    def remount(self, path: str, attributes: list[str]) -> None:
        mount_fd = syscalls.open_tree(path, 0)
        try:
            syscalls.mount_setattr(mount_fd, attr_set=mounts.attribute_bits(attributes))
        finally:
            os.close(mount_fd)

    def overlay(self, lower: str, upper: str, work: str, target: str) -> None:
        for path in (upper, work):
            if not os.path.isdir(path):
                os.mkdir(path, 0o755)
        # userxattr: an overlay made in a user namespace may not use trusted.* attributes.
        options = {"lowerdir": lower, "upperdir": upper, "workdir": work, "userxattr": ""}
        nosuid_nodev = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
        mounts.attach(mounts.make_filesystem("overlay", options, nosuid_nodev), target)

    def mount_point(self, path: str) -> None:
        # For the mount that comes next, of whose source the path may be closed to the VM.
        mounts.make_target(path, directory=stat.S_ISDIR(os.fstat(self.prepared[0]).st_mode))

    def pivot_root(self, root: str, detach: str) -> None:
        mounts.pivot(root)

    def users_limits(self, share: int) -> None:
        """What the kernel counts for each host user, over all user namespaces: this VM gets a part of it."""
        for name in ("instances", "watches"):
            most = int(proc.read_small(f"/proc/sys/fs/inotify/max_user_{name}", 64))
            with open(f"/proc/sys/user/max_inotify_{name}", "w", encoding="ascii") as file:
                file.write(str(max(1, most // share)))

    def hostname(self, name: str) -> None:
        syscalls.sethostname(name)

    def loopback(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            request = struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING)
            fcntl.ioctl(sock, _SIOCSIFFLAGS, request)

    def network(self, routes: list[list[Any]]) -> None:
        self.outlets = outlets.open_outlets(routes)

    def binfmt_misc(self, rule: str) -> None:
        self.kept_fds.append(binfmt.register(rule))

    def root_namespace(self) -> None:
        """With a single mapped id there is no uid 0: one more user namespace shows what runs in it a root.

        Made before anything of the guest runs: whoever writes the maps is dumpable, and so could be traced by
        the guest, whose id it has.
        """
        uid, gid = os.getuid(), os.getgid()
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        for name, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._proc_self)
            try:
                os.write(fd, content.encode())
            finally:
                os.close(fd)
        self.kept_fds.append(os.open("ns/user", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc_self))
        self.has_root_namespace = True

    def limits(self, open_files: int, data_bytes: int | None = None) -> None:
        """What init and all that it forks may use."""
        privileges.set_limit(resource.RLIMIT_NOFILE, open_files, pid=self.init_pid)
        if data_bytes is not None:
            privileges.set_limit(resource.RLIMIT_DATA, data_bytes, pid=self.init_pid)
        privileges.set_limit(resource.RLIMIT_SIGPENDING, _PENDING_SIGNALS, pid=self.init_pid)
        # Not 0: a core_pattern that begins with | starts a program of the host for that too, core(5).
        privileges.set_limit(resource.RLIMIT_CORE, 1, pid=self.init_pid)
        privileges.set_limit(resource.RLIMIT_MEMLOCK, 64 * 1024, pid=self.init_pid)
        privileges.set_limit(resource.RLIMIT_RTPRIO, 0, pid=self.init_pid)
        privileges.set_limit(_RLIMIT_NICE, 0, pid=self.init_pid)


def _in_child(action: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            action()
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, os.strerror(code) if code > 0 else f"the child was killed by signal {-code}")


_OPERATIONS: dict[str, Callable[..., None]] = {
    name: getattr(Boot, name)
    for name in (
        "private_mounts", "users_limits", "filesystem", "bind", "remount", "overlay", "mount_point", "pivot_root",
        "hostname", "loopback", "network", "binfmt_misc", "root_namespace", "limits",
    )
}  # fmt: skip
