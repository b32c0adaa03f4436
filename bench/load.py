"""Many clients on many VMs at once, every byte checked.

    python -m bench.load --seconds 60 --clients 200 --vms 100 [--cut]

Every client runs verbs in random order: commands, processes with their output followed or told by events, stdin,
files, process lists, shells. With --cut all goes through a proxy that resets connections at random. Fails on any
error, on any byte lost or doubled, on a command that ran twice, and where the server keeps what it should not.
The figures go to load.json, under "plain" or "cut".
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

from agentos import create_client
from bench.cutting import cutting
from bench.figures import Result, summary
from bench.mixture import BLOB_BYTES, Tally, Worker, check_ledger
from bench.serving import Serving, serving

HERE = Path(__file__).resolve().parent


async def _in_groups(calls: list[Any], size: int = 16) -> None:
    """Await all, a few at once: a hundred VMs that boot together would only wait for one another."""
    for start in range(0, len(calls), size):
        await asyncio.gather(*calls[start : start + size])


async def load(server: Serving, url: str, options: argparse.Namespace) -> Result:
    """The whole run: prepare, work, check, clean up."""
    blob = random.Random(0).randbytes(BLOB_BYTES)
    tally = Tally()
    keys = [f"load-{number}" for number in range(options.vms)]
    async with create_client(server.url) as direct:
        agents = {key: direct.vm.get_or_create(key) for key in keys}
        await _in_groups([agent.files.write_file("blob", blob) for agent in agents.values()])
        workers = [
            Worker(url, keys[number % len(keys)], number, blob, tally, cut=options.cut)
            for number in range(options.clients)
        ]
        await _in_groups([worker.start() for worker in workers])
        began = time.monotonic()
        until = began + options.seconds
        await asyncio.gather(*(worker.run(until, options.think) for worker in workers))
        took = time.monotonic() - began
        await asyncio.gather(*(worker.close() for worker in workers))
        busy = {"rss MiB": server.rss_kib() / 1024, "peak MiB": server.peak_kib() / 1024}
        problems: list[str] = []
        for worker in workers:
            files = agents[worker.key].files
            text = await files.read_file(worker.ledger) if await files.exists(worker.ledger) else b""
            problems += check_ledger(worker, text.decode())
        await _in_groups([agent.destroy() for agent in agents.values()])
    for said, count in tally.errors.items():
        problems.append(f"{count} x {said}")
    every = [one for samples in tally.seconds.values() for one in samples]
    return {
        "seconds": took,
        "clients": options.clients,
        "vms": options.vms,
        "calls": len(every),
        "calls a second": len(every) / took,
        "MB checked": tally.bytes / 1e6,
        "verbs": {name: summary(samples) for name, samples in sorted(tally.seconds.items())},
        "unanswered, not asked again": dict(tally.lost),
        "server": busy,
        "problems": problems,
    }


def run(options: argparse.Namespace) -> Result:
    """Start what is needed, run, and look at what the server still holds."""
    with serving() as server, contextlib.ExitStack() as stack:
        before = _warmed_up(server)
        proxy = stack.enter_context(cutting(server.port)) if options.cut else None
        url = proxy.url if proxy else server.url
        result = asyncio.run(load(server, url, options))
        stack.close()
        if proxy:
            result["proxy"] = proxy.result
        left = _settled(server, before) - before
        result["descriptors left"] = left
        if left > 0:
            result["problems"].append(f"the server holds {left} descriptors more than before")
    result["machine"] = {"cpus": os.cpu_count(), "python": sys.version.split()[0], "load": os.getloadavg()[0]}
    return result


def _warmed_up(server: Serving) -> int:
    """The descriptors that an idle server has, once it has served."""

    async def once() -> None:
        async with create_client(server.url) as client:
            agent = client.vm.get_or_create("first")
            await agent.exec("true")
            await agent.destroy()

    asyncio.run(once())
    time.sleep(2)
    return server.descriptors()


def _settled(server: Serving, wanted: int) -> int:
    """The descriptors that it has when nobody asks anything any more."""
    end = time.monotonic() + 30
    while server.descriptors() > wanted and time.monotonic() < end:
        time.sleep(0.2)
    return server.descriptors()


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--vms", type=int, default=100)
    parser.add_argument(
        "--think", type=float, default=0.05, help="mean pause of a client between verbs, seconds"
    )
    parser.add_argument("--cut", action="store_true", help="cut connections at random")
    parser.add_argument("--out", type=Path, default=HERE / "load.json")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    result = run(options)
    print(json.dumps(result, indent=2))
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    kept["cut" if options.cut else "plain"] = result
    options.out.write_text(json.dumps(kept, indent=2) + "\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
