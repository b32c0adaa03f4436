"""What a new VM costs, up to the first output of a program in it, beside bubblewrap."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import time

from agentos import VM, Host
from bench.figures import Bar, Options, Result, clocked, on_host, summary

BWRAP = shlex.split(
    "bwrap --unshare-all --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib "
    "--symlink usr/lib64 /lib64 --proc /proc --dev /dev --tmpfs /tmp echo hi"
)


async def create_and_echo(host: Host) -> float:
    """Seconds from nothing to the first output of a new VM; its end is not counted."""
    began = time.perf_counter()
    vm = await VM(host=host).start()
    result = await vm.exec("echo hi")
    took = time.perf_counter() - began
    assert result.stdout == "hi\n", result
    await vm.close()
    return took


async def measure(options: Options) -> Result:
    """A new VM and its first echo: with a pool of two, without, and bubblewrap with the same namespaces."""
    n = options.samples(100)
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
    result: Result = {name: summary(values) for name, values in samples.items()}
    if has_bwrap:
        result["ratio pool / bwrap"] = result["pool of 2"]["median_ms"] / result["bwrap"]["median_ms"]
    return result


def bars(result: Result) -> list[Bar]:
    """For the plot."""
    shown = [
        Bar("new VM + echo, pool", result["pool of 2"], "new VM"),
        Bar("new VM + echo", result["no pool"], "new VM"),
    ]
    if "bwrap" in result:
        shown.append(Bar("bwrap + echo", result["bwrap"], "host"))
    return shown
