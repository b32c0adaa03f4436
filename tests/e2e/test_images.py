"""VMs that start from an image: an unpacked root file system in place of the host's software."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentos import VM, Mount
from agentos.errors import BootFailed, InvalidRequest

Run = Callable[..., Any]
BUSYBOX = "/bin/busybox"
APPLETS = [
    "sh",
    "ls",
    "cat",
    "echo",
    "id",
    "ps",
    "sleep",
    "setsid",
    "mkdir",
    "rm",
    "ln",
    "stat",
    "mount",
    "grep",
    "head",
    "wc",
    "touch",
    "env",
    "hostname",
    "true",
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small system of busybox alone, readable by everybody, as a container image would be when unpacked."""
    if not os.path.exists(BUSYBOX):
        pytest.skip("busybox (static) is not installed")
    root = tmp_path / "image"
    for name in ("bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "usr/bin", "var"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n")
    (root / "etc/release").write_text("busybox 1\n")
    for above in (tmp_path, *tmp_path.parents[:3]):
        if above.owner() == Path.home().owner() and above != Path("/tmp"):
            above.chmod(above.stat().st_mode | 0o055)
    return root


def test_programs_are_the_images(in_vm: Run, image: Path) -> None:
    """What runs is the image's, the user and the machine are a VM's, and nothing of the host's software is there."""

    async def body(vm: VM) -> None:
        result = await vm.exec(
            "cat /etc/release && id -un && hostname && pwd && echo $SHELL; ls /usr/bin /bin/bash"
        )
        assert result.stdout.splitlines()[:5] == [
            "busybox 1",
            "agentos",
            "agentos",
            "/home/agentos",
            "/bin/sh",
        ]
        assert "bash: No such file" in result.stderr
        assert (await vm.exec("ps")).stdout.count("\n") >= 2
        shell = await vm.open_shell()
        await shell.write("echo $((6*7)); exit\n")
        assert await shell.wait() == 0
        assert b"42" in b"".join(one.data for one in (await shell.read(0)).events)

    in_vm(body, image=str(image))


def test_what_a_vm_writes_is_its_own(in_vm: Run, image: Path) -> None:
    """The image stays as it is, whatever the VM does to it, and the next VM sees it so."""

    async def body(vm: VM) -> None:
        await vm.exec("rm -rf /etc/release; echo changed > /etc/release; touch /bin/new", user="root")
        await vm.exec("rm -rf /home /bin /etc /tmp", user="root")

    async def again(vm: VM) -> None:
        assert (await vm.exec("cat /etc/release")).stdout == "busybox 1\n"

    in_vm(body, image=str(image))
    in_vm(again, image=str(image))
    assert (image / "etc/release").read_text() == "busybox 1\n"
    assert not (image / "bin/new").exists()


def test_an_image_cannot_lead_a_mount_or_a_read_out_of_itself(
    in_vm: Run, image: Path, tmp_path: Path
) -> None:
    """Symlinks where mount points and files should be: they are hidden, or end inside the image."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("root:x:0:0:SECRET:/root:/bin/sh\n")
    for name in ("dev", "proc", "sys", "tmp", "home"):
        (image / name).rmdir()
        (image / name).symlink_to(outside)
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to(outside / "passwd")
    (image / "opt").symlink_to("../outside")

    async def body(vm: VM) -> None:
        result = await vm.exec("cat /etc/passwd; ls /dev /proc/self; stat -c %F /dev /proc /tmp /home /sys")
        assert "SECRET" not in result.stdout
        assert "null" in result.stdout
        assert result.stdout.count("directory") == 5

    in_vm(body, image=str(image))
    assert sorted(os.listdir(outside)) == ["passwd"]


def test_a_mount_over_a_symlink_is_refused(run: Run, image: Path, tmp_path: Path) -> None:
    """A mount goes where it is asked to go, or the VM does not boot; nothing is made elsewhere."""
    shared, outside = tmp_path / "shared", tmp_path / "outside"
    for one in (shared, outside):
        one.mkdir()
        one.chmod(0o777)
    (image / "data").symlink_to(outside)

    async def main() -> None:
        vm = VM(image=str(image), mounts=[Mount(str(shared), "/data/below")])
        with pytest.raises(BootFailed) as caught:
            await vm.start()
        assert "/data" in str(caught.value)

    run(main)
    assert os.listdir(outside) == []


def test_wrong_images(run: Run, tmp_path: Path) -> None:
    """An image that is no directory, is not there, or is not a path."""
    (tmp_path / "file").write_text("")

    async def main() -> None:
        for path in (tmp_path / "file", tmp_path / "none"):
            with pytest.raises(BootFailed) as caught:
                await VM(image=str(path)).start()
            assert caught.value.details["step"] == "image"
        for wrong in ("relative", 3, "/a\0b"):
            with pytest.raises(InvalidRequest):
                VM(image=wrong)  # type: ignore[arg-type]

    run(main)


def test_an_image_with_bash(in_vm: Run, image: Path) -> None:
    """Commands go through the image's bash where it has one."""
    libraries = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True, check=True).stdout
    for word in libraries.split():
        if word.startswith("/"):
            target = image / word.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, target)
    shutil.copy("/bin/bash", image / "bin/bash")

    async def body(vm: VM) -> None:
        result = await vm.exec("[[ $SHELL == /bin/bash ]] && echo ${BASH_VERSION:+yes}")
        assert (result.stdout, result.stderr) == ("yes\n", "")

    in_vm(body, image=str(image))
