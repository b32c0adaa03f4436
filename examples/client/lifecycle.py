"""List, inspect, stop and kill the processes of a VM, and see its whole tree."""

import asyncio
import os

from agentos import create_client

ENDPOINT = os.environ.get("AGENTOS_ENDPOINT", "http://localhost:6420")


async def main() -> None:
    async with create_client(ENDPOINT) as client:
        agent = client.vm.get_or_create("python-lifecycle")
        polite = await agent.spawn("sleep", ["1000"])
        stubborn = await agent.spawn(
            "bash", ["-c", "trap '' TERM; sh -c 'echo ready; read line'; sleep 1000"]
        )
        await stubborn.read_output(wait=10)

        for one in await agent.list_processes():
            print(one.pid, one.command, *one.args[:1], "running" if one.running else "exited")
        for node in await agent.process_tree():
            print(
                node.process.driver, node.process.command, [child.process.command for child in node.children]
            )

        await polite.stop()
        print("stopped:", await polite.wait())
        await stubborn.stop(kill_after=0.2)
        status = await stubborn.wait_status()
        print("killed:", status.exit_code, status.signal)
        await agent.destroy()


asyncio.run(main())
