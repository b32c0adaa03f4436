"""How soon a key that is typed into a shell comes back."""

from __future__ import annotations

import asyncio
import time

from agentos import VM
from bench.figures import Bar, Options, Result, summary


async def measure(options: Options) -> Result:
    """From a key typed to its echo read: the terminal's own (cat), and bash's line editor."""
    n = options.samples(400)
    result: Result = {}
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


def bars(result: Result) -> list[Bar]:
    """For the plot."""
    return [Bar("key to echo (pty)", result["cat"], "running VM")]
