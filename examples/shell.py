"""An interactive shell on a terminal: type, resize, interrupt, close."""

import asyncio

from agentos import VM, Shell


async def show_until(shell: Shell, cursor: int, text: bytes) -> int:
    """Print what the terminal shows until `text` has come; returns where to go on reading."""
    seen = b""
    while text not in seen:
        page = await shell.read(cursor, wait=30)
        cursor = page.cursor
        seen += b"".join(chunk.data for chunk in page.events)
        if page.exited:
            break
    print(seen.decode(errors="replace"), end="", flush=True)
    return cursor


async def main() -> None:
    async with VM() as vm:
        shell = await vm.open_shell(cols=80, rows=24)
        await shell.write("ls -la /home/agentos; echo listed\n")
        cursor = await show_until(shell, 0, b"listed\r\n")
        await shell.resize(120, 40)
        await shell.write("stty size\n")
        cursor = await show_until(shell, cursor, b"40 120")
        await shell.write("exit 3\n")
        async for chunk in shell.output(cursor):
            print(chunk.data.decode(errors="replace"), end="")
        print("exit code:", await shell.wait())


asyncio.run(main())
