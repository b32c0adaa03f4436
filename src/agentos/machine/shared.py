"""Where what all VMs of a host share is kept, and whether each VM can be shown it through its own ids.

It is a tmpfs in the zygote's own mount namespace. Before Linux 6.3 a tmpfs cannot be shown through ids: an ext4 file
system can, and so one is laid over it, in a file on that tmpfs. Its loop device goes with the mount.
"""

from __future__ import annotations

import os
import shutil

from agentos.linux import loop, mounts, syscalls
from agentos.machine import identity

_DISK_BYTES = 512 * 1024 * 1024
"""Sparse: in memory there is what is written. /etc may be large, and each image has fittings of its own."""
_DISK_FILES = 65_536
_BLOCK = 4096
_PROGRAMS = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"


def mount(stage: str, software: list[str], *, root: bool) -> None:
    """Mount at `stage` what can be shown through ids, if there is a way and the rest, `software`, can be, too."""
    syscalls.mount("agentos", stage, "tmpfs", 0, "mode=0755")
    if root and not identity.idmap_works([stage]) and identity.idmap_works(software):
        try:
            _lay_disk(stage)
        except OSError:
            pass  # no loop devices, or no mkfs.ext4


def shown_through_ids(stage: str, software: list[str]) -> bool:
    """Whether VMs can have the skeleton in `stage` and `software` as layers, each through its own ids: tried."""
    try:
        skeleton, *others = identity.through_ids([f"{stage}/skeleton", *software])
    except OSError:
        return False
    for mount_fd in others:
        os.close(mount_fd)
    mounts.attach(skeleton, f"{stage}/lower")
    try:
        # The overlay takes such a layer since Linux 5.19.
        return identity.works_in_namespace(lambda: _try_overlay(stage))
    finally:
        syscalls.umount2(f"{stage}/lower", syscalls.MNT_DETACH)


def _lay_disk(stage: str) -> None:
    program = shutil.which("mkfs.ext4", path=_PROGRAMS)
    if program is None:
        raise FileNotFoundError("mkfs.ext4")
    path = f"{stage}/shared.ext4"
    with open(path, "x+b") as file:
        file.truncate(_DISK_BYTES)
        argv = [
            program, "-q", "-F", "-b", str(_BLOCK), "-N", str(_DISK_FILES), "-m", "0",
            "-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", path,
        ]  # fmt: skip
        silent = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_WRONLY, 0) for fd in (1, 2)]
        if os.waitpid(os.posix_spawn(program, argv, {}, file_actions=silent), 0)[1] != 0:
            raise OSError(5, "mkfs.ext4 failed")
        device, device_path = loop.attach(file.fileno(), _BLOCK)
    try:
        options = {"source": device_path, "noinit_itable": ""}
        mounts.attach(mounts.make_filesystem("ext4", options, mounts.attribute_bits(["nosuid"])), stage)
    finally:
        os.close(device)


def _try_overlay(stage: str) -> None:
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    syscalls.mount("none", f"{stage}/layer", "tmpfs")
    os.mkdir(f"{stage}/layer/upper")
    os.mkdir(f"{stage}/layer/work")
    options = f"lowerdir={stage}/lower,upperdir={stage}/layer/upper,workdir={stage}/layer/work,userxattr"
    syscalls.mount("none", f"{stage}/root", "overlay", 0, options)
