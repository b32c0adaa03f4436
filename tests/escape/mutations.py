"""Every defence, and how the product would be without it: what the text of its source becomes in a copy.

A mutation replaces text that must be there, so a change of the product that outruns it is an error and no pass.
Nothing of this is a switch of the product: the copy is made for a run of the matrix and deleted after it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "agentos"

Edit = tuple[str, str, str]
"""File below the package, the text that is there, and what stands in its place."""

_NO_MQUEUE: Edit = (
    "machine/plan.py",
    '        _filesystem("mqueue", f"{root}/dev/mqueue", {}, ["nosuid", "nodev", "noexec"]),\n',
    "",
)
_DEV_STAYS: Edit = (
    "machine/plan.py",
    '        ("remount", {"path": f"{root}/dev", "attributes": ["ro", "nosuid", "noexec"]}),\n',
    "",
)

DEFENCES: dict[str, tuple[Edit, ...]] = {
    "filter": (("machine/confinement.py", "        seccomp.load(self.filter_program)\n", ""),),
    "capabilities": (
        ("machine/confinement.py", "        privileges.drop_bounding(self.last_cap, keep=keep)\n", ""),
        (
            "machine/confinement.py",
            "privileges.become(uid, uid, capabilities=capabilities)",
            "privileges.become(uid, uid, capabilities="
            "int(open('/proc/self/status').read().split('CapPrm:')[1].split()[0], 16))",
        ),
    ),
    "no new privileges": (("machine/confinement.py", "        privileges.set_no_new_privs()\n", ""),),
    "nosuid": (
        ("linux/mounts.py", '    "nosuid": MOUNT_ATTR_NOSUID,', '    "nosuid": 0,'),
        ("machine/boot.py", "syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV", "0"),
    ),
    "nodev": (
        ("linux/mounts.py", '    "nodev": MOUNT_ATTR_NODEV,', '    "nodev": 0,'),
        ("machine/boot.py", "syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV", "0"),
    ),
    "undumpable": (
        (
            "linux/privileges.py",
            "syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)",
            "syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)",
        ),
    ),
    # With what Python does of itself.
    "default signals": (
        ("machine/seed.py", "    privileges.default_signals()\n    requests", "    requests"),
    ),
    "user namespace": (
        ("machine/seed.py", "    syscalls.unshare(syscalls.CLONE_NEWUSER)\n", ""),
        ("machine/seed.py", "if owner >= 0:", "if False:"),
        (
            "machine/identity.py",
            "        line = self.map_line(slot)\n",
            "        return\n        line = self.map_line(slot)\n",
        ),
        ("machine/zygote.py", "idmap = mode ==", "idmap = False and mode =="),
        # Not a part of it, but what would stay in this machine's kernel.
        (
            "machine/zygote.py",
            '"binfmt_misc": _provide_wasm(mode, config["wasm_rule"])',
            '"binfmt_misc": False',
        ),
        (
            "machine/identity.py",
            "        self.share_one_range()\n        return self.first, self.first + AGENTOS",
            "        return 0, AGENTOS",
        ),
    ),
    "user of its own": (("machine/seed.py", "if owner >= 0:", "if False:"),),
    "ids of its own": (
        ("machine/identity.py", "{self.first + slot * RANGE} {self.count}", "{self.first} {self.count}"),
    ),
    "own /proc": (
        (
            "machine/plan.py",
            '[_filesystem("proc", proc, {"hidepid": "invisible"}, ["nosuid", "nodev", "noexec"])]',
            '[_bind("/proc", proc, [])]',
        ),
        ("machine/plan.py", "for name in facts.read_only:", "for name in ():"),
        ("machine/plan.py", "for name in facts.masked_files:", "for name in ():"),
        ("machine/plan.py", "for name in facts.masked_dirs:", "for name in ():"),
    ),
    "masked /proc": (("machine/plan.py", "for name in facts.masked_files:", "for name in ():"),),
    "directories of /proc masked": (
        ("machine/plan.py", "for name in facts.masked_dirs:", "for name in ():"),
    ),
    "read-only device nodes": (
        (
            "machine/template.py",
            'mounts.attribute_bits(["ro", "nosuid", "noexec"])',
            'mounts.attribute_bits(["nosuid", "noexec"])',
        ),
    ),
    "read-only /proc": (("machine/plan.py", "for name in facts.read_only:", "for name in ():"),),
    "pid namespace": (
        ("machine/seed.py", "    | syscalls.CLONE_NEWPID\n", ""),
        # Not a part of it, but what would stop this whole machine.
        ("machine/init.py", "        _kill(-1, signal.SIGSTOP)\n", "        return []\n"),
    ),
    "network namespace": (
        ("machine/seed.py", "    | syscalls.CLONE_NEWNET\n", ""),
        ("machine/plan.py", '        ("loopback", {}),\n', ""),
    ),
    "ipc namespace": (
        ("machine/seed.py", "    | syscalls.CLONE_NEWIPC\n", ""),
        _NO_MQUEUE,
    ),
    "own UTS namespace": (
        ("machine/seed.py", "    | syscalls.CLONE_NEWUTS\n", ""),
        ("machine/plan.py", '        ("hostname", {"name": spec.hostname}),\n', ""),
    ),
    "own cgroup namespace": (
        ("machine/seed.py", "    | syscalls.CLONE_NEWCGROUP\n", ""),
        ("machine/spawner.py", "    syscalls.unshare(syscalls.CLONE_NEWCGROUP)\n", ""),
    ),
    "old root gone": (
        (
            "linux/mounts.py",
            '    syscalls.pivot_root(".", ".")\n    syscalls.umount2(".", syscalls.MNT_DETACH)\n',
            '    syscalls.pivot_root(".", "mnt")\n',
        ),
    ),
    "usr layered or read-only": (
        (
            "machine/plan.py",
            'steps.append(_bind_host(path, root + path, ["ro", "nosuid", "nodev"]))',
            "steps.append(_bind_host(path, root + path, []))",
        ),
    ),
    "mount targets without symlinks": (
        (
            "machine/boot.py",
            "mounts.make_target(path, directory=stat.S_ISDIR(os.fstat(self.prepared[0]).st_mode))",
            "os.makedirs(path, exist_ok=True)",
        ),
    ),
    "own /dev": (
        (
            "machine/plan.py",
            '_bind(f"{facts.stage}/dev", f"{root}/dev", [])',
            '_bind("/dev", f"{root}/dev", [])',
        ),
        _NO_MQUEUE,
        _DEV_STAYS,
        ("machine/plan.py", 'f"{facts.stage}/dev/null"', '"/dev/null"'),
    ),
    "own terminals": (
        (
            "machine/plan.py",
            '_filesystem("devpts", f"{root}/dev/pts", pts, ["nosuid", "noexec"])',
            '_bind("/dev/pts", f"{root}/dev/pts", [])',
        ),
    ),
    "processes counted together": (
        (
            "machine/seed.py",
            "        privileges.set_limit(resource.RLIMIT_NPROC, 2 * processes + _OWN_PROCESSES)\n",
            "",
        ),
    ),
    "terminals counted": (("machine/plan.py", ', "max": str(spec.limits.terminals)', ""),),
    "empty /sys": (
        (
            "machine/plan.py",
            '        ("pivot_root", {"root": root',
            '        _bind("/sys", f"{root}/sys", []),\n        ("pivot_root", {"root": root',
        ),
    ),
    "descriptors closed": (
        ("machine/zygote_process.py", "pass_fds=[theirs.fileno()],", "pass_fds=[theirs.fileno(), 900],"),
        (
            "machine/seed.py",
            "closerange(_BOOTED + 1, 1 << 20)",
            "closerange(_BOOTED + 1, 900), closerange(901, 1 << 20)",
        ),
        (
            "machine/confinement.py",
            "os.closerange(_KEPT_FD + (kept >= 0), 1 << 20)",
            "os.closerange(_KEPT_FD + (kept >= 0), 900), os.closerange(901, 1 << 20)",
        ),
    ),
    "environment of its own": (
        (
            "machine/jobs.py",
            "environment, size = _BASE_ENV[who], _BASE_BYTES[who]",
            "environment, size = {**__import__('os').environ, **_BASE_ENV[who]}, 0",
        ),
    ),
    "public /etc only": (
        ("machine/template.py", "        if not _holds_secret(content):\n", "        if True:\n"),
    ),
    "file worker's ids": (
        ("machine/confinement.py", "            confinement.take_file_ids(uid)\n", "            pass\n"),
    ),
    "files by a worker in the VM": (
        (
            "machine/vm.py",
            '        return self.link.fork_servant("files", uid=UIDS[self.spec.user])[1]',
            "        from tests.escape.hostwalk import worker_on_the_host\n        return worker_on_the_host()",
        ),
    ),
    "storage closed": (("machine/zygote.py", "            os.chmod(path, 0o700)\n", ""),),
}


def mutate(target: Path, without: tuple[str, ...]) -> None:
    """Copy the package below `target` (a directory for PYTHONPATH) and take the named defences away.

    Raises LookupError where the source has not the text that is to be replaced exactly once.
    """
    package = target / "agentos"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    done: set[Edit] = set()
    for name in without:
        for edit in DEFENCES[name]:
            if edit in done:
                continue
            done.add(edit)
            path, old, new = edit
            text = (package / path).read_text(encoding="utf-8")
            if text.count(old) != 1:
                raise LookupError(f"{name}: {path} has {text.count(old)} times {old!r}")
            (package / path).write_text(text.replace(old, new), encoding="utf-8")
