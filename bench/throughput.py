"""How fast a process's output arrives, beside a bare pipe."""

from __future__ import annotations

import os
import statistics
import subprocess

from agentos import VM
from bench.figures import Bar, Options, Result, aclocked, clocked


async def measure(options: Options) -> Result:
    """stdout of a process, through the log, against a bare pipe that Python reads."""
    rounds = options.samples(8)
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
    result: Result = {
        f"{name} MB/s": size / statistics.median(values) / 1e6 for name, values in samples.items()
    }
    result["n"] = rounds
    result["ratio spawn / bare pipe"] = result["spawn MB/s"] / result["bare pipe MB/s"]
    return result


def bars(result: Result) -> list[Bar]:
    """None: these are no times."""
    return []
