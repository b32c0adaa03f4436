"""Which host ids stand behind a VM's ids, and how a process comes to have the right to say so.

Three ways, found by trying:
- `root`: the host process may write any map. Every VM gets a range of 65,536 ids of its own.
- `subuid`: an ordinary user with newuidmap(1) and ranges in /etc/subuid. The zygote enters a user namespace
  that holds the range; VMs are nested in it and share it, without the user's own id.
- `single`: an ordinary user without. A VM has one id, agentos, which is the user's own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from agentos.linux import mounts, syscalls

AGENTOS = 1000
RANGE = 65_536
FIRST_HOST_UID = 0x2000_0000
SLOTS = 16_384


class IdRanges:
    """The ids that VMs can be given, in slots. A slot serves one VM at a time where there are several."""

    def __init__(self, mode: str, first: int, count: int, slots: int) -> None:
        self.mode = mode
        self.first = first
        self.count = count
        self.slots = slots
        self.used: set[int] = set()
        self.shared = False
        # Another server on this host should not hand out the same ranges in the same order.
        self.next = os.getpid() * 7919 % slots

    def share_one_range(self) -> None:
        """Without id-mapped mounts the skeleton can belong to one range only, so all VMs get that.

        The owner of a VM's user namespace, to whom the kernel counts, is another for each all the same.
        """
        self.shared = True

    def take_slot(self) -> int:
        """A free slot; with a single one, that one."""
        if self.slots == 1:
            return 0
        for _ in range(self.slots):
            slot, self.next = self.next, (self.next + 1) % self.slots
            if slot not in self.used:
                self.used.add(slot)
                return slot
        raise OSError(11, f"all {self.slots} id ranges are in use")

    def give_back(self, slot: int) -> None:
        """The VM that had this slot is gone."""
        self.used.discard(slot)

    def map_line(self, slot: int) -> str:
        """The id map of a VM, as user_namespaces(7) has it."""
        if self.mode == "single":
            return f"{AGENTOS} 0 1"
        if self.shared or self.mode == "subuid":
            slot = 0
        return f"0 {self.first + slot * RANGE} {self.count}"

    def owner(self, slot: int) -> int | None:
        """Who is to make the user namespace of a VM, where that can be chosen: another for each.

        The kernel charges what it counts for each user (inotify instances, message queues, processes) to that
        one too: VMs that all belong to one user would share its limits.
        """
        if self.mode == "single":
            return None
        return self.first + slot * (RANGE if self.mode == "root" else 1)

    def write_maps(self, pid: int, slot: int) -> None:
        """Give the fresh user namespace of `pid` its ids."""
        line = self.map_line(slot)
        if self.mode == "single":
            write_file(f"/proc/{pid}/setgroups", "deny")
        write_file(f"/proc/{pid}/uid_map", line)
        write_file(f"/proc/{pid}/gid_map", line)

    def on_disk(self, idmap: bool) -> tuple[int, int]:
        """(root, agentos): the ids, as the zygote sees them, of files that a VM shall see as theirs."""
        if self.mode == "single":
            return 0, 0
        if idmap:
            return 0, AGENTOS
        self.share_one_range()
        return self.first, self.first + AGENTOS


def acquire() -> IdRanges:
    """The best way that works here. For an ordinary user the caller is in a new user namespace afterwards."""
    if os.geteuid() == 0 and _can_unshare_mounts():
        first, slots, count = _ranges_of_root(_read("/proc/self/uid_map"))
        return IdRanges("root", first, count, slots)
    ranges = _subordinate_ranges()
    if ranges is not None:
        return ranges
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    write_file("/proc/self/setgroups", "deny")
    write_file("/proc/self/uid_map", f"0 {uid} 1")
    write_file("/proc/self/gid_map", f"0 {gid} 1")
    return IdRanges("single", 0, 1, 1)


def _can_unshare_mounts() -> bool:
    """Root without CAP_SYS_ADMIN, as in a plain container, must go the ordinary user's way."""
    child = os.fork()
    if child == 0:
        try:
            syscalls.unshare(syscalls.CLONE_NEWNS)
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _ranges_of_root(uid_map: str) -> tuple[int, int, int]:
    """(first id, slots, ids in a slot) out of the map of the namespace that this root is root of."""
    inside = max((int(line.split()[0]) + int(line.split()[2]) for line in uid_map.splitlines()), default=0)
    if inside >= FIRST_HOST_UID + SLOTS * RANGE:
        return FIRST_HOST_UID, SLOTS, RANGE
    if inside >= 2 * RANGE:
        return RANGE, inside // RANGE - 1, RANGE
    if inside > 2:
        return 1, 1, inside - 1
    raise OSError(
        1, "the server's own user namespace has too few ids: it needs a range, or to be an ordinary user"
    )


def _subordinate_ranges() -> IdRanges | None:
    """Enter a user namespace with the user's subordinate ids, or None where that can not be had."""
    uid, gid = os.geteuid(), os.getegid()
    subuid, subgid = _subordinate("/etc/subuid", uid), _subordinate("/etc/subgid", uid)
    if uid == 0 or subuid is None or subgid is None:
        return None
    count = min(subuid[1], subgid[1], RANGE - 1)
    maps = [
        ["newuidmap", str(os.getpid()), "0", str(uid), "1", "1", str(subuid[0]), str(count)],
        ["newgidmap", str(os.getpid()), "0", str(gid), "1", "1", str(subgid[0]), str(count)],
    ]
    unshared_read, unshared_write = os.pipe2(os.O_CLOEXEC)
    helper = os.fork()
    if helper == 0:
        os.close(unshared_write)
        os.read(unshared_read, 1)
        os._exit(max(_run(argv) for argv in maps))
    os.close(unshared_read)
    probe = os.fork()
    if probe == 0:
        os._exit(0 if _exists_on_path("newuidmap") and _exists_on_path("newgidmap") else 1)
    if os.waitpid(probe, 0)[1] != 0:
        os.kill(helper, signal.SIGKILL)
        os.waitpid(helper, 0)
        os.close(unshared_write)
        return None
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
    except OSError:
        # It would see the pipe's end and set out to map the ids of a process that is gone.
        os.kill(helper, signal.SIGKILL)
        os.waitpid(helper, 0)
        raise
    os.close(unshared_write)
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError(1, "newuidmap or newgidmap refused the ranges of /etc/subuid and /etc/subgid")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    syscalls.unshare(syscalls.CLONE_NEWNS)
    return IdRanges("subuid", 1, count, count)


def _subordinate(path: str, uid: int) -> tuple[int, int] | None:
    """The user's longest range in a file of subuid(5)."""
    names = {str(uid), _user_name(uid)}
    best: tuple[int, int] | None = None
    for line in _read(path).splitlines():
        fields = line.strip().split(":")
        if len(fields) == 3 and fields[0] in names and fields[1].isdigit() and fields[2].isdigit():
            found = (int(fields[1]), int(fields[2]))
            if best is None or found[1] > best[1]:
                best = found
    return best if best and best[1] > AGENTOS else None


def _user_name(uid: int) -> str:
    for line in _read("/etc/passwd").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2] == str(uid):
            return fields[0]
    return ""


def _exists_on_path(name: str) -> bool:
    return any(os.access(f"{d}/{name}", os.X_OK) for d in ("/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin"))


def _run(argv: list[str]) -> int:
    try:
        pid = os.posix_spawnp(argv[0], argv, {"PATH": "/usr/bin:/bin:/usr/local/bin:/usr/sbin"})
    except OSError:
        return 127
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF


def idmap_works(paths: list[str]) -> bool:
    """Whether mounts of all `paths` can be shown through another user namespace's ids: tried, not looked up."""
    try:
        for mount_fd in through_ids(paths):
            os.close(mount_fd)
    except OSError:
        return False
    return True


def through_ids(paths: list[str]) -> list[int]:
    """Detached mounts of `paths`, shown through the ids of a fresh user namespace. Raises OSError."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    hold_read, hold_write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.close(hold_write)
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(theirs, b"u")
            os.read(hold_read, 1)
        finally:
            os._exit(0)
    os.close(theirs)
    made: list[int] = []
    try:
        if os.read(ours, 1) != b"u":
            raise OSError(1, "no user namespace")
        write_file(f"/proc/{child}/uid_map", "0 1 2")
        write_file(f"/proc/{child}/gid_map", "0 1 2")
        userns = os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for path in paths:
                made.append(mounts.clone(path, 0, recursive=False, userns_fd=userns))
        finally:
            os.close(userns)
    except OSError:
        for mount_fd in made:
            os.close(mount_fd)
        raise
    finally:
        for fd in (ours, hold_read, hold_write):
            os.close(fd)
        os.waitpid(child, 0)
    return made


def works_in_namespace(action: Callable[[], object]) -> bool:
    """Whether `action` succeeds for the root of a fresh user and mount namespace: tried in a child."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    hold_read, hold_write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(hold_write)
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(theirs, b"u")
            if os.read(hold_read, 1):
                syscalls.unshare(syscalls.CLONE_NEWNS)
                action()
                code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    try:
        if os.read(ours, 1) == b"u":
            write_file(f"/proc/{child}/uid_map", "0 1 2")
            write_file(f"/proc/{child}/gid_map", "0 1 2")
            os.write(hold_write, b"m")
    except OSError:
        pass  # the child sees the end of its pipe and fails
    finally:
        for fd in (ours, hold_read, hold_write):
            os.close(fd)
    return os.waitpid(child, 0)[1] == 0


def write_file(path: str, text: str) -> None:
    """One write(2) to a file that takes its content whole, such as uid_map."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.add_note(f"writing {text!r} to {path}")
        raise
    finally:
        os.close(fd)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
