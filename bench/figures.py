"""Samples -> figures: medians, 99th percentiles and how many there were; and the clocks that take them."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Result = dict[str, Any]
"""What a subject measured, of JSON's types: it is kept in results.json under the subject's name."""

ECHO = ["sh", "-c", "echo hi"]


@dataclass(frozen=True)
class Options:
    """What the command line asks of every subject."""

    quick: bool = False
    """Take a quarter of the samples."""
    vms: int = 1000
    """Live VMs where many are measured."""
    attacks: tuple[str, ...] = ()
    """Those beside which a neighbour is measured, by name; none: all."""
    original: str | None = None
    """A folder where the original is, or is to be, installed."""

    def samples(self, full: int) -> int:
        """`full`, or a quarter of it."""
        return max(2, full // 4) if self.quick else full


@dataclass(frozen=True)
class Bar:
    """One bar of the plot: a summary's median."""

    label: str
    summary: Result
    of: Literal["host", "running VM", "new VM", "original"]


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


def available_kib() -> int:
    """MemAvailable of the whole machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")
