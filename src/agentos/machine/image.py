"""Images: a VM may start from an unpacked root file system instead of the host's software.

The image's directory is the lowest layer of the VM's root. Over it lies a small layer of fittings, which the
zygote makes once for each image: the mount points, the users that a VM has, and what agentos brings. As a real
directory there hides whatever an image has in its place, a mount can not be led astray by a symlink of the
image's. The image is only ever opened relative to its own root, which no symlink in it can leave.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat

from agentos.linux import syscalls
from agentos.machine import template
from agentos.machine.identity import AGENTOS

_MAX_FILE_BYTES = 1024 * 1024
_DIRECTORIES = (
    "dev", "etc", "home", "home/agentos", "opt", "opt/agentos", "opt/agentos/bin", "opt/agentos/lib",
    "opt/agentos/lib/wasmtime", "proc", "run", "sys", "tmp",
)  # fmt: skip
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
_PYTHONS = ("usr/bin/python3", "usr/local/bin/python3", "bin/python3")


def fit_out(fittings: str, image: str, *, guest_dir: str) -> None:
    """Make the layer `fittings` for `image`. Raises OSError where the image is not a directory, or cannot be read."""
    root_fd = os.open(image, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.mkdir(fittings, 0o755)
        for name in _DIRECTORIES:
            os.mkdir(f"{fittings}/{name}", 0o755)
        os.chmod(f"{fittings}/tmp", 0o1777)
        shell = shell_in(root_fd)
        _write_users(fittings, root_fd, shell)
        template.write_host_files(f"{fittings}/etc")
        template.write_home(f"{fittings}/home/agentos")
        python = next((f"/{path}" for path in _PYTHONS if _is_program(root_fd, path)), None)
        if python is not None:
            template.write_wasm_runner(fittings, python)
            shutil.copyfile(f"{guest_dir}/wasm.py", f"{fittings}/opt/agentos/lib/wasm.py")
    finally:
        os.close(root_fd)


def shell_of(image: str) -> str:
    """The path, in the image, of the shell that runs commands: bash where there is one."""
    root_fd = os.open(image, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return shell_in(root_fd)
    finally:
        os.close(root_fd)


def shell_in(root_fd: int) -> str:
    """As `shell_of`, of the image whose root is open."""
    return "/bin/bash" if _is_program(root_fd, "bin/bash") else "/bin/sh"


def _write_users(fittings: str, root_fd: int, shell: str) -> None:
    """The image's users and groups with ours before them: the first of an id is the one that is shown."""
    account = f"agentos:x:{AGENTOS}:{AGENTOS}:agentos:/home/agentos:{shell}\n"
    group = f"agentos:x:{AGENTOS}:\n"
    for name, ours, otherwise in (("passwd", account, template.PASSWD), ("group", group, template.GROUP)):
        theirs = _read(root_fd, f"etc/{name}") or otherwise
        kept = [line for line in theirs.splitlines(keepends=True) if not line.startswith("agentos:")]
        template.write(f"{fittings}/etc/{name}", ours + "".join(kept))


def _open(root_fd: int, path: str, flags: int) -> int | None:
    """Open what the image has at `path`, every symlink taken as within it; None where it has nothing."""
    try:
        return syscalls.openat2(root_fd, path, flags, resolve=syscalls.RESOLVE_IN_ROOT)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise


def _read(root_fd: int, path: str) -> str:
    """The text of a small regular file of the image, empty where there is none."""
    fd = _open(root_fd, path, os.O_RDONLY | os.O_NONBLOCK)
    if fd is None:
        return ""
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")


def _is_program(root_fd: int, path: str) -> bool:
    fd = _open(root_fd, path, os.O_PATH)
    if fd is None:
        return False
    try:
        info = os.fstat(fd)
        return stat.S_ISREG(info.st_mode) and bool(info.st_mode & 0o111)
    finally:
        os.close(fd)
