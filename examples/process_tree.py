"""Every process of a VM as a tree, on whichever runtime each runs."""

import asyncio

from agentos import VM
from agentos.model import ProcessTreeNode


def show(node: ProcessTreeNode, indent: str = "") -> None:
    one = node.process
    print(
        f"{one.pid:5} {one.driver:8} {one.rss_bytes // 1024:7} KiB  {indent}{one.command} {' '.join(one.args)}"[
            :100
        ]
    )
    for child in node.children:
        show(child, indent + "  ")


async def main() -> None:
    async with VM() as vm:
        # `read` waits for a line that never comes; by then python has started its child.
        parent = await vm.spawn(
            "bash",
            [
                "-c",
                'python3 -c \'import subprocess; subprocess.run(["sh", "-c", "echo ready; sleep 60"])\' & read line',
            ],
        )
        await parent.read_output(wait=30)
        for node in await vm.process_tree():
            show(node)


asyncio.run(main())
