"""A WASI module is a program like any other in a VM."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from e2e_support import commands

from agentos import VM
from agentos.commands.hello_wasm import module

_EXIT = (
    b"\0asm\1\0\0\0"
    b"\1\x08\2\x60\1\x7f\0\x60\0\0"  # types: (i32) -> (), () -> ()
    b"\2\x24\1\x16wasi_snapshot_preview1\x09proc_exit\0\0"
    b"\3\2\1\1"  # one function of the second type
    b"\5\3\1\0\1"  # a page of memory
    b"\7\x13\2\6memory\2\0\6_start\0\1"
    b"\x0a\x08\1\6\0\x41\7\x10\0\x0b"  # proc_exit(7)
)


def in_vm(body: Callable[[VM], Awaitable[None]], **files: bytes) -> None:
    """Run `body` with a VM that has `files`, executable."""

    async def main() -> None:
        async with asyncio.timeout(50), VM() as vm:
            for name, content in files.items():
                await vm.files.write_file(f"{name}.wasm", content, mode=0o755)
            await body(vm)

    asyncio.run(main())


def test_spawned_by_its_name() -> None:
    """Found in the working directory, with its output as any other's."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("hello.wasm")
        assert await process.wait() == 0
        assert b"".join([chunk.data async for chunk in process.output()]) == b"hi\nhi\n"

    in_vm(body, hello=module("hi\n", times=2))


def test_run_from_a_shell() -> None:
    """By bash and by programs that know nothing of WebAssembly: the kernel hands it to its runner."""

    async def body(vm: VM) -> None:
        result = await vm.exec("./hello.wasm | tr a-z A-Z; find . -name 'hello.wasm' -exec '{}' ';'")
        assert (result.stdout, result.stderr) == ("HI\nhi\n", "")

    in_vm(body, hello=module("hi\n"))


def test_without_the_execute_bit() -> None:
    """The API runs it all the same; a shell refuses, as it does for any file."""

    async def body(vm: VM) -> None:
        await vm.exec("chmod -x hello.wasm")
        assert (await vm.exec_file("./hello.wasm")).stdout == "hi\n"
        assert (await vm.exec("./hello.wasm; exit $?")).exit_code == 126

    in_vm(body, hello=module("hi\n"))


def test_it_shows_in_the_tree_as_what_it_is() -> None:
    """Driver wasm, its own name, and it ends like any process."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("bash", ["-c", "./hello.wasm & wait"])
        async for chunk in process.output():
            assert chunk.data == b"hi\n"
            break
        (root,) = await vm.process_tree()
        (child,) = root.children
        assert (root.process.driver, child.process.driver, child.process.command) == (
            "native",
            "wasm",
            "./hello.wasm",
        )
        await process.kill()
        assert await commands(vm) == []  # dead, though perhaps not reaped yet

    in_vm(body, hello=module("hi\n", times=1000, pause=1.0))


def test_its_exit_code() -> None:
    """What it gives to proc_exit."""

    async def body(vm: VM) -> None:
        assert (await vm.exec_file("./leave.wasm")).exit_code == 7

    in_vm(body, leave=_EXIT)


def test_what_is_no_module() -> None:
    """An error on stderr and an exit code, not a hang."""

    async def body(vm: VM) -> None:
        result = await vm.exec_file("./broken.wasm")
        assert result.exit_code == 1
        assert "wasm: ./broken.wasm" in result.stderr

    in_vm(body, broken=b"\0asm\1\0\0\0nonsense")
