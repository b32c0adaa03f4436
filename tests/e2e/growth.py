"""Spawns COUNT processes in a VM and looks at what is left of them: run by tests/e2e/test_lifecycle.py.

python growth.py COUNT
"""

from __future__ import annotations

import asyncio
import os
import sys

from e2e_support import descendants, open_descriptors, rss_bytes, status_of, still_works

from agentos import VM, Host

MIB = 1024 * 1024


async def spawn_many(vm: VM, count: int) -> None:
    """In batches of fifty."""
    for _ in range(count // 50):
        batch = await asyncio.gather(*(vm.spawn("/bin/true") for _ in range(50)))
        assert set(await asyncio.gather(*(one.wait() for one in batch))) == {0}


async def main(count: int) -> None:
    """They leave no zombie and no descriptor, and memory no larger than the records are."""
    async with Host() as host, VM(host=host) as vm:
        await spawn_many(vm, 500)  # up to the bounds of what is remembered
        servants = descendants(os.getpid())
        ours = {pid: (open_descriptors(pid), rss_bytes(pid)) for pid in [os.getpid(), *servants]}
        await spawn_many(vm, count)
        assert await vm.all_processes() == []
        for pid, (descriptors, memory) in ours.items():
            if pid in descendants(os.getpid()) or pid == os.getpid():
                assert open_descriptors(pid) <= descriptors + 4, status_of(pid)
                # 10,000 records that are kept would be four times this. Less is the allocator's, which levels off.
                assert rss_bytes(pid) <= memory + 12 * MIB, (memory, status_of(pid))
        for pid in descendants(os.getpid()):
            assert status_of(pid)["State"][0] != "Z"
        assert len(descendants(os.getpid())) <= len(servants) + 1
        assert len(await vm.list_processes()) <= vm.spec.limits.exited_processes
        await still_works(vm)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
