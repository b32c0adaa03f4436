"""The files of a VM: write, read, list, stream, and what goes wrong is an error to catch."""

import asyncio

from agentos import VM


async def main() -> None:
    async with VM(files={"notes/today.txt": "made before the VM runs anything\n"}) as vm:
        await vm.files.write_file("notes/data.bin", bytes(range(256)))
        print(await vm.files.readdir("notes"))
        print(await vm.files.read_file("notes/today.txt"))
        print((await vm.files.stat("notes/data.bin")).size)

        # What is too large for memory goes in chunks, both ways.
        written = await vm.files.write_file_stream("large.bin", (bytes(1024 * 1024) for _ in range(32)))
        read = 0
        async for chunk in vm.files.read_file_stream("large.bin"):
            read += len(chunk)
        print(written, read, (await vm.exec("du -m large.bin")).stdout.split()[0], "MiB")

        try:
            await vm.files.read_file("/etc/shadow-of-nothing")
        except FileNotFoundError as error:
            print(type(error).__name__, error)


asyncio.run(main())
