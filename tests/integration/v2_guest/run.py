"""Run tests in a guest whose cgroups are version 2, on a host whose are not.

    python tests/integration/v2_guest/run.py [KIND] KERNEL [pytest arguments]

KERNEL is a bzImage with cgroup v2, ext4 and a serial console built in, such as that of Debian's
linux-image-cloud-amd64; its modules are looked for where the package has them, in ../lib/modules. Must run as root, on
a host of Debian's family with its python3, qemu-system-x86_64 (KVM is not used), busybox (static), cpio and mkfs.ext4,
under a Python that has pytest. The guest has a userland of the host's packages (`disk`), this repository, and no
network. Exits as pytest did.

KIND says where the tests run, and which they are unless others are given. Those of cgroups: --root, in the root of the
hierarchy; --hybrid, where the memory controller is mounted as version 1 and only the others are version 2; --delegated,
as an ordinary user to whom one cgroup was given as systemd gives it to a user. The attempts to get out of VMs:
--service, as root in a cgroup as systemd delegates it to a service, with the limits; --user, as the same ordinary user.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import disk

MINUTES = 15
CGROUPS = ["tests/integration/test_cgroups.py", "tests/unit/linux/test_cgroups.py"]
ATTEMPTS = ["tests/escape/test_attempts.py", "-k", "test_it_is_held"]
LIMITS = (
    "test_memory or test_processes or user_may_have or kernel_tells or whoever or memory_of_many or setsid"
)
WITH_LIMITS = [
    "tests/escape/test_attempts.py",
    "tests/e2e/test_limits.py",
    "-k",
    f"test_it_is_held or {LIMITS}",
]
MODULES = [
    "virtio_pci",
    "virtio_blk",
    "overlay",
    "loop",
    "fuse",
    "tun",
    "vsock",
    "vsock_loopback",
    "binfmt_misc",
]
"""What the guest loads where it is a module: its disk, what VMs need, and what they are to be kept from."""

V2 = "mount -t cgroup2 cgroup2 /sys/fs/cgroup"
HYBRID = """mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/memory /sys/fs/cgroup/unified
mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified"""

HANDED_DOWN = """mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo "+memory +pids +cpu" > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/given
group=/given"""
# As systemd does for a user: the directory and the files that arrange what is below it, not its limits.
DELEGATED = f"""{HANDED_DOWN}
for file in . cgroup.procs cgroup.threads cgroup.subtree_control; do
    chown 1000:1000 /sys/fs/cgroup/given/$file
done
user=1000 HOME=/home/agent"""
KINDS = {
    "--root": (V2, CGROUPS),
    "--hybrid": (HYBRID, CGROUPS),
    "--delegated": (DELEGATED, CGROUPS),
    "--service": (HANDED_DOWN, WITH_LIMITS),
    "--user": (DELEGATED, ATTEMPTS),
}

# The initramfs: as far as the disk.
BOOT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in {modules}; do
    insmod /modules/$module
done
mount -t ext4 /dev/vda /disk
mount --move /dev /disk/dev
mount --move /proc /disk/proc
exec switch_root /disk /init
"""
INIT = """#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root PYTHONPATH=/packages PYTHONDONTWRITEBYTECODE=1
export AGENTOS_TESTS_MUST_RUN=1 AGENTOS_TESTS_SLOWNESS=10
mkdir /dev/pts /dev/shm /dev/mqueue
mount -t sysfs sysfs /sys
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t tmpfs tmpfs /run
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
/busybox ifconfig lo up
user=0 group=
{mounts}
cd /repository
# Not this shell's pid: 1 is what a program only has where it is the only one.
python3 -c '
import os, sys
user = int(sys.argv[1])
if sys.argv[2]:
    # In this way systemd says that all below is at the disposal of whoever is in it.
    os.setxattr("/sys/fs/cgroup" + sys.argv[2], "trusted.delegate", b"1")
    os.setxattr("/sys/fs/cgroup" + sys.argv[2], "user.delegate", b"1")
    with open("/sys/fs/cgroup" + sys.argv[2] + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
' $user "$group" -m pytest -p no:cacheprovider --import-mode=importlib --color=no -o timeout=300 {arguments}
echo "guest: pytest ended with $?"
/busybox poweroff -f
"""


def modules(kernel: Path, target: Path) -> list[str]:
    """Put MODULES of `kernel`, and what they need, into `target`. Gives them in the order in which to load them."""
    version = kernel.name.partition("-")[2]
    found = {}
    for path in kernel.parent.parent.glob(f"lib/modules/{version}/kernel/**/*.ko*"):
        found[path.name.partition(".")[0].replace("-", "_")] = path
    order: list[str] = []

    def take(name: str) -> None:
        # What is not there is built in, or the guest will say what it lacks.
        if name not in found or f"{name}.ko" in order:
            return
        content = found[name].read_bytes()
        if found[name].suffix == ".xz":
            content = lzma.decompress(content)
        elif found[name].suffix == ".zst":
            content = subprocess.run(
                ["zstd", "-dc"], input=content, stdout=subprocess.PIPE, check=True
            ).stdout
        needed = re.search(rb"\0depends=([^\0]*)\0", content)
        for one in needed[1].decode().split(",") if needed else []:
            take(one.replace("-", "_"))
        (target / f"{name}.ko").write_bytes(content)
        order.append(f"{name}.ko")

    for name in MODULES:
        take(name)
    return order


def initramfs(kernel: Path, root: Path, image: Path) -> None:
    """Write to `image` what `kernel` starts with, put together below `root`."""
    busybox = shutil.which("busybox") or sys.exit("busybox is missing")
    for name in ("bin", "proc", "dev", "disk", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    init = root / "init"
    init.write_text(BOOT.replace("{modules}", " ".join(modules(kernel, root / "modules"))))
    init.chmod(0o755)
    names = "\0".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with image.open("wb") as out:
        command = ["cpio", "--null", "--create", "--format=newc", "--owner=0:0", "--quiet"]
        subprocess.run(command, cwd=root, input=names.encode(), stdout=out, check=True)


def boot(kernel: Path, start: Path, image: Path) -> int:
    """Boot `kernel` with initramfs `start` and disk `image`; what pytest ended with, 70 where it did not end."""
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "1536", "-smp", "1", "-nographic"]
    command += ["-no-reboot", "-kernel", str(kernel), "-initrd", str(start), "-nic", "none"]
    command += ["-drive", f"file={image},format=raw,if=virtio,cache=unsafe"]
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
    arguments = sys.argv[1:]
    kind = arguments.pop(0) if arguments and arguments[0] in KINDS else "--root"
    mounts, tests = KINDS[kind]
    if not arguments:
        print(__doc__)
        return 64
    kernel = Path(arguments[0]).resolve()
    with tempfile.TemporaryDirectory(prefix="agentos-v2-guest-") as directory:
        root, start, image = (Path(directory, name) for name in ("root", "initramfs", "disk"))
        root.mkdir()
        quoted = " ".join(f"'{one}'" for one in arguments[1:] or tests)
        init = root / "init"
        init.write_text(INIT.replace("{mounts}", mounts).replace("{arguments}", quoted))
        init.chmod(0o755)
        shutil.copy(shutil.which("busybox") or "busybox", root / "busybox")
        disk.make(image, root)
        initramfs(kernel, Path(directory, "start"), start)
        return boot(kernel, start, image)


if __name__ == "__main__":
    sys.exit(main())
