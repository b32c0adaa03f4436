"""List, inspect, stop and kill processes."""

import asyncio

from agentos import VM


async def main() -> None:
    async with VM() as vm:
        polite = await vm.spawn("sleep", ["1000"])
        stubborn = await vm.spawn("bash", ["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"])
        await stubborn.read_output(wait=10)  # it ignores SIGTERM from here on

        for one in await vm.list_processes():
            print(one.pid, one.command, " ".join(one.args), "running" if one.running else "exited")

        await polite.stop()  # SIGTERM
        print("polite:", await polite.wait())

        await stubborn.stop(kill_after=0.2)  # SIGTERM, then SIGKILL to it and all its descendants
        print("stubborn:", await stubborn.wait())

        info = await vm.get_process(stubborn.pid)  # exited processes are remembered
        print(info.running, info.exit_code, info.signal)


asyncio.run(main())
