"""Run a command to its end: output, exit code, time limits."""

import asyncio

from agentos import VM


async def main() -> None:
    async with VM() as vm:
        result = await vm.exec("echo hello && ls -a /home/agentos")
        print("stdout:", result.stdout)
        print("stderr:", result.stderr)
        print("exit code:", result.exit_code)

        # No shell looks at the arguments of exec_file.
        result = await vm.exec_file("printf", ["%s\n", "$HOME; rm -rf *"])
        print("as it is:", result.stdout)

        # A time limit ends the command with every descendant; the output so far is there.
        result = await vm.exec("echo started; setsid sleep 1000 & sleep 1000", timeout=0.5)
        print(repr(result.stdout), result.reason, "left:", await vm.all_processes())


asyncio.run(main())
