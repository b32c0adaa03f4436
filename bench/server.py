"""What a server and its clients cost, beside bare processes and pipes on the host.

    python -m bench.server [--quick] [--only exec]

Each figure is taken in turn with what it is compared to, in one run. Writes server.json and server.png.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

from agentos import create_client
from agentos.client.aio import Agent
from agentos.client.connection import Connection
from agentos.wire.encodings import BARE
from agentos.wire.messages import SubscriptionRequest
from bench.figures import ECHO, Options, Result, aclocked, clocked, on_host, summary
from bench.serving import Serving, serving

HERE = Path(__file__).resolve().parent
MIB = 1024 * 1024


class PlainHttp:
    """A connection that stays open, and JSON: what it takes without a client library."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._path = f"/gateway/vm/action/exec?rvt-method=getOrCreate&rvt-key={key}"

    def exec(self, command: str) -> str:
        """The stdout of a command."""
        self._connection.request("POST", self._path, json.dumps({"args": [command]}))
        answer = json.loads(self._connection.getresponse().read())
        return str(answer["output"]["stdout"])

    def close(self) -> None:
        """End it."""
        self._connection.close()


async def measure_exec(server: Serving, options: Options) -> Result:
    """`echo hi`: by `subprocess.run` on the host, over HTTP, with the Python client, and over an open WebSocket."""
    samples: dict[str, list[float]] = {"host sh": [], "HTTP": [], "Python client": [], "WebSocket": []}
    async with create_client(server.url) as client:
        agent = client.vm.get_or_create("exec")
        plain = PlainHttp(server.port, "exec")

        def over_http() -> None:
            assert plain.exec("echo hi") == "hi\n"

        async def run(vm: Agent | Connection) -> None:
            assert (await vm.exec("echo hi")).stdout == "hi\n"

        async with agent.connect() as connection:
            for _ in range(20):
                over_http()
                await run(agent)
                await run(connection)
            for _ in range(options.samples(400)):
                samples["host sh"].append(clocked(lambda: on_host(ECHO)))
                samples["HTTP"].append(clocked(over_http))
                samples["Python client"].append(await aclocked(lambda: run(agent)))
                samples["WebSocket"].append(await aclocked(lambda: run(connection)))
        plain.close()
    result: Result = {name: summary(values) for name, values in samples.items()}
    for name in ("HTTP", "Python client", "WebSocket"):
        result[f"ratio {name} / host sh"] = result[name]["median_ms"] / result["host sh"]["median_ms"]
    return result


async def measure_first(server: Serving, options: Options) -> Result:
    """The first action on a new key: the record, the VM, the command."""
    samples = []
    for number in range(options.samples(60)):
        plain = PlainHttp(server.port, f"first-{number}")
        await asyncio.sleep(0.1)  # as an agent's requests come, not back to back
        samples.append(clocked(lambda plain=plain: plain.exec("echo hi")))  # type: ignore[misc]
        plain.close()
    return {"first action on a new key": summary(samples)}


def bare_pipe(size: int) -> None:
    """Read `size` bytes of a process on the host, as Python does it."""
    with subprocess.Popen(
        ["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        left = size
        while left:
            left -= len(os.read(process.stdout.fileno(), 65536))


async def by_events(connection: Connection, size: int) -> None:
    """The same as processOutput events."""
    counts: dict[int, int] = {}
    ended: asyncio.Queue[int] = asyncio.Queue()

    def on_output(event: Any) -> None:
        counts[event.pid] = counts.get(event.pid, 0) + len(event.data)

    connection.on("processOutput", on_output)
    connection.on("processExit", lambda event: ended.put_nowait(event.pid))
    process = await connection.spawn("head", ["-c", str(size), "/dev/zero"], lossless=True)
    while await ended.get() != process.pid:
        pass
    connection.off("processOutput")
    connection.off("processExit")
    assert counts[process.pid] == size, counts


async def by_output(vm: Agent | Connection, size: int) -> None:
    """The same with `process.output()`."""
    process = await vm.spawn("head", ["-c", str(size), "/dev/zero"], lossless=True)
    total = 0
    async for chunk in process.output():
        total += len(chunk.data)
    assert total == size


async def measure_throughput(server: Serving, options: Options) -> Result:
    """A process's stdout to one Python client, beside a bare pipe that Python reads."""
    size = 512 * MIB
    samples: dict[str, list[float]] = {
        "bare pipe": [], "events": [], "output() over WebSocket": [], "output() over HTTP": [],
    }  # fmt: skip
    async with create_client(server.url) as client:
        agent = client.vm.get_or_create("throughput")
        await agent.exec("true")
        for _ in range(options.samples(6)):
            samples["bare pipe"].append(clocked(lambda: bare_pipe(size)))
            async with agent.connect() as connection:
                samples["events"].append(await aclocked(lambda c=connection: by_events(c, size)))  # type: ignore[misc]
            async with agent.connect() as connection:
                seconds = await aclocked(lambda c=connection: by_output(c, size))  # type: ignore[misc]
                samples["output() over WebSocket"].append(seconds)
            samples["output() over HTTP"].append(await aclocked(lambda: by_output(agent, size)))
    result: Result = {"n": len(samples["events"]), "MB": size / 1e6}
    for name, values in samples.items():
        result[name] = {
            "median MB/s": size / statistics.median(values) / 1e6, "slowest MB/s": size / max(values) / 1e6,
        }  # fmt: skip
    for name in list(samples)[1:]:
        result[f"ratio {name} / bare pipe"] = result[name]["median MB/s"] / result["bare pipe"]["median MB/s"]
    return result


async def measure_subscribers(server: Serving, options: Options) -> Result:
    """One process that waits for its readers, told to a hundred connections; each compares every byte."""
    blob = random.Random(1).randbytes(16 * MIB)
    most, rounds = 100, options.samples(4)
    seconds = []
    async with create_client(server.url) as client:
        agent = client.vm.get_or_create("subscribers")
        await agent.files.write_file("blob", blob)
        connections = [await agent.connect().__aenter__() for _ in range(most)]
        right: dict[int, dict[int, int]] = {}
        everybody = asyncio.Event()
        left = set(range(most))

        def on_output(number: int, event: Any) -> None:
            at = right.setdefault(event.pid, {}).get(number, 0)
            assert event.offset == at, (number, event.offset, at)
            assert event.data == blob[at : at + len(event.data)], number
            right[event.pid][number] = at + len(event.data)

        def on_exit(number: int) -> None:
            left.discard(number)
            if not left:
                everybody.set()

        for number, connection in enumerate(connections):
            connection.on("processOutput", lambda event, n=number: on_output(n, event))
            connection.on("processExit", lambda event, n=number: on_exit(n))
        await asyncio.gather(*(connection.files.exists("/") for connection in connections))
        for _ in range(rounds):
            left.update(range(most))
            everybody.clear()
            began = time.perf_counter()
            process = await agent.spawn("cat", ["blob"], lossless=True)
            await everybody.wait()
            seconds.append(time.perf_counter() - began)
            assert right.pop(process.pid) == dict.fromkeys(range(most), len(blob))
        for connection in connections:
            await connection.close()
    return {
        "subscribers": most, "MB each": len(blob) / 1e6, "n": rounds, "lost bytes": 0,
        "median MB/s in all": most * len(blob) / statistics.median(seconds) / 1e6,
    }  # fmt: skip


async def measure_idle(server: Serving, options: Options) -> Result:
    """Resident memory of the server for each connection that is open and silent."""
    most = 1000
    async with create_client(server.url) as client:
        await client.vm.get_or_create("idle").exec("true")
    url = f"ws://127.0.0.1:{server.port}/gateway/vm/connect?rvt-method=getOrCreate&rvt-key=idle"
    protocols: Any = ["rivet", "rivet_encoding.bare"]

    async def opened() -> Any:
        websocket = await connect(
            url, subprotocols=protocols, compression=None, proxy=None, ping_interval=None
        )
        await websocket.recv()
        return websocket

    warm = [await opened() for _ in range(20)]
    before = server.rss_kib()
    sockets = [await opened() for _ in range(most)]
    each = (server.rss_kib() - before) / most
    for websocket in (*warm, *sockets):
        websocket.transport.abort()
    return {"connections": most, "KiB each": each}


async def measure_stalled(server: Serving, options: Options) -> Result:
    """A subscriber that never reads, while another one follows what the process writes."""
    size = 256 * MIB
    url = f"ws://127.0.0.1:{server.port}/gateway/vm/connect?rvt-method=getOrCreate&rvt-key=stalled"
    protocols: Any = ["rivet", "rivet_encoding.bare"]
    async with create_client(server.url) as client:
        agent = client.vm.get_or_create("stalled")

        async def follow() -> None:
            process = await agent.spawn("head", ["-c", str(size), "/dev/zero"])
            async for _ in process.output():
                pass

        alone, beside = [], []
        before = after = 0
        for _ in range(options.samples(8)):
            alone.append(await aclocked(follow))
            before = server.rss_kib()
            stalled = await connect(url, subprotocols=protocols, compression=None, proxy=None, max_queue=1)
            await stalled.send(BARE.encode_frame(SubscriptionRequest("processOutput", True)))
            stalled.transport.pause_reading()
            await asyncio.sleep(0.1)
            beside.append(await aclocked(follow))
            after = max(after, server.rss_kib() - before)
            stalled.transport.abort()
    return {
        "MB that passed": size / 1e6, "MiB more at the server": after / 1024, "n": len(alone),
        "ratio of the reader's time beside it / alone": statistics.median(beside) / statistics.median(alone),
    }  # fmt: skip


SUBJECTS: dict[str, Callable[[Serving, Options], Any]] = {
    "exec": measure_exec,
    "first": measure_first,
    "throughput": measure_throughput,
    "subscribers": measure_subscribers,
    "idle": measure_idle,
    "stalled": measure_stalled,
}


def plot(results: Result, path: Path) -> None:
    """Times on the left, streams on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.6))
    times = {name: one for name, one in (results["exec"] | results["first"]).items() if isinstance(one, dict)}
    left.barh(list(times)[::-1], [one["median_ms"] for one in times.values()][::-1], color="#2f6fdb")
    for index, one in enumerate(reversed(times.values())):
        text = f" {one['median_ms']:.2f} ms, p99 {one['p99_ms']:.2f} (n={one['n']})"
        left.text(one["median_ms"], index, text, va="center")
    left.set_xlim(right=max(one["median_ms"] for one in times.values()) * 1.7)
    left.set_xlabel("median, milliseconds")
    left.set_title('"echo hi"')
    rates = {name: one["median MB/s"] for name, one in results["throughput"].items() if isinstance(one, dict)}
    rates["100 subscribers, in all"] = results["subscribers"]["median MB/s in all"]
    right.barh(list(rates)[::-1], list(rates.values())[::-1], color="#1f9d63")
    for index, rate in enumerate(reversed(rates.values())):
        right.text(rate, index, f" {rate:.0f} MB/s", va="center")
    right.set_xlim(right=max(rates.values()) * 1.3)
    right.set_xlabel("median, MB/s")
    right.set_title("a process's stdout, to one Python client")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.server", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples")
    parser.add_argument("--only", action="append", choices=SUBJECTS, help="measure this alone (repeatable)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of server.json and server.png")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kept = arguments.out / "server.json"
    results: Result = json.loads(kept.read_text()) if arguments.only and kept.exists() else {}
    for name in arguments.only or SUBJECTS:
        with serving() as server:
            results[name] = asyncio.run(SUBJECTS[name](server, Options(quick=arguments.quick)))
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    results["machine"] = {
        "cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }  # fmt: skip
    kept.write_text(json.dumps(results, indent=2) + "\n")
    if set(SUBJECTS) <= set(results):
        plot(results, arguments.out / "server.png")


if __name__ == "__main__":
    main()
