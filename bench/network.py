"""What a VM's network costs beside the host's own: a download, a connection, a boot, and memory.

Run in the small internet of the tests, which is a process of its own: `python bench/network.py SAMPLES` within it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from agentos import VM, Host  # noqa: E402
from bench.figures import Bar, Options, Result, aclocked, available_kib, summary  # noqa: E402

INTERNET = ROOT / "tests/e2e/network/internet.py"
SERVER = "198.35.26.96"
BYTES = 1 << 30
PYTHON = "/usr/bin/python3"

DOWNLOAD = f"""
import socket, time
buffer = bytearray(1 << 20)
sock = socket.create_connection(("{SERVER}", 19))
sock.recv_into(buffer)
began, left = time.perf_counter(), {BYTES}
while left > 0:
    left -= sock.recv_into(buffer)
print(time.perf_counter() - began)
"""
CONNECT = f"""
import socket, sys, time
for _ in range(int(sys.argv[1])):
    began = time.perf_counter()
    with socket.create_connection(("{SERVER}", 7)) as sock:
        sock.sendall(b"x")
        sock.recv(1)
        print(time.perf_counter() - began)
"""


async def measure(options: Options) -> Result:
    """In namespaces of its own, which a process with threads cannot enter."""
    command = [sys.executable, str(INTERNET), str(Path(__file__)), str(options.samples(200))]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    result: Result = json.loads(done.stdout)
    return result


async def on_host(code: str, *arguments: str) -> list[float]:
    """What a program prints that runs on the host, as numbers."""
    process = await asyncio.create_subprocess_exec(PYTHON, "-c", code, *arguments, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return [float(line) for line in output.split()]


async def in_vm(vm: VM, code: str, *arguments: str) -> list[float]:
    """The same in a VM."""
    result = (await vm.exec_file(PYTHON, ["-c", code, *arguments])).check()
    return [float(line) for line in result.stdout.split()]


async def inside(samples: int) -> Result:
    """All of it, each figure in turn with what it is compared to."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    result: Result = {}
    async with Host() as host:
        async with VM(network="host-egress", host=host) as vm:
            await in_vm(vm, DOWNLOAD)
            direct, through = [], []
            for _ in range(max(3, samples // 20)):
                direct += await on_host(DOWNLOAD)
                through += await in_vm(vm, DOWNLOAD)
            result["download GB/s"] = {
                "direct": BYTES / 1e9 / statistics.median(direct),
                "VM": BYTES / 1e9 / statistics.median(through),
                "n": len(direct),
            }
            result["ratio download"] = statistics.median(direct) / statistics.median(through)
            direct, through = [], []
            for _ in range(10):
                direct += await on_host(CONNECT, str(samples // 5))
                through += await in_vm(vm, CONNECT, str(samples // 5))
            result["connect and echo"] = {"direct": summary(direct), "VM": summary(through)}
        result["create"] = await creation(host, samples)
        result["idle MB per VM"] = {name: await weight(host, name) for name in ("none", "host-egress")}
    return result


async def creation(host: Host, samples: int) -> Result:
    """A VM's boot with and without."""
    took: dict[str, list[float]] = {"none": [], "host-egress": [], "allow-list": []}
    for _ in range(samples):
        for name, network in (
            ("none", "none"),
            ("host-egress", "host-egress"),
            ("allow-list", ["pypi.org:443"]),
        ):
            vm = VM(network=network, host=host)
            took[name].append(await aclocked(vm.start))
            await vm.close()
    return {name: summary(times) for name, times in took.items()}


async def weight(host: Host, network: str) -> float:
    """Of an idle VM, over three hundred."""
    await asyncio.sleep(10)  # the kernel takes its time to free the network namespaces of VMs that have ended
    before = available_kib()
    vms = [await VM(network=network, host=host).start() for _ in range(300)]
    await asyncio.sleep(12)  # until the spawners, which nobody used, are gone
    used = (before - available_kib()) / 1024 / len(vms)
    for vm in vms:
        await vm.close()
    return used


def bars(result: Result) -> list[Bar]:
    """A connection's cost."""
    both = result["connect and echo"]
    return [
        Bar("connect and echo, host", both["direct"], "host"),
        Bar("connect and echo, VM", both["VM"], "running VM"),
    ]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(inside(int(sys.argv[1])))))
