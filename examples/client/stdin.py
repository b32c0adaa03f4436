"""Write to a process's stdin, close it, and wait for its end."""

import asyncio
import os

from agentos import create_client

ENDPOINT = os.environ.get("AGENTOS_ENDPOINT", "http://localhost:6420")


async def main() -> None:
    async with create_client(ENDPOINT) as client:
        agent = client.vm.get_or_create("python-stdin")
        process = await agent.spawn("sort")
        await process.write_stdin("pear\napple\n")
        await process.write_stdin(b"fig\n")
        await process.close_stdin()
        print("exit code:", await process.wait())
        page = await process.read_output()
        print(b"".join(chunk.data for chunk in page.events).decode(), end="")


asyncio.run(main())
