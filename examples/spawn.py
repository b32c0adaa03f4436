"""Start a program in the background and follow its output as it comes."""

import asyncio

from agentos import VM

APP = """
import sys
for number in range(3):
    print(f"line {number}", flush=True)
sys.exit(3)
"""


async def main() -> None:
    async with VM(files={"app.py": APP}) as vm:
        process = await vm.spawn("python3", ["app.py"])
        print("started process:", process.pid)
        async for chunk in process.output():
            print(f"[pid {process.pid}] {chunk.stream}: {chunk.data.decode()}", end="")
        print(f"[pid {process.pid}] exited with code {await process.wait()}")

        # The output is a log: it can be read again, from any position, also after the end.
        page = await process.read_output(cursor=7)
        print("from byte 7 on:", b"".join(chunk.data for chunk in page.events))


asyncio.run(main())
