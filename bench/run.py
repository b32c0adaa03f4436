"""What it costs, beside what a reader knows: `subprocess.run` on the host, bubblewrap, and the original.

Every figure is taken in turn with what it is compared to, so that the ratios hold on a machine whose speed
drifts. Writes results.json and results.png. `python bench/run.py --quick` takes fewer samples.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agentos import VM, Host, Limits

ECHO = ["sh", "-c", "echo hi"]
BWRAP = shlex.split(
    "bwrap --unshare-all --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib "
    "--symlink usr/lib64 /lib64 --proc /proc --dev /dev --tmpfs /tmp echo hi"
)
HERE = Path(__file__).resolve().parent


def summary(samples: list[float]) -> dict[str, float]:
    """Median and 99th percentile in ms, and how many there were."""
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"median_ms": statistics.median(ordered) * 1000, "p99_ms": p99 * 1000, "n": len(ordered)}


def clocked(call: Callable[[], Any]) -> float:
    """Seconds that `call` takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


async def aclocked(call: Callable[[], Awaitable[Any]]) -> float:
    """Seconds that awaiting `call` takes."""
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


def on_host(argv: list[str]) -> None:
    """Run and check a command on the host."""
    done = subprocess.run(argv, capture_output=True, check=True)
    assert done.stdout == b"hi\n", done


async def bench_exec(n: int) -> dict[str, Any]:
    """`exec("echo hi")` in a VM against `subprocess.run(["sh", "-c", "echo hi"])` on the host, in turn."""
    samples: dict[str, list[float]] = {"host sh": [], "host bash": [], "exec": [], "exec through bash": []}
    async with VM() as vm:
        for _ in range(20):
            await vm.exec("echo hi")
        for _ in range(n):
            samples["host sh"].append(clocked(lambda: on_host(ECHO)))
            samples["exec"].append(await aclocked(lambda: vm.exec("echo hi")))
            samples["host bash"].append(clocked(lambda: on_host(["bash", "-c", "echo hi"])))
            samples["exec through bash"].append(await aclocked(lambda: vm.exec("echo hi;")))
    result: dict[str, Any] = {name: summary(values) for name, values in samples.items()}
    host = result["host sh"]["median_ms"]
    result["ratio exec / host sh"] = result["exec"]["median_ms"] / host
    result["ratio exec through bash / host sh"] = result["exec through bash"]["median_ms"] / host
    result["ratio exec through bash / host bash"] = (
        result["exec through bash"]["median_ms"] / result["host bash"]["median_ms"]
    )
    return result


async def create_and_echo(host: Host) -> float:
    """Seconds from nothing to the first output of a new VM; its end is not counted."""
    began = time.perf_counter()
    vm = await VM(host=host).start()
    result = await vm.exec("echo hi")
    took = time.perf_counter() - began
    assert result.stdout == "hi\n", result
    await vm.close()
    return took


async def bench_create(n: int) -> dict[str, Any]:
    """A new VM and its first echo: with a pool of two, without, and bubblewrap with the same namespaces."""
    samples: dict[str, list[float]] = {"pool of 2": [], "no pool": []}
    has_bwrap = shutil.which("bwrap") is not None
    if has_bwrap:
        samples["bwrap"] = []
    async with Host(pool=2) as pooled, Host() as plain:
        await create_and_echo(pooled)
        await create_and_echo(plain)
        for _ in range(n):
            # The pool's next VM boots in the background: an agent's requests do not come back to back either.
            await asyncio.sleep(0.05)
            samples["pool of 2"].append(await create_and_echo(pooled))
            await asyncio.sleep(0.05)
            samples["no pool"].append(await create_and_echo(plain))
            if has_bwrap:
                await asyncio.sleep(0.05)
                samples["bwrap"].append(clocked(lambda: on_host(BWRAP)))
    result: dict[str, Any] = {name: summary(values) for name, values in samples.items()}
    if has_bwrap:
        result["ratio pool / bwrap"] = result["pool of 2"]["median_ms"] / result["bwrap"]["median_ms"]
    return result


def available_kib() -> int:
    """MemAvailable of the whole machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")


async def bench_many(count: int) -> dict[str, Any]:
    """`count` live VMs: does the last take longer to create than the first, and what does each weigh?"""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with Host() as host:
        await create_and_echo(host)
        before = available_kib()
        vms: list[VM] = []
        took = []
        for _ in range(count):
            began = time.perf_counter()
            vms.append(await VM(host=host).start())
            took.append(time.perf_counter() - began)
        await asyncio.sleep(12)  # until the spawners, which nobody used, are gone
        per_vm = (before - available_kib()) / count / 1024
        for vm in (vms[0], vms[-1]):
            assert (await vm.exec("echo hi")).stdout == "hi\n"
        window = min(100, count // 3)
        first, last = took[:window], took[-window:]
    return {
        "vms": count,
        "first": summary(first),
        "last": summary(last),
        "ratio last / first": statistics.median(last) / statistics.median(first),
        "idle MB per VM": per_vm,
    }


async def bench_throughput(rounds: int) -> dict[str, Any]:
    """stdout of a process, through the log, against a bare pipe that Python reads."""
    size = 1 << 30
    command = ["head", "-c", str(size), "/dev/zero"]

    def bare() -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            left = size
            while left:
                left -= len(os.read(process.stdout.fileno(), 65536))

    async def logged(vm: VM) -> None:
        process = await vm.spawn(command[0], command[1:], lossless=True)
        total = 0
        async for chunk in process.output():
            total += len(chunk.data)
        assert total == size, total

    samples: dict[str, list[float]] = {"bare pipe": [], "spawn": []}
    async with VM() as vm:
        for _ in range(rounds):
            samples["bare pipe"].append(clocked(bare))
            samples["spawn"].append(await aclocked(lambda: logged(vm)))
    result: dict[str, Any] = {
        f"{name} MB/s": size / statistics.median(values) / 1e6 for name, values in samples.items()
    }
    result["n"] = rounds
    result["ratio spawn / bare pipe"] = result["spawn MB/s"] / result["bare pipe MB/s"]
    return result


async def bench_terminal(n: int) -> dict[str, Any]:
    """From a key typed to its echo read: the terminal's own (cat), and bash's line editor."""
    result: dict[str, Any] = {}
    async with VM() as vm:
        for name in ("cat", "bash"):
            shell = await vm.open_shell(name)
            cursor = 0
            if name == "bash":
                page = await shell.read(0, wait=5)
                await asyncio.sleep(0.2)
                cursor = (await shell.read(page.cursor)).cursor
            samples = []
            for _ in range(n):
                began = time.perf_counter()
                await shell.write("x")
                page = await shell.read(cursor, wait=5)
                samples.append(time.perf_counter() - began)
                cursor = page.cursor
                if len(samples) % 50 == 0:
                    await shell.write("\x15")  # a line that grew too long would be what is measured
                    await asyncio.sleep(0.05)
                    cursor = (await shell.read(cursor)).cursor
            result[name] = summary(samples)
            await shell.close()
    return result


def bench_original(folder: str | None) -> dict[str, Any] | None:
    """Create, create and echo, warm echo, of @rivet-dev/agentos-core, where npm can install it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or scratch
        if not (Path(place) / "node_modules/@rivet-dev/agentos-core").is_dir():
            install = [
                "npm",
                "install",
                "--no-fund",
                "--no-audit",
                "--prefix",
                place,
                "@rivet-dev/agentos-core@0.2.21",
            ]
            if subprocess.run(install, capture_output=True).returncode:
                return None
        script = Path(place) / "original.mjs"
        shutil.copyfile(HERE / "original.mjs", script)
        done = subprocess.run(
            ["node", str(script), "5"], capture_output=True, text=True, cwd=place, timeout=300
        )
    if done.returncode:
        return None
    data = json.loads(done.stdout.splitlines()[-1])
    return {name: summary([value / 1000 for value in values]) for name, values in data.items()}


def plot(results: dict[str, Any], path: Path) -> None:
    """The medians as bars, on a logarithmic scale, since the original is two orders away."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        ("sh on the host", results["exec"]["host sh"], "#9aa5b1"),
        ("exec", results["exec"]["exec"], "#2f6fdb"),
        ("exec through bash", results["exec"]["exec through bash"], "#2f6fdb"),
        ("new VM + echo, pool", results["create"]["pool of 2"], "#1f9d63"),
        ("new VM + echo", results["create"]["no pool"], "#1f9d63"),
    ]
    if "bwrap" in results["create"]:
        bars.append(("bwrap + echo", results["create"]["bwrap"], "#9aa5b1"))
    bars.append(("key to echo (pty)", results["terminal"]["cat"], "#2f6fdb"))
    if results.get("original"):
        bars.append(("original: warm echo", results["original"]["warmEcho"], "#d08a2e"))
        bars.append(("original: new VM + echo", results["original"]["createEcho"], "#d08a2e"))
    figure, axes = plt.subplots(figsize=(9, 4.6))
    names = [name for name, _, _ in bars][::-1]
    medians = [value["median_ms"] for _, value, _ in bars][::-1]
    axes.barh(names, medians, color=[colour for _, _, colour in bars][::-1])
    for index, (_, value, _) in enumerate(bars[::-1]):
        axes.text(
            value["median_ms"] * 1.08, index, f"{value['median_ms']:.2f} ms  (n={value['n']})", va="center"
        )
    axes.set_xscale("log")
    axes.set_xlim(right=max(medians) * 8)
    axes.set_xlabel("median, milliseconds (logarithmic)")
    axes.set_title("agentos beside bare processes, bubblewrap and the original")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


async def measure(quick: bool, vms: int) -> dict[str, Any]:
    """All of it, one after the other."""
    scale = 4 if quick else 1
    results: dict[str, Any] = {}
    for name, run in (
        ("exec", lambda: bench_exec(400 // scale)),
        ("create", lambda: bench_create(100 // scale)),
        ("throughput", lambda: bench_throughput(5 if not quick else 2)),
        ("terminal", lambda: bench_terminal(400 // scale)),
        ("many", lambda: bench_many(vms)),
    ):
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        results[name] = await run()
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples")
    parser.add_argument("--vms", type=int, default=1000, help="live VMs in the last measure (default 1000)")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--original", help="a folder where the original is, or is to be, installed by npm")
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments.quick, arguments.vms))
    print("measuring the original ...", file=sys.stderr, flush=True)
    results["original"] = bench_original(arguments.original)
    results["machine"] = {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "limits": str(Limits()),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, arguments.out / "results.png")
    print(json.dumps({key: value for key, value in results.items() if key != "machine"}, indent=2))


if __name__ == "__main__":
    main()
