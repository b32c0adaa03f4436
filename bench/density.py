"""A thousand live VMs: what each weighs, and whether the last takes longer to make than the first."""

from __future__ import annotations

import asyncio
import resource
import statistics
import time

from agentos import VM, Host
from bench.creation import create_and_echo
from bench.figures import Bar, Options, Result, available_kib, summary


async def measure(options: Options) -> Result:
    """`count` live VMs: does the last take longer to create than the first, and what does each weigh?"""
    count = options.vms
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


def bars(result: Result) -> list[Bar]:
    """None: creation has them."""
    return []
