"""Start a server in a VM, hear what it writes, ask it something, and stop it."""

import asyncio
import os

from agentos import create_client
from agentos.client.events import ProcessExit, ProcessOutput

ENDPOINT = os.environ.get("AGENTOS_ENDPOINT", "http://localhost:6420")


async def main() -> None:
    async with create_client(ENDPOINT) as client:
        agent = client.vm.get_or_create("python-spawn")
        ready, ended = asyncio.Event(), asyncio.Event()

        def on_output(event: ProcessOutput) -> None:
            print(f"[pid {event.pid}] {event.stream}: {event.data.decode()}", end="")
            ready.set()

        def on_exit(event: ProcessExit) -> None:
            print(f"[pid {event.pid}] exited with code {event.exit_code}")
            ended.set()

        async with agent.connect() as connection:
            connection.on("processOutput", on_output)
            connection.on("processExit", on_exit)
            process = await agent.spawn("node", ["/home/agentos/server.js"])
            await ready.wait()
            answer = await agent.fetch(3000, "/")
            print(answer.status, answer.body)
            await process.stop()
            await ended.wait()

        # Without a connection: the log of a process is kept, and read from any place as often as wanted.
        async for chunk in process.output(cursor=10):
            print("from byte 10 on:", chunk.data)


asyncio.run(main())
