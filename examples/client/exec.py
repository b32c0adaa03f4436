"""Run commands in a VM of a server: the verbs are those of the embedded VM."""

import asyncio
import os

from agentos import create_client
from agentos.errors import SpawnFailed

ENDPOINT = os.environ.get("AGENTOS_ENDPOINT", "http://localhost:6420")


async def main() -> None:
    async with create_client(ENDPOINT) as client:
        agent = client.vm.get_or_create(
            "python-exec"
        )  # always the same VM; it boots when it is first asked something
        result = await agent.exec("echo hello && ls /home/agentos")
        print("stdout:", result.stdout)
        print("exit code:", result.exit_code)

        result = await agent.exec("echo begun; sleep 60", timeout=0.2)
        print(result.reason, repr(result.stdout))

        try:
            await agent.exec_file("no-such-program")
        except SpawnFailed as error:
            print(error.code, "-", error)


asyncio.run(main())
