"""A terminal in a VM, that another program can come back to."""

import asyncio
import os

from agentos import create_client

ENDPOINT = os.environ.get("AGENTOS_ENDPOINT", "http://localhost:6420")


async def main() -> None:
    async with create_client(ENDPOINT) as client:
        agent = client.vm.get_or_create("python-shell")
        shell = await agent.open_shell(cols=100, rows=30)
        await shell.write("ls -a /home/agentos\n")
        await shell.resize(120, 40)
        await shell.write("stty size; exit 3\n")
        print("exit code:", await shell.wait())

    async with create_client(ENDPOINT) as client:
        again = client.vm.get("python-shell").shell(shell.shell_id)
        async for chunk in again.output():  # from the beginning of what is kept
            print(chunk.data.decode(), end="")


asyncio.run(main())
