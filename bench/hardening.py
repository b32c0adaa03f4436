"""What the hardening costs: the same measured with a copy of the package from which it has been cut out.

The copy is made by replacing text, and each replacement must hit; it exists for as long as it is measured. Both
variants run at the same time, each in a process of its own, and are asked in turn.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from bench.figures import Bar, Options, Result, summary

SOURCE = Path(__file__).resolve().parents[1] / "src"
CUTS = (
    ("machine/confinement.py", "privileges.drop_bounding(self.last_cap, keep=keep)", "pass"),
    ("machine/confinement.py", "privileges.set_no_new_privs()", "pass"),
    ("machine/confinement.py", "seccomp.load(self.filter_program)", "pass"),
    ("linux/privileges.py", "syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)", "pass"),
    ("machine/plan.py", "for name in facts.read_only:", "for name in ():"),
    ("machine/plan.py", "for name in facts.masked_files:", "for name in ():"),
    ("machine/plan.py", "for name in facts.masked_dirs:", "for name in ():"),
    ("machine/plan.py", '{"hidepid": "invisible"}', "{}"),
)
"""(module, text, what takes its place)"""

_ASKED = """
import asyncio, sys, time, agentos
from agentos import VM, Host

async def main():
    async with Host() as host, VM(host=host) as running:
        for _ in range(20):
            await running.exec("echo hi")
        print("ready " + agentos.__file__, flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            if line == "exec\\n":
                assert (await running.exec("echo hi")).stdout == "hi\\n"
                took = time.perf_counter() - began
            else:
                vm = await VM(host=host).start()
                took = time.perf_counter() - began
                await vm.close()
            print(took, flush=True)

asyncio.run(main())
"""


def without_hardening(directory: str) -> Path:
    """A copy of the package's source below `directory`, with everything in CUTS cut out of it."""
    copy = Path(directory, "src")
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for module, text, instead in CUTS:
        path = copy / "agentos" / module
        content = path.read_text(encoding="utf-8")
        assert content.count(text) == 1, f"{module}: {text!r} is there {content.count(text)} times"
        path.write_text(content.replace(text, instead), encoding="utf-8")
    return copy


class _Variant:
    def __init__(self, source: Path) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", _ASKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(source)},
        )  # fmt: skip
        ready = self._pipe(self.process.stdout).readline()
        assert ready == f"ready {source}/agentos/__init__.py\n", ready

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def ask(self, what: str) -> float:
        stdin = self._pipe(self.process.stdin)
        stdin.write(what + "\n")
        stdin.flush()
        return float(self._pipe(self.process.stdout).readline())

    def close(self) -> None:
        self._pipe(self.process.stdin).close()
        self.process.wait()
        self._pipe(self.process.stdout).close()


def _measure(options: Options) -> Result:
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="agentos-bench-") as directory:
        variants = {"with": _Variant(SOURCE), "without": _Variant(without_hardening(directory))}
        try:
            for what, full in (("exec", 600), ("create", 200)):
                samples: dict[str, list[float]] = {name: [] for name in variants}
                for _ in range(options.samples(full)):
                    for name, variant in variants.items():
                        samples[name].append(variant.ask(what))
                for name, values in samples.items():
                    result[f"{what}, {name}"] = summary(values)
                result[f"ratio {what}"] = (
                    result[f"{what}, with"]["median_ms"] / result[f"{what}, without"]["median_ms"]
                )
        finally:
            for variant in variants.values():
                variant.close()
    return result


async def measure(options: Options) -> Result:
    """exec and create, with all hardening and without, in turn."""
    return await asyncio.to_thread(_measure, options)


def bars(result: Result) -> list[Bar]:
    """For the plot."""
    return [
        Bar("exec, not hardened", result["exec, without"], "running VM"),
        Bar("create, not hardened", result["create, without"], "new VM"),
        Bar("create", result["create, with"], "new VM"),
    ]
