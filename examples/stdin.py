"""Write to the stdin of a running process."""

import asyncio

from agentos import VM


async def main() -> None:
    async with VM() as vm:
        process = await vm.spawn("cat")
        await process.write_stdin("hello from stdin\n")
        await process.close_stdin()
        print("exit code:", await process.wait())
        async for chunk in process.output():
            print(chunk.data.decode(), end="")

        # To a command, stdin can be given as a whole.
        result = await vm.exec("tr a-z A-Z | sort", stdin="pear\napple\n")
        print(result.stdout, end="")


asyncio.run(main())
