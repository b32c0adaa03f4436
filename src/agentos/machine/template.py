"""What all VMs of a host share: the skeleton of their root, device nodes, and what this host offers.

Built once by the zygote in a mount of its own (`shared`), so nothing of it exists outside. The
skeleton is the lower layer of every VM's root: directories, our own /etc/passwd and its kin, and of the
host's /etc only what is listed here and readable by everybody (certificates, alternatives, terminfo...).
"""

from __future__ import annotations

import os
import shutil
import stat
from typing import Any

from agentos.linux import mounts

STAGE_CANDIDATES = ("/mnt", "/media", "/srv", "/opt", "/tmp")
_NODES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {
    "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx", "core": "/proc/kcore",
}  # fmt: skip
_DIRECTORIES = (
    "home", "home/agentos", "root", "tmp", "var", "var/tmp", "var/log", "var/lib", "var/cache", "var/spool", "run",
    "run/lock", "opt", "opt/agentos", "opt/agentos/bin", "opt/agentos/lib", "srv", "mnt", "media", "proc", "sys",
    "dev", "etc", "usr",
)  # fmt: skip
_STICKY = ("tmp", "var/tmp", "run/lock")
_ETC = (
    "adduser.conf", "alternatives", "apt", "bash_completion.d", "bash_completion", "bash.bashrc",
    "bindresvport.blacklist", "ca-certificates", "ca-certificates.conf",
    "crypto-policies", "debconf.conf", "debian_version",
    "deluser.conf", "dpkg", "emacs", "ethertypes", "fonts", "gai.conf", "host.conf", "htoprc",
    "inputrc", "issue", "java-17-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "libnl-3", "locale.alias",
    "locale.conf", "localtime", "login.defs", "lsb-release", "magic", "magic.mime", "mailcap", "mime.types", "nanorc",
    "networks", "os-release", "pam.d", "perl", "pki", "protocols", "python3", "python3.11",
    "python3.12", "python3.13", "rpc", "selinux", "services", "shells", "ssl", "terminfo", "timezone", "vim",
    "X11", "xattr.conf", "xdg",
)  # fmt: skip
_SKIP = (".key", ".pem.key", "private", "shadow", "credentials", "auth.conf", "auth.conf.d", "apt.conf.d")
_MAX_ETC_FILE_BYTES = 4 * 1024 * 1024

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:x:2:2:bin:/bin:/usr/sbin/nologin
sys:x:3:3:sys:/dev:/usr/sbin/nologin
man:x:6:12:man:/var/cache/man:/usr/sbin/nologin
mail:x:8:8:mail:/var/mail:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
_apt:x:42:65534::/nonexistent:/usr/sbin/nologin
agentos:x:1000:1000:agentos:/home/agentos:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
GROUP = """\
root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
mail:x:8:
man:x:12:
shadow:x:42:
www-data:x:33:
staff:x:50:
users:x:100:
agentos:x:1000:
nogroup:x:65534:
"""
_PROFILE = """\
# What every login shell starts with.
export PATH="$HOME/.local/bin:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
[ -n "${BASH_VERSION:-}" ] && [ -f "$HOME/.bashrc" ] && . "$HOME/.bashrc"
"""
_BASHRC = """\
# For interactive shells.
case $- in *i*) ;; *) return ;; esac
HISTCONTROL=ignoreboth
shopt -s checkwinsize
PS1='\\[\\e[1;32m\\]\\u@\\h\\[\\e[0m\\]:\\[\\e[1;34m\\]\\w\\[\\e[0m\\]\\$ '
alias ls='ls --color=auto' grep='grep --color=auto'
"""
_WASM_RUNNER = """\
#!{python} -IS
import sys
sys.path.insert(0, "/opt/agentos/lib")
import wasm
wasm.main(sys.argv[1:])
"""


def choose_stage() -> str:
    """A directory to mount on in the zygote's own namespace; any will do, nothing outside sees it."""
    for path in STAGE_CANDIDATES:
        if os.path.isdir(path) and not os.path.islink(path):
            return path
    raise OSError(2, "none of these directories exists: " + ", ".join(STAGE_CANDIDATES))


def build(stage: str, *, guest_dir: str, software: list[str]) -> None:
    """Fill the stage, which is mounted and empty."""
    for name in (
        "skeleton",
        "lower",
        "layer",
        "image",
        "root",
        "dev",
        "empty",
        *(f"lower.{n}" for n in range(len(software))),
    ):
        os.mkdir(f"{stage}/{name}", 0o755)
    _skeleton(f"{stage}/skeleton", software, guest_dir)
    _devices(f"{stage}/dev")


def add_locale_archive(stage: str) -> bool:
    """One file with the locale that programs in a VM have, where the host has only the dozen that it is made of.

    The C library looks for it first, and opening a dozen files takes every program about 0.2 ms.
    """
    archive, compiled = "/usr/lib/locale/locale-archive", "/usr/lib/locale/C.utf8"
    if os.path.exists(archive) or not os.path.isdir(compiled):
        return False
    made = f"{stage}/skeleton{archive}"
    os.makedirs(os.path.dirname(made), 0o755)
    argv = ["localedef", f"--prefix={stage}/skeleton", "--quiet", "--add-to-archive", compiled]
    try:
        pid = os.posix_spawn("/usr/bin/localedef", argv, {})
    except OSError:
        return False
    os.waitpid(pid, 0)
    return os.path.exists(made)


def give_to(layer: str, owner: int, user: int) -> None:
    """Set who owns a layer: the ids that a VM shows as root and agentos."""
    _chown_tree(layer, owner)
    _chown_tree(f"{layer}/home/agentos", user)


def _skeleton(root: str, software: list[str], guest_dir: str) -> None:
    for name in _DIRECTORIES:
        os.mkdir(f"{root}/{name}", 0o755)
    for name in _STICKY:
        os.chmod(f"{root}/{name}", 0o1777)
    os.chmod(f"{root}/root", 0o700)
    os.symlink("/run", f"{root}/var/run")
    os.symlink("/run/lock", f"{root}/var/lock")
    for path in software:
        os.makedirs(root + path, 0o755, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
    _etc(f"{root}/etc")
    for home in ("home/agentos", "root"):
        write_home(f"{root}/{home}")
    os.mkdir(f"{root}/opt/agentos/lib/wasmtime")
    shutil.copyfile(f"{guest_dir}/wasm.py", f"{root}/opt/agentos/lib/wasm.py")


def write_home(home: str) -> None:
    """What a new user's home has in it."""
    write(f"{home}/.bashrc", _BASHRC)
    write(f"{home}/.profile", _PROFILE.split("\n", 2)[0] + "\n[ -f ~/.bashrc ] && . ~/.bashrc\n")


def write_host_files(etc: str) -> None:
    """What /etc says of the machine itself, which is a VM and not the host."""
    texts = {
        "hosts": "127.0.0.1 localhost agentos\n::1 localhost ip6-localhost ip6-loopback\n",
        "hostname": "agentos\n",
        "resolv.conf": "nameserver 127.0.0.53\n",
        "machine-id": "",
    }
    for name, text in texts.items():
        write(f"{etc}/{name}", text)
    os.symlink("/proc/self/mounts", f"{etc}/mtab")


def write_wasm_runner(root: str, python: str) -> None:
    """The program that runs .wasm files, by the interpreter `python` (a path in the VM)."""
    write(f"{root}/opt/agentos/bin/wasm", _WASM_RUNNER.format(python=python))
    os.chmod(f"{root}/opt/agentos/bin/wasm", 0o755)


def install_extras(stage: str, config: dict[str, Any]) -> list[tuple[str, str]]:
    """What agentos brings into every VM: a Python where the host's software has none, and the wasm runner.

    Returns (host path, guest path) of the directories to bind. `config` has python_prefix and wasmtime.
    """
    extras: list[tuple[str, str]] = []
    skeleton = f"{stage}/skeleton"
    python = next(
        (f"{d}/python3" for d in ("/usr/bin", "/usr/local/bin", "/bin") if os.path.exists(f"{d}/python3")), ""
    )
    if not python:
        python = "/opt/python/bin/python3"
        os.mkdir(f"{skeleton}/opt/python", 0o755)
        extras.append((config["python_prefix"], "/opt/python"))
    if config.get("wasmtime"):
        extras.append((config["wasmtime"], "/opt/agentos/lib/wasmtime"))
    write_wasm_runner(skeleton, python)
    return extras


def _etc(etc: str) -> None:
    for name in _ETC:
        _copy_public(f"/etc/{name}", f"{etc}/{name}")
    texts = {
        "passwd": PASSWD, "group": GROUP, "profile": _PROFILE,
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"
        "protocols: files\nservices: files\n",
        "shells": "/bin/sh\n/bin/bash\n",
    }  # fmt: skip
    for name, text in texts.items():
        write(f"{etc}/{name}", text)
    write_host_files(etc)


def _copy_public(source: str, target: str) -> None:
    """Copy what everybody on the host may read; links stay links, anything else is left out."""
    try:
        info = os.lstat(source)
    except OSError:
        return
    if os.path.basename(source).endswith(_SKIP):
        return
    if stat.S_ISLNK(info.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISDIR(info.st_mode) and info.st_mode & 0o005 == 0o005:
        os.mkdir(target, 0o755)
        for name in os.listdir(source):
            _copy_public(f"{source}/{name}", f"{target}/{name}")
    elif stat.S_ISREG(info.st_mode) and info.st_mode & 0o004 and info.st_size <= _MAX_ETC_FILE_BYTES:
        with open(source, "rb") as file:
            content = file.read()
        if not _holds_secret(content):
            with open(target, "wb") as file:
                file.write(content)
            os.chmod(target, info.st_mode & 0o755)


def _holds_secret(content: bytes) -> bool:
    """Whether a file has a key in it, or a URL with a password, though all the host's users may read it."""
    if b"PRIVATE KEY" in content:
        return True
    for rest in content.split(b"://")[1:]:
        host = rest[:1024].split(b"/", 1)[0].split(None, 1)
        user, at, _ = (host[0] if host else b"").rpartition(b"@")
        if at and b":" in user:
            return True
    return False


def _devices(dev: str) -> None:
    for name in _NODES:
        write(f"{dev}/{name}", "")
        mounts.attach(
            # Devices can be written to all the same; their times, which the host and all VMs see, can not.
            mounts.clone(f"/dev/{name}", mounts.attribute_bits(["ro", "nosuid", "noexec"]), recursive=False),
            f"{dev}/{name}",
        )
    for name, target in _LINKS.items():
        os.symlink(target, f"{dev}/{name}")
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"{dev}/{name}", 0o755)


def write(path: str, text: str) -> None:
    """Write a file of the template."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _chown_tree(root: str, uid: int) -> None:
    if uid == 0 == os.lstat(root).st_uid:
        return
    os.lchown(root, uid, uid)
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            os.lchown(f"{directory}/{name}", uid, uid)


def host_software() -> list[str]:
    """The host's directories of software that a VM shows: /usr, and what is not merged into it."""
    found = ["/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store"):
        if os.path.isdir(name) and not os.path.islink(name):
            found.append(name)
    return found


def proc_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Which of the parts of /proc to hide or protect this kernel has."""
    masked_files, masked_dirs = _existing(config["masked_proc"])
    return {
        "masked_files": masked_files,
        "masked_dirs": masked_dirs,
        "read_only": [name for name in config["read_only_proc"] if os.path.exists(f"/proc/{name}")],
    }


def _existing(names: list[str]) -> tuple[list[str], list[str]]:
    files, directories = [], []
    for name in names:
        path = f"/proc/{name}"
        if os.path.isdir(path):
            directories.append(name)
        elif os.path.exists(path):
            files.append(name)
    return files, directories
