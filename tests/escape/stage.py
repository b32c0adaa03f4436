"""Lays out what there is to be had on the host and in a neighbour VM, and makes attempts from inside a VM.

    python -m tests.escape.stage NAME...

prints a line of JSON for each attempt: its name, whether it succeeded, and what was seen. It uses whichever
agentos comes first on the path: the product, or a copy that lacks a defence.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import pty
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from agentos import VM, Host, Mount
from agentos.errors import AgentOSError
from agentos.model import VmSpec
from tests.escape.payloads import ATTEMPTS, ROOT, Attempt

PAYLOADS = Path(__file__).with_name("payloads.py")
SECONDS = 20.0
LEAKED_FD = 900
_libc = ctypes.CDLL(None, use_errno=True)

VICTIM = """
import ctypes, os, sys
secret = os.environ["AGENTOS_ESCAPE"].encode()
buffer = ctypes.create_string_buffer(secret, 4096)
fd = os.open(sys.argv[2], os.O_RDONLY)
os.dup2(fd, 99)
print(ctypes.addressof(buffer), flush=True)
sys.stdin.read()
"""
NEIGHBOUR = """
import ctypes, socket, sys, threading
secret, name, key = sys.argv[1].encode(), sys.argv[2], int(sys.argv[3])
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
ctypes.memmove(libc.shmat(libc.shmget(key, 4096, 0o1666), None, 0), secret, len(secret))
tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
unix.bind("\\0" + name)
unix.listen()
def serve(listener):
    while True:
        listener.accept()[0].sendall(secret)
threading.Thread(target=serve, args=(unix,), daemon=True).start()
print(tcp.getsockname()[1], *open("/proc/self/uid_map").read().split(), flush=True)
serve(tcp)
"""


class Bait:
    """Secrets on the host in every place where a VM might look. A context manager."""

    def __init__(self) -> None:
        self.mark = f"ESCAPE-{secrets.token_hex(6)}"
        self.secret = f"{self.mark}:{secrets.token_hex(12)}"
        self._stack = ExitStack()
        self.directory = ""
        self.usr = "/usr/share"
        self.victim: subprocess.Popen[str]
        self.address = 0
        self.context: dict[str, Any] = {}

    def __enter__(self) -> Bait:
        stack = self._stack
        # Not below a home that only its user may enter.
        self.directory = tempfile.mkdtemp(prefix="agentos-escape-", dir="/var/tmp")
        stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        os.chmod(self.directory, 0o777)
        self.path = self._file("secret", 0o644)
        private = self._file("private", 0o600)
        shm = self._file(f"/dev/shm/{self.mark}", 0o644)
        os.environ["AGENTOS_ESCAPE"] = self.secret
        stack.callback(os.environ.pop, "AGENTOS_ESCAPE")
        self._leak()
        key = secrets.randbelow(2**30) + 1
        self._ipc(key)
        self._keyring()
        self.master, slave = pty.openpty()
        stack.callback(os.close, self.master)
        stack.callback(os.close, slave)
        os.set_blocking(self.master, False)
        os.chmod(os.ttyname(slave), 0o666)
        self._etc()
        device = (
            os.stat("/dev/loop-control").st_rdev
            if os.path.exists("/dev/loop-control")
            else os.makedev(10, 237)
        )
        self.context = {
            "mark": self.mark, "directory": self.directory, "secret_path": self.path, "private_path": private,
            "dev_shm": shm, "secret_fd": 99, "key": key, "queue": f"/{self.mark}", "usr": self.usr,
            "secret_inode": os.stat(self.path).st_ino, "loop_control": device,
            "host_mount": "/opt/agentos/lib/wasmtime", "nodename": os.uname().nodename, "etc_mark": self.mark,
            **self._network(),
        }  # fmt: skip
        self.start_victim()
        stack.callback(self.end_victim)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _file(self, name: str, mode: int) -> str:
        path = os.path.join(self.directory, name)
        Path(path).write_text(self.secret)
        os.chmod(path, mode)
        self._stack.callback(Path(path).unlink, missing_ok=True)
        return path

    def _leak(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        os.dup2(fd, LEAKED_FD)
        os.close(fd)
        self._stack.callback(os.close, LEAKED_FD)

    def _ipc(self, key: int) -> None:
        _libc.shmat.restype = ctypes.c_void_p
        data = self.secret.encode()
        shm, msg = _libc.shmget(key, 4096, 0o1666), _libc.msgget(key, 0o1666)
        ctypes.memmove(_libc.shmat(shm, None, 0), data, len(data))
        for _ in range(4):
            text = ctypes.create_string_buffer(
                ctypes.string_at(ctypes.addressof(ctypes.c_long(1)), 8) + data + b"\0"
            )
            _libc.msgsnd(msg, text, ctypes.c_size_t(len(data) + 1), 0)
        sem = _libc.semget(key, 1, 0o1666)
        self._stack.callback(_libc.shmctl, shm, 0, None)
        self._stack.callback(_libc.msgctl, msg, 0, None)
        self._stack.callback(_libc.semctl, sem, 0, 0)
        old = os.umask(0)
        queue = _libc.mq_open(f"/{self.mark}".encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
        os.umask(old)
        _libc.mq_send(queue, data, ctypes.c_size_t(len(data)), 0)
        self._stack.callback(_libc.mq_unlink, f"/{self.mark}".encode())
        self._stack.callback(os.close, queue)

    def _keyring(self) -> None:
        """A key in the session keyring, which processes inherit. It goes with this process."""
        if os.uname().machine == "x86_64":
            _libc.syscall(250, 1, None)
            data = self.secret.encode()
            _libc.syscall(248, b"user", self.mark.encode(), data, ctypes.c_size_t(len(data)), -3)

    def _etc(self) -> None:
        if os.geteuid() == 0 and os.path.isdir("/etc/terminfo"):
            path = Path(f"/etc/terminfo/{self.mark}")
            path.write_text(f"https://user:{self.secret}@example.com/\n")
            self._stack.callback(path.unlink)

    def _network(self) -> dict[str, Any]:
        stack = self._stack
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        tcp6 = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("\0" + self.mark)
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(f"{self.directory}/socket")
        os.chmod(f"{self.directory}/socket", 0o666)
        for one in (abstract, unix):
            one.listen()
        for listener in (tcp, tcp6, abstract, unix):
            threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        threading.Thread(target=self._serve_udp, args=(udp,), daemon=True).start()
        return {
            "tcp": tcp.getsockname()[1], "tcp6": tcp6.getsockname()[1], "udp": udp.getsockname()[1],
            "abstract": self.mark, "unix_path": f"{self.directory}/socket",
        }  # fmt: skip

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as sock:
                    sock.sendall(self.secret.encode())

    def _serve_udp(self, sock: socket.socket) -> None:
        with suppress(OSError):
            while True:
                sock.sendto(self.secret.encode(), sock.recvfrom(100)[1])

    def precious(self) -> str:
        """A file that must not be deleted."""
        path = Path(self.directory, "doomed")
        path.write_text("precious")
        return str(path)

    def is_gone(self, path: str) -> bool:
        """Whether it was deleted all the same."""
        return not os.path.lexists(path)

    def start_victim(self) -> None:
        """A process of the host with the secret in its arguments, environment, memory and descriptors."""
        self.victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, self.secret, self.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.directory,
        )  # fmt: skip
        assert self.victim.stdout
        self.address = int(self.victim.stdout.readline())
        self.context |= {"victim": self.victim.pid, "secret_address": self.address}

    def end_victim(self) -> None:
        """End it."""
        self.victim.kill()
        self.victim.communicate()

    def effect(self, name: str) -> str:
        """What an attempt called `name` has left on the host, if anything; it is cleared away."""
        found = ""
        for path in (Path(self.directory, name), Path(self.usr, name)):
            if path.is_dir():
                shutil.rmtree(path)
                found = str(path)
            elif path.exists():
                path.unlink()
                found = str(path)
        with suppress(BlockingIOError):
            if self.mark.encode() in os.read(self.master, 4096):
                found = "written to a terminal of the host"
        return found


Made = tuple[bool, str]
HostAttempt = Callable[["Stage"], Awaitable[str]]


class Stage:
    """A host process's view: one Host, a VM to attack from, and a neighbour."""

    def __init__(self, host: Host, bait: Bait) -> None:
        self.host = host
        self.bait = bait
        self.vm: VM
        self.spoilt = False
        self.neighbour: VM

    async def begin(self) -> None:
        """Boot the two VMs."""
        self.neighbour = await VM(host=self.host).start()
        key = secrets.randbelow(2**30) + 1
        name = f"{self.bait.mark}-neighbour"
        process = await self.neighbour.spawn("python3", ["-c", NEIGHBOUR, self.bait.secret, name, str(key)])
        page = await process.read_output(0, wait=SECONDS)
        words = b"".join(event.data for event in page.events).decode().split()
        self.bait.context |= {
            "neighbour_tcp": int(words[0]), "neighbour_map": words[1:], "neighbour_abstract": name,
            "neighbour_key": key,
        }  # fmt: skip
        await self.boot()

    async def boot(self) -> None:
        """A VM to attack from."""
        self.vm = await VM(host=self.host).start()
        await self.vm.exec("cat > /tmp/payloads.py", stdin=PAYLOADS.read_bytes())

    async def end(self) -> None:
        """Close the VMs."""
        await self.vm.close()
        await self.neighbour.close()

    async def make(self, name: str) -> Made:
        """Make one attempt."""
        if name in HOST_ATTEMPTS:
            return await self._make_here(name)
        attempt = ATTEMPTS[name]
        if not self.vm.running or self.spoilt:
            # The one before may have left another root, or a spawner without descriptors.
            await self.vm.close()
            await self.boot()
        self.spoilt = attempt.family == "init" or "capabilities" in attempt.without
        if attempt.before:
            prepared = await self.vm.exec(attempt.before, user="root", timeout=SECONDS)
            if prepared.exit_code and not shutil.which("setcap"):
                raise LookupError(f"{attempt.before}: {prepared.stderr}")
        if attempt.family == "init":
            await self.vm.files.exists("/")  # so that a file worker is there
        context = json.dumps({**self.bait.context, "name": name})
        try:
            result = await self.vm.exec_file(
                "python3", ["-B", "/tmp/payloads.py", name, context], user=attempt.user, timeout=SECONDS
            )
            said = result.stdout + result.stderr[-300:]
        except AgentOSError as error:
            said = f"{type(error).__name__}: {error.message}"
        return await self._judge(attempt, said), said.strip()[:200]

    async def _judge(self, attempt: Attempt, said: str) -> bool:
        escaped = said.startswith("ESCAPED") and not said.startswith("ESCAPED None")
        match attempt.proof:
            case "secret":
                return self.bait.secret in said
            case "effect":
                return bool(self.bait.effect(attempt.name))
            case "ends":
                return self._has_ended()
            case "neighbour":
                code = "import ctypes; print(ctypes.CDLL(None).inotify_init1(0))"
                answer = await self.neighbour.exec_file("python3", ["-c", code])
                return escaped and answer.stdout == "-1\n"
        return escaped

    def _has_ended(self) -> bool:
        if not self.vm.running:
            return True
        try:
            code = self.bait.victim.wait(0.2)
        except subprocess.TimeoutExpired:
            return False
        self.bait.end_victim()
        self.bait.start_victim()
        return code == -signal.SIGKILL

    async def _make_here(self, name: str) -> Made:
        try:
            said = await HOST_ATTEMPTS[name](self)
        except (AgentOSError, LookupError) as error:
            said = f"kept in: {type(error).__name__}: {error}"
        if HOST_TABLE[name].proof == "secret":
            return self.bait.secret in said, said[:200]
        if HOST_TABLE[name].proof == "kernel":
            return said.startswith("ESCAPED"), said[:200]
        found = self.bait.effect(name)
        return bool(found), (found or said)[:200]


# ---------------------------------------------------------------- attempts in which the host takes part

HOST_ATTEMPTS: dict[str, HostAttempt] = {}
HOST_TABLE: dict[str, Attempt] = {}


def through_the_api(
    *without: str, proof: str, modes: tuple[str, ...] = ROOT
) -> Callable[[HostAttempt], HostAttempt]:
    """Put an attempt into the table for which the guest lays a trap and the host's API walks in."""

    def add(body: HostAttempt) -> HostAttempt:
        name = body.__name__
        HOST_ATTEMPTS[name] = body
        unpromised = ("single",) if "file worker's ids" in without else ()  # there root is a name only
        HOST_TABLE[name] = Attempt(
            name, "files", lambda _: None, without, "agentos", proof, modes, unpromised=unpromised
        )
        return body

    return add


WALK = "files by a worker in the VM"


async def _link(stage: Stage, target: str, name: str = "trap") -> str:
    await stage.vm.exec(f"rm -rf ~/{name}; ln -s {target} ~/{name}")
    return f"/home/agentos/{name}"


@through_the_api(WALK, proof="secret")
async def read_through_link(stage: Stage) -> str:
    return (await stage.vm.files.read_file(await _link(stage, stage.bait.path))).decode()


@through_the_api(WALK, proof="secret")
async def stream_through_link_to_directory(stage: Stage) -> str:
    trap = await _link(stage, stage.bait.directory)
    return b"".join([piece async for piece in stage.vm.files.read_file_stream(f"{trap}/secret")]).decode()


SWAPPING_SECONDS = 2.0
SWAP = """
import ctypes, os, sys
os.makedirs("swap/a", exist_ok=True)
open("swap/a/secret", "w").write("harmless")
os.path.lexists("swap/b") or os.symlink(sys.argv[1], "swap/b")
exchange = ctypes.CDLL(None).renameat2
print("swapping", flush=True)
while True:
    exchange(-100, b"swap/a", -100, b"swap/b", 2)
"""


@through_the_api(WALK, proof="secret")
async def read_while_directory_and_link_change_places(stage: Stage) -> str:
    process = await stage.vm.spawn("python3", ["-c", SWAP, stage.bait.directory])
    await process.read_output(0, wait=SECONDS)
    said = ""
    # A number of tries would do only where the process gets its turn often enough: on a busy machine it may not.
    end = time.monotonic() + SWAPPING_SECONDS
    while stage.bait.secret not in said and time.monotonic() < end:
        with suppress(AgentOSError):
            said = (await stage.vm.files.read_file("/home/agentos/swap/a/secret")).decode()
    await process.kill()
    return said


@through_the_api(WALK, proof="effect")
async def write_below_linked_directory(stage: Stage) -> str:
    trap = await _link(stage, stage.bait.directory)
    await stage.vm.files.write_file(f"{trap}/write_below_linked_directory", "owned")
    return "written"


@through_the_api(WALK, proof="effect")
async def mkdir_below_linked_directory(stage: Stage) -> str:
    await stage.vm.files.mkdir(f"{await _link(stage, stage.bait.directory)}/mkdir_below_linked_directory")
    return "made"


@through_the_api(WALK, proof="kernel")
async def list_linked_directory(stage: Stage) -> str:
    names = await stage.vm.files.readdir(await _link(stage, stage.bait.directory))
    return f"ESCAPED {names}" if "private" in names else str(names)


@through_the_api(WALK, proof="kernel")
async def stat_below_linked_directory(stage: Stage) -> str:
    found = await stage.vm.files.stat(f"{await _link(stage, stage.bait.directory)}/private")
    return f"ESCAPED {found.size} bytes"


@through_the_api(WALK, proof="kernel")
async def delete_below_linked_directory(stage: Stage) -> str:
    doomed = stage.bait.precious()
    with suppress(AgentOSError):
        await stage.vm.files.delete_file(f"{await _link(stage, stage.bait.directory)}/doomed")
    return "ESCAPED deleted" if stage.bait.is_gone(doomed) else "still there"


@through_the_api(WALK, proof="effect")
async def move_below_linked_directory(stage: Stage) -> str:
    trap = await _link(stage, stage.bait.directory)
    await stage.vm.files.write_file("/home/agentos/mine", "owned")
    await stage.vm.files.move("/home/agentos/mine", f"{trap}/move_below_linked_directory")
    return "moved"


@through_the_api("file worker's ids", proof="secret", modes=("root", "subuid"))
async def read_a_file_of_the_vms_root(stage: Stage) -> str:
    await stage.vm.exec(f"umask 77; echo {stage.bait.secret} > /root/private", user="root")
    return (await stage.vm.files.read_file(await _link(stage, "/root/private"))).decode()


@through_the_api("mount targets without symlinks", proof="effect", modes=("root", "single"))
async def planted_symlink_as_mount_target(stage: Stage) -> str:
    name, directory = "planted_symlink_as_mount_target", stage.bait.directory
    spec = VmSpec(storage=f"{directory}/storage-{name}")
    try:
        async with VM(spec=spec, host=stage.host) as vm:
            await vm.exec(f"ln -s {directory} ~/data")
        mounts = (Mount("/usr/share", f"/home/agentos/data/{name}"),)
        async with VM(spec=VmSpec(storage=spec.storage, mounts=mounts), host=stage.host):
            return "booted"
    finally:
        factory = await stage.host.ready()
        await asyncio.to_thread(factory.remove_tree, str(spec.storage))


ALL = {**ATTEMPTS, **HOST_TABLE}


async def run(names: list[str]) -> None:
    """Make the attempts one after another."""
    with Bait() as bait:
        async with Host() as host:
            stage = Stage(host, bait)
            await stage.begin()
            try:
                for name in names:
                    success, seen = await stage.make(name)
                    print(json.dumps([name, success, seen]), flush=True)
            finally:
                await stage.end()


def mode() -> str:
    """How VMs get their ids here: root, subuid or single."""

    async def found() -> str:
        async with Host() as host:
            return (await host.ready()).facts.mode

    return asyncio.run(found())


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1:] or list(ALL)))
