"""The guest's disk: packages of this host's distribution as they are installed here, and this repository.

The files come from the host itself, so that the guest has what VMs have here: bash, coreutils and the distribution's
Python. Nothing is configured; there are two users, root and one without any rights.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
PACKAGES = [
    "bash", "coreutils", "e2fsprogs", "findutils", "grep", "libcap2-bin", "mount", "procps", "python3", "sed", "tar",
    "uidmap", "util-linux",
]  # fmt: skip
LEFT_OUT = (
    "/usr/share/doc/",
    "/usr/share/man/",
    "/usr/share/locale/",
    "/usr/share/info/",
    "/usr/share/zoneinfo/",
)
OF_TESTS = ["_pytest", "iniconfig", "packaging", "pluggy", "py.py", "pygments", "pytest", "exceptiongroup"]
"""Modules and distributions, which must be plain Python: the guest's interpreter may be another than this one."""
EXTRA = ["etc/alternatives", "etc/ld.so.cache", "etc/ld.so.conf", "etc/ld.so.conf.d", "etc/terminfo"]
ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\nagent:x:1000:1000::/home/agent:/bin/bash\n",
    "group": "root:x:0:\ntty:x:5:\nagent:x:1000:\n",
    "shadow": "root:*:19000:0:99999:7:::\nagent:*:19000:0:99999:7:::\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
}
IMAGE_MIB = 1024
"""Sparse: what the guest does not write takes no room."""


def installed() -> set[str]:
    """PACKAGES, and all that they and the essential ones depend on, as far as it is installed."""
    fields = "${Package}\t${Essential}\t${Provides}\t${Depends}, ${Pre-Depends}\n"
    listed = subprocess.run(
        ["dpkg-query", "-W", f"-f={fields}"], stdout=subprocess.PIPE, text=True, check=True
    )
    needs: dict[str, str] = {}
    providers: dict[str, str] = {}
    wanted = list(PACKAGES)
    for line in listed.stdout.splitlines():
        name, essential, provides, depends = line.split("\t")
        needs[name] = depends
        providers.update(dict.fromkeys(re.findall(r"[a-z0-9][a-z0-9.+-]+", provides), name))
        wanted += [name] if essential == "yes" else []
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        name = name if name in needs else providers.get(name, "")
        if name and name not in found:
            found.add(name)
            # Alternatives, too: which of them is there is what is installed.
            wanted += re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9.+-]+)", needs[name])
    return found


def copy(path: str, root: Path) -> None:
    """Copy a file, link or directory (without what is in it) to the same place below `root`, as it is."""
    # Where /bin is a link to usr/bin, packages may still call a file /bin/bash.
    parent, name = os.path.split(path)
    source = os.path.join(os.path.realpath(parent), name)
    target = Path(f"{root}{source}")
    if os.path.lexists(target) or not os.path.lexists(source) or source.startswith(LEFT_OUT):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    found = os.lstat(source)
    if stat.S_ISDIR(found.st_mode):
        target.mkdir()
    elif stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
        shutil.copyfile(source, target, follow_symlinks=False)
    else:
        return
    os.chown(target, found.st_uid, found.st_gid, follow_symlinks=False)
    shutil.copystat(source, target, follow_symlinks=False)


def fill(root: Path) -> None:
    """Put everything that the guest has below `root`. Needs root, whose files they are to be."""
    root.chmod(0o755)
    query = ["dpkg-query", "-L", *sorted(installed())]
    paths = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    for path in sorted({one for one in paths if one.startswith("/") and one != "/."}):
        copy(path, root)
        if path.endswith(".py"):
            # What the interpreter made when it was installed: an emulated machine is slow to do that again.
            for cached in Path(path).parent.glob(f"__pycache__/{Path(path).stem}.*.pyc"):
                copy(str(cached), root)
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            copy(f"/{name}", root)
    for name in EXTRA:
        if Path("/", name).is_dir():
            shutil.copytree(Path("/", name), root / name, symlinks=True, dirs_exist_ok=True)
        elif Path("/", name).exists():
            copy(f"/{name}", root)
    for name, text in ETC.items():
        Path(root, "etc", name).write_text(text)
    Path(root, "etc/shadow").chmod(0o640)
    for name in ("proc", "sys", "dev", "run", "tmp", "root", "var/tmp", "home/agent", "opt"):
        Path(root, name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        Path(root, name).chmod(0o1777)
    Path(root, "root").chmod(0o700)
    os.chown(root / "home/agent", 1000, 1000)
    fill_repository(root)


def fill_repository(root: Path) -> None:
    """This repository and the test runner, compiled for the guest's Python."""
    packages = Path(sysconfig.get_path("purelib"))
    unused = shutil.ignore_patterns("__pycache__", "node_modules")
    (root / "packages").mkdir()
    # With their metadata, by which pytest finds its plugins.
    for source in (one for name in OF_TESTS for one in packages.glob(f"{name}*") if one.suffix != ".pth"):
        if source.is_dir():
            shutil.copytree(source, root / "packages" / source.name, ignore=unused)
        else:
            shutil.copy(source, root / "packages")
    for name in ("src", "tests"):
        shutil.copytree(REPOSITORY / name, root / "repository" / name, ignore=unused)
    shutil.copy(REPOSITORY / "pyproject.toml", root / "repository")
    compiled = [str(root / "packages"), str(root / "repository")]
    command = ["/usr/bin/python3", "-m", "compileall", "-q", "-s", str(root), "-p", "/", *compiled]
    subprocess.run(command, check=True)
    for directory, names, files in os.walk(root / "repository"):
        for name in (*names, *files):
            os.chown(os.path.join(directory, name), 0, 0, follow_symlinks=False)


def make(image: Path, scratch: Path) -> None:
    """Write the disk to `image`, as ext4. `scratch` is an empty directory of the same file system, used meanwhile."""
    fill(scratch)
    with image.open("wb") as file:
        file.truncate(IMAGE_MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-d", str(scratch), str(image)], check=True)
