"""Mounts through the new mount API: made detached, given their attributes, then attached.

A target is opened without following a symlink (openat2, RESOLVE_NO_SYMLINKS), so that a tree which a
guest may have written to can not steer a mount elsewhere. Needs Linux 5.12.
"""

from __future__ import annotations

import os

from agentos.linux import syscalls
from agentos.linux.syscalls import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY

ATTRIBUTES = {
    "ro": MOUNT_ATTR_RDONLY,
    "nosuid": MOUNT_ATTR_NOSUID,
    "nodev": MOUNT_ATTR_NODEV,
    "noexec": MOUNT_ATTR_NOEXEC,
}


def attribute_bits(names: list[str]) -> int:
    """The MOUNT_ATTR_ bits of `names`, of ATTRIBUTES."""
    bits = 0
    for name in names:
        bits |= ATTRIBUTES[name]
    return bits


def make_filesystem(fstype: str, options: dict[str, str], attributes: int) -> int:
    """A detached mount of a new file system. An option without a value is given as an empty string."""
    context = syscalls.fsopen(fstype)
    try:
        for key, value in options.items():
            command = syscalls.FSCONFIG_SET_STRING if value else syscalls.FSCONFIG_SET_FLAG
            syscalls.fsconfig(context, command, key, value)
        syscalls.fsconfig(context, syscalls.FSCONFIG_CMD_CREATE)
        return syscalls.fsmount(context, attributes)
    finally:
        os.close(context)


def clone(path: str, attributes: int, *, recursive: bool, userns_fd: int | None = None) -> int:
    """A detached copy of the mount at `path`, with more `attributes`, seen through a user namespace's ids."""
    flags = syscalls.OPEN_TREE_CLONE | (syscalls.AT_RECURSIVE if recursive else 0)
    mount_fd = syscalls.open_tree(path, flags)
    try:
        change(mount_fd, attributes, recursive=recursive, userns_fd=userns_fd)
    except OSError:
        os.close(mount_fd)
        raise
    return mount_fd


def change(mount_fd: int, attributes: int, *, recursive: bool = False, userns_fd: int | None = None) -> None:
    """Give a mount more `attributes`, and show it through a user namespace's ids."""
    if userns_fd is not None:
        attributes |= syscalls.MOUNT_ATTR_IDMAP
    if attributes:
        syscalls.mount_setattr(mount_fd, attr_set=attributes, recursive=recursive, userns_fd=userns_fd or 0)


def make_target(path: str, *, directory: bool) -> None:
    """Make the directory or file `path`, and those above it, where they are not. No part may be a symlink."""
    *above, last = path.strip("/").split("/")
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in above + [last] * directory:
            try:
                os.mkdir(name, 0o755, dir_fd=fd)
            except FileExistsError:
                pass
            flags = os.O_PATH | os.O_DIRECTORY
            below = syscalls.openat2(fd, name, flags, resolve=syscalls.RESOLVE_NO_SYMLINKS)
            os.close(fd)
            fd = below
        if not directory:
            try:
                os.mknod(last, 0o644, dir_fd=fd)
            except FileExistsError:
                pass  # whatever it is: the mount will lie over it, or fail
    finally:
        os.close(fd)


def attach(mount_fd: int, target: str) -> None:
    """Attach the detached `mount_fd` at `target` and close it. No part of `target` may be a symlink."""
    try:
        target_fd = syscalls.openat2(-100, target, os.O_PATH, resolve=syscalls.RESOLVE_NO_SYMLINKS)
        try:
            syscalls.move_mount(mount_fd, target_fd)
        except OSError as error:
            error.add_note(f"at {target}")
            raise
        finally:
            os.close(target_fd)
    finally:
        os.close(mount_fd)


def pivot(new_root: str) -> None:
    """Make `new_root` (a mount) the root of this mount namespace and let go of all that was there before."""
    os.chdir(new_root)
    # pivot_root(".", ".") stacks the old root on the new one, from where one umount drops it: pivot_root(2).
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")
    if os.getcwd() != "/":
        raise OSError(22, "the working directory lies outside the new root")
