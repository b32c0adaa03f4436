"""A host process with VMs whose servants are the guest's, and one that is as it should be.

    python -m tests.escape.driver KIND/MODE/ACTION...

prints a line of JSON for each: what the action came to, how much memory and how many descriptors this process has
grown by, and what the other VM answered meanwhile and after.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from agentos import VM, Host, Limits
from agentos.errors import AgentOSError
from agentos.machine import connections, filewire, link, vm

SECONDS = 0.5
"""What the host waits for a servant, in place of the product's longer patience."""
FORGIVEN = 40.0
FILE_BYTES = 16 * 1024 * 1024
"""The limit of what a whole read may hold."""


async def _exec(evil: VM) -> Any:
    return await evil.exec("echo hi", timeout=0.5)


async def _spawn(evil: VM) -> Any:
    return await (await evil.spawn("echo", ["hi"], timeout=0.5)).wait()


async def _shell(evil: VM) -> Any:
    return await (await evil.open_shell()).wait()


async def _read(evil: VM) -> Any:
    return await evil.files.read_file("/etc/passwd")


async def _write(evil: VM) -> Any:
    return await evil.files.write_file("/tmp/x", b"x" * 3_000_000)


async def _list(evil: VM) -> Any:
    return await evil.files.readdir("/")


async def _stat(evil: VM) -> Any:
    return await evil.files.stat("/")


async def _connect(evil: VM) -> Any:
    return await evil.connect(80)


async def _processes(evil: VM) -> Any:
    return await evil.all_processes()


ACTIONS: dict[str, Callable[[VM], Awaitable[Any]]] = {
    "exec": _exec, "spawn": _spawn, "shell": _shell, "read": _read, "write": _write, "list": _list, "stat": _stat,
    "connect": _connect, "processes": _processes,
}  # fmt: skip


class Hurried:
    """An event loop for a VM's link with such servants: the other VM has the product's patience on a busy machine."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, seconds: float, *call: Any) -> Any:
        """As that of the loop, but sooner where a servant is waited for."""
        return self._loop.call_later(SECONDS if seconds == link.LAUNCH_SECONDS else seconds, *call)


def descriptors() -> Counter[str]:
    """What this process has open, in kinds."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[re.sub("[0-9]+", "N", os.readlink(f"/proc/self/fd/{name}"))] += 1
    return found


def memory_bytes(field: str) -> int:
    """A field of this process's memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(file.read().partition(f"{field}:")[2].split()[0]) * 1024


def reset_peak() -> None:
    """Begin anew with VmHWM."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


async def act(host: Host, good: VM, kind: str, mode: str, action: str) -> dict[str, Any]:
    """What an action on a VM with such servants comes to."""
    fds = descriptors()
    reset_peak()
    before = memory_bytes("VmHWM")
    limits = Limits(file_bytes=FILE_BYTES)
    evil = await VM(host=host, hostname=f"evil.{kind}.{mode.replace(' ', '-')}", limits=limits).start()
    evil.link.loop = Hurried(evil.link.loop)  # type: ignore[assignment]
    acting = asyncio.ensure_future(ACTIONS[action](evil))
    answers = []
    for _ in range(5):
        answer = await good.exec("echo ok")
        answers.append(answer.stdout if answer.stdout == "ok\n" else repr(answer))
    try:
        async with asyncio.timeout(FORGIVEN):
            outcome = repr(await acting)
    except AgentOSError as error:
        outcome = f"AgentOSError {error.code}"
    except TimeoutError:
        outcome = "it hangs"
    await evil.close()
    answers.append((await good.exec("echo ok")).stdout)
    grown = memory_bytes("VmHWM") - before
    left = dict(descriptors() - fds)
    return {
        "case": [kind, mode, action],
        "outcome": outcome,
        "answers": answers,
        "grown": grown,
        "left": left,
    }


async def main(cases: list[str]) -> None:
    """Act on one evil VM after the other, while the good one works."""
    filewire.PROGRESS_S = SECONDS
    connections._CONNECT_SECONDS = SECONDS
    problems: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: problems.append(str(context.get("exception", context)))
    )
    async with Host() as host, VM(host=host) as good:
        await asyncio.sleep(vm._REFILL_SECONDS)  # by then it has opened all that it listens to
        await act(host, good, "nobody", "closes", "exec")
        for case in cases:
            seen = await act(host, good, *case.split("/"))
            print(json.dumps({**seen, "problems": problems}), flush=True)
            problems.clear()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
