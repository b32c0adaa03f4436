"""What a VM feels of another one that uses up all it may: its exec, with and without that, in turn.

And how soon the attacked VM itself answers, while it goes on and right after it was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

from agentos import VM, Host, Process
from agentos.errors import AgentOSError
from bench.figures import Bar, Options, Result, aclocked, summary

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))
from attacks import ATTACKS, BY_NAME, Attack

_FULL_SECONDS = 1.5
_INSIDE = 5
_ROUNDS = 6
"""Short ones, since the machine's speed changes within seconds, and both sides of a ratio are to have the same."""
_PAUSE_SECONDS = 0.005
"""Between the neighbour's commands: an agent's do not come back to back."""


async def _execs(vm: VM, n: int) -> list[float]:
    samples = []
    for _ in range(n):
        await asyncio.sleep(_PAUSE_SECONDS)
        samples.append(await aclocked(lambda: vm.exec("echo hi")))
    return samples


async def _inside(vm: VM, n: int) -> list[float]:
    """As `_execs`, where a command may be what an attack hits: then its error is the answer."""

    async def answer() -> None:
        with contextlib.suppress(AgentOSError):
            await vm.exec("echo hi")

    return [await aclocked(answer) for _ in range(n)]


async def _until_full(process: Process) -> None:
    """Until it says that it has met its limit; some never do."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FULL_SECONDS):
            async for chunk in process.output():
                if b"full" in chunk.data:
                    await asyncio.sleep(0.2)
                    return
            await asyncio.sleep(_FULL_SECONDS)


async def _round(host: Host, neighbour: VM, attack: Attack, n: int, found: dict[str, list[float]]) -> None:
    found["undisturbed"] += await _execs(neighbour, n)
    async with VM(host=host) as vm:
        await vm.exec("true")
        process = await vm.spawn("python3", ["-c", attack.source], timeout=60)
        await _until_full(process)
        found["disturbed"] += await _execs(neighbour, n)
        found["attacked, meanwhile"] += await _inside(vm, _INSIDE)
        await process.kill()
        found["attacked, after"] += await _inside(vm, 1)


async def measure(options: Options) -> Result:
    """For each attack: the neighbour's exec undisturbed and disturbed, and the attacked VM's own."""
    n = options.samples(28)
    result: dict[str, Any] = {}
    async with Host() as host, VM(host=host) as neighbour:
        await _execs(neighbour, 20)
        for attack in [BY_NAME[name] for name in options.attacks] or ATTACKS:
            found: dict[str, list[float]] = {
                "undisturbed": [], "disturbed": [], "attacked, meanwhile": [], "attacked, after": [],
            }  # fmt: skip
            for _ in range(_ROUNDS):
                await _round(host, neighbour, attack, n, found)
            one: Result = {name: summary(values) for name, values in found.items()}
            one["ratio"] = one["disturbed"]["median_ms"] / one["undisturbed"]["median_ms"]
            result[attack.name] = one
            print(
                f"  {attack.name:18} {one['ratio']:.2f} x  p99 {one['disturbed']['p99_ms']:.1f} ms  "
                f"itself {one['attacked, meanwhile']['median_ms']:.0f}, "
                f"then {one['attacked, after']['p99_ms']:.0f} ms",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return merged({}, result)


def merged(earlier: Result, result: Result) -> Result:
    """`earlier` with the attacks of `result` in place of its own, and the worst ratio of all."""
    attacks = {name: one for name, one in (earlier | result).items() if isinstance(one, dict)}
    return {**attacks, "worst ratio": max(one["ratio"] for one in attacks.values())}


def bars(result: Result) -> list[Bar]:
    """For the plot: the three that disturb most."""
    attacks = [name for name, one in result.items() if isinstance(one, dict)]
    worst = sorted(attacks, key=lambda name: result[name]["ratio"])[-3:]
    return [Bar(f"exec beside {name}", result[name]["disturbed"], "running VM") for name in worst]
