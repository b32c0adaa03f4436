"""Run tests in a guest whose cgroups are version 2, on a host whose are not.

    python tests/integration/v2_guest/run.py [--hybrid | --delegated] KERNEL [pytest arguments]

KERNEL is a bzImage with cgroup v2 and a serial console built in, such as that of Debian's
linux-image-cloud-amd64. Needs qemu-system-x86_64 (KVM is not used), busybox (static) and cpio, and must
itself run under a Python that has pytest and pytest-timeout. The guest is an initramfs of busybox, this
Python and this repository's src and tests; it has no disk and no network. Exits as pytest did.

With --hybrid the memory controller is mounted as version 1, and only the others are version 2. With --delegated
the tests run as an ordinary user, to whom one cgroup was given.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
MINUTES = 15
DEFAULT = ["tests/integration/test_cgroups.py", "tests/unit/linux/test_cgroups.py"]
PACKAGES = ["_pytest", "iniconfig", "packaging", "pluggy", "py.py", "pygments", "pytest"]
UNUSED = shutil.ignore_patterns(
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "site-packages",
    "config-*",
    "*.a",
)

V2 = "mount -t cgroup2 cgroup2 /sys/fs/cgroup"
HYBRID = """mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/memory /sys/fs/cgroup/unified
mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified"""

# As systemd does for a user: the directory and the files that arrange what is below it, not its limits.
DELEGATED = """mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo "+memory +pids +cpu" > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/given
for file in . cgroup.procs cgroup.threads cgroup.subtree_control; do
    chown 1000:1000 /sys/fs/cgroup/given/$file
done
chmod 1777 /tmp
user=1000 group=/given"""

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /bin /usr/bin
/bin/busybox --install -s /bin
export PATH=/bin PYTHONHOME=/python PYTHONPATH=/packages LD_LIBRARY_PATH=/lib PYTHONDONTWRITEBYTECODE=1
export HOME=/tmp AGENTOS_TESTS_MUST_RUN=1 AGENTOS_TESTS_SLOWNESS=10
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
user=0 group=
{mounts}
cd /repository
/python/bin/python -c '
import os, sys
user = int(sys.argv[1])
if sys.argv[2]:
    with open("/sys/fs/cgroup" + sys.argv[2] + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
' $user "$group" -m pytest -p no:cacheprovider --import-mode=importlib --color=no -o timeout=300 {arguments}
echo "guest: pytest ended with $?"
poweroff -f
"""


def libraries(*binaries: Path) -> set[Path]:
    """Shared libraries of `binaries`, the loader among them, as ldd(1) resolves them."""
    found = set()
    for binary in binaries:
        listed = subprocess.run(["ldd", binary], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        found |= {Path(path) for path in re.findall(r"(/\S+) \(0x", listed.stdout)}
    return found


def fill(root: Path, mounts: str, arguments: list[str]) -> None:
    """Put the guest's whole file system below `root`."""
    for name in ("bin", "lib", "lib64", "packages", "python/bin", "python/lib"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox") or sys.exit("busybox is missing")
    shutil.copy(busybox, root / "bin/busybox")
    interpreter = Path(sys.executable).resolve()
    shutil.copy(interpreter, root / "python/bin/python")
    stdlib = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(stdlib, root / "python/lib" / stdlib.name, ignore=UNUSED)
    for library in libraries(interpreter, *stdlib.glob("lib-dynload/*.so")):
        shutil.copy(
            library, root / ("lib64" if library.name.startswith("ld-linux") else "lib") / library.name
        )
    packages = Path(sysconfig.get_path("purelib"))
    # With their metadata, by which pytest finds its plugins.
    for source in (one for name in PACKAGES for one in packages.glob(f"{name}*") if one.suffix != ".pth"):
        (shutil.copytree if source.is_dir() else shutil.copy)(source, root / "packages" / source.name)
    shutil.copytree(REPOSITORY / "src", root / "repository/src")
    shutil.copytree(REPOSITORY / "tests", root / "repository/tests")
    shutil.copy(REPOSITORY / "pyproject.toml", root / "repository")
    init = root / "init"
    quoted = " ".join(f"'{one}'" for one in arguments)
    init.write_text(INIT.replace("{mounts}", mounts).replace("{arguments}", quoted))
    init.chmod(0o755)


def boot(kernel: str, root: Path, image: Path) -> int:
    """Boot `kernel` with `root` as its initramfs; what pytest ended with, 70 where it did not end."""
    names = "\0".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with image.open("wb") as out:
        command = ["cpio", "--null", "--create", "--format=newc", "--owner=0:0", "--quiet"]
        subprocess.run(command, cwd=root, input=names.encode(), stdout=out, check=True)
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "1536", "-smp", "1", "-nographic"]
    command += ["-no-reboot", "-kernel", kernel, "-initrd", str(image), "-nic", "none"]
    command += ["-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on"]
    ended = 70
    with subprocess.Popen(
        ["timeout", str(MINUTES * 60), *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as guest:
        assert guest.stdout is not None
        for line in guest.stdout:
            text = line.decode("utf-8", "replace")
            print(text, end="", flush=True)
            if found := re.search(r"guest: pytest ended with (\d+)", text):
                ended = int(found[1])
    return ended


def main() -> int:
    """Build the guest, run the tests in it, and clear it away."""
    mounts, arguments = V2, sys.argv[1:]
    if arguments[:1] in (["--hybrid"], ["--delegated"]):
        mounts, arguments = {"--hybrid": HYBRID, "--delegated": DELEGATED}[arguments[0]], arguments[1:]
    if not arguments:
        print(__doc__)
        return 64
    with tempfile.TemporaryDirectory(prefix="agentos-v2-guest-") as directory:
        root = Path(directory, "root")
        fill(root, mounts, arguments[1:] or DEFAULT)
        return boot(arguments[0], root, Path(directory, "initramfs"))


if __name__ == "__main__":
    sys.exit(main())
