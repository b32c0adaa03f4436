"""Handing controllers down a version 2 hierarchy (cgroup-v2.rst: "No Internal Process Constraint",
"Delegation").

Apart from the root, a cgroup either holds processes or hands controllers to its children. So the
processes of our own cgroup move to a leaf below it, but only where they are in the way, and never a
process that is neither ours nor in a cgroup that was delegated to us as a whole.
"""

from __future__ import annotations

import errno
import os

from agentos.linux.cgroups import files, none

LEAF = "agentos-host"
"""The leaf that hosts are moved to. All hosts of one cgroup share it; it stays behind, empty, after them."""


def above_leaf(directory: str) -> str:
    """`directory`, or the one above where it is the leaf that an earlier call moved us to."""
    head, _, last = directory.rpartition("/")
    return head if last == LEAF and head else directory


def hand_down(directory: str, wanted: list[str], owner_pid: int | None) -> dict[str, OSError]:
    """Let children of version 2 cgroup `directory` have the controllers `wanted`. Never raises OSError.

    Gives an error for each controller that they cannot have. Processes that are in the way are moved to
    the leaf; with `owner_pid` None none ever is.
    """
    try:
        offered = files.read(directory + "/cgroup.controllers").split()
        enabled = files.read(directory + "/cgroup.subtree_control").split()
    except OSError as error:
        return dict.fromkeys(wanted, error)
    absent = OSError(errno.ENODEV, "not among the controllers handed to this cgroup", directory)
    problems = {one: absent for one in wanted if one not in offered}
    missing = [one for one in wanted if one in offered and one not in enabled]
    moved = False
    try:
        if missing and _must_be_empty(directory):
            moved = vacate(directory, owner_pid)
    except OSError as error:
        return problems | dict.fromkeys(missing, error)
    for controller in missing:
        try:
            enable(directory, controller)
        except OSError as error:
            problems[controller] = error
    if moved and all(one in problems for one in missing):
        _move_back(directory)
    return problems


def _must_be_empty(directory: str) -> bool:
    """Whether processes in `directory` forbid what we want: in every cgroup but the real root.

    The kernel itself refuses only some controllers (EBUSY). With others it makes the children of a cgroup
    that holds processes `domain invalid`, so that no process could join them ("Threads").
    """
    return os.path.exists(directory + "/cgroup.type")


def enable(directory: str, controller: str) -> None:
    """Hand `controller` to the children of `directory`, which must hold no process. Raises OSError."""
    files.write(directory + "/cgroup.subtree_control", "+" + controller)


def vacate(directory: str, owner_pid: int | None) -> bool:
    """Move all processes of `directory` to its leaf. Says whether there was any.

    Raises OSError EBUSY, and moves none, if one may not be moved; with `owner_pid` None that is any.
    """
    leaf = f"{directory}/{LEAF}"
    moved = False
    # Again where something forked meanwhile.
    for _ in range(10):
        present = files.processes(directory)
        if not present:
            return moved
        strangers = _strangers(directory, present, owner_pid)
        if strangers:
            shown = ", ".join(str(pid) for pid in strangers[:8])
            error = OSError(errno.EBUSY, "holds processes that are not ours to move", directory)
            error.add_note(
                f"processes {shown}: start in a cgroup of your own (systemd-run --scope makes one)"
            )
            raise error
        for pid in present:
            _move(pid, leaf)
            moved = True
    raise OSError(errno.EBUSY, "new processes keep appearing", directory)


def _strangers(directory: str, present: list[int], owner_pid: int | None) -> list[int]:
    if owner_pid is None:
        return present
    return [] if delegated(directory) else [pid for pid in present if not _descends(pid, owner_pid)]


def _move(pid: int, leaf: str) -> None:
    for _ in range(3):
        try:
            os.mkdir(leaf, 0o755)
        except FileExistsError:
            pass
        try:
            files.write(leaf + "/cgroup.procs", pid)
            return
        except ProcessLookupError:
            return
        except FileNotFoundError:
            # Another host has just swept the leaf away as empty.
            continue


def _move_back(directory: str) -> None:
    leaf = f"{directory}/{LEAF}"
    for pid in files.processes(leaf):
        try:
            files.write(directory + "/cgroup.procs", pid)
        except OSError:
            # It stays where it is, which limits nothing.
            return
    try:
        os.rmdir(leaf)
    except OSError:
        pass


def check_joinable(directory: str, child: str) -> None:
    """Raise OSError unless processes of `directory` may be moved to its child cgroup `child`."""
    path = child + "/cgroup.type"
    if (found := files.read(path).strip()) != "domain":
        raise none.unlike(path, "domain", found)
    # Moving takes permission for the common ancestor ("Delegation Containment").
    os.close(os.open(directory + "/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))


def delegated(directory: str) -> bool:
    """Whether everything in cgroup `directory` is ours to arrange.

    So says systemd by an extended attribute (Delegate=yes), and so it is in a container that sees no
    more of the hierarchy than its own cgroup.
    """
    for name in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError:
            pass
    # cgroup.type is in every cgroup but the real root.
    return os.path.ismount(directory) and os.path.exists(directory + "/cgroup.type")


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        try:
            # The name, in parentheses, may hold anything: the parent is the second field after it.
            pid = int(_stat(pid).rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            # It has ended, which moving it will notice as well.
            return True
    return pid == ancestor


def _stat(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read()
