"""What an exec costs beside the same command started by `subprocess.run` on the host."""

from __future__ import annotations

from agentos import VM
from bench.figures import ECHO, Bar, Options, Result, aclocked, clocked, on_host, summary


async def measure(options: Options) -> Result:
    """`exec("echo hi")` in a VM against `subprocess.run(["sh", "-c", "echo hi"])` on the host, in turn."""
    n = options.samples(400)
    samples: dict[str, list[float]] = {"host sh": [], "host bash": [], "exec": [], "exec through bash": []}
    async with VM() as vm:
        for _ in range(20):
            await vm.exec("echo hi")
        for _ in range(n):
            samples["host sh"].append(clocked(lambda: on_host(ECHO)))
            samples["exec"].append(await aclocked(lambda: vm.exec("echo hi")))
            samples["host bash"].append(clocked(lambda: on_host(["bash", "-c", "echo hi"])))
            samples["exec through bash"].append(await aclocked(lambda: vm.exec("echo hi;")))
    result: Result = {name: summary(values) for name, values in samples.items()}
    host = result["host sh"]["median_ms"]
    result["ratio exec / host sh"] = result["exec"]["median_ms"] / host
    result["ratio exec through bash / host sh"] = result["exec through bash"]["median_ms"] / host
    result["ratio exec through bash / host bash"] = (
        result["exec through bash"]["median_ms"] / result["host bash"]["median_ms"]
    )
    return result


def bars(result: Result) -> list[Bar]:
    """For the plot."""
    return [
        Bar("sh on the host", result["host sh"], "host"),
        Bar("exec", result["exec"], "running VM"),
        Bar("exec through bash", result["exec through bash"], "running VM"),
    ]
