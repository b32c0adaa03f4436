"""What `agentos demo` shows: a VM is booted, and what the library is for is done with it, call by call."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable

from agentos import VM
from agentos.commands.hello_wasm import module
from agentos.host import default_host
from agentos.machine.plan import describe, plan_vm
from agentos.machine.shell import Shell
from agentos.model import ProcessInfo, ProcessTreeNode

PATIENCE = 30.0
"""Seconds that a slow machine may take for a step."""
COUNTER = """\
import sys, time
for number in range(1, 4):
    print(f"line {number}", flush=True)
    time.sleep(0.1)
print("and one on stderr", file=sys.stderr)
"""
SERVER = """\
require("http").createServer((request, response) => response.end("hello\\n")).listen(3000)
"""
TREE = """\
python3 -c 'import subprocess; subprocess.run(["sleep", "60"])' &
{node}{wasm}wait
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\r")


async def run(*, debug: bool = False) -> int:
    """The whole walk-through. Returns the exit code."""
    page = Page()
    host = default_host()
    factory = await host.ready()
    if debug:
        page.title("The plan", "what init does, in this order, to make the VM")
        page.show(describe(plan_vm(VM().spec, factory.facts)))
    page.title("Boot", "a Linux of its own: users, files, processes, network")
    page.code('vm = await VM(files={"server.js": ..., "counter.py": ...}).start()')
    started = time.perf_counter()
    vm = await VM(files={"server.js": SERVER, "counter.py": COUNTER}).start()
    page.show(f"booted in {_ms(started)}")
    try:
        for scene in (_exec, _spawn, _stdin, _lifecycle, _tree, _shell):
            await scene(page, vm)
    finally:
        started = time.perf_counter()
        await vm.close()
    page.title("The end", "nothing of the VM is left")
    page.code("await vm.close()")
    page.show(f"gone in {_ms(started)}")
    await host.close()
    return 0


class Page:
    """What a reader sees: titles, calls, and indented what they gave. In colour on a terminal."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._number = 0

    def title(self, name: str, what: str) -> None:
        """Begin a scene."""
        self._number += 1
        print(f"\n{self._paint('1;36', f'{self._number}. {name}')}: {what}\n", flush=True)

    def code(self, text: str) -> None:
        """A call, as one would write it."""
        for line in text.splitlines():
            print(f"  {self._paint('33', '>>>')} {self._paint('1', line)}", flush=True)

    def show(self, text: str) -> None:
        """What a call gave."""
        for line in text.splitlines():
            print(f"      {line}".rstrip(), flush=True)

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text


def _ms(started: float) -> str:
    return f"{(time.perf_counter() - started) * 1000:.1f} ms"


async def _exec(page: Page, vm: VM) -> None:
    page.title("exec", "run a command, wait, get its output")
    for command in ("echo hello && ls /home/agentos", "id; hostname; ps -o pid,user,args", "no-such-program"):
        page.code(f"await vm.exec({command!r})")
        result = await vm.exec(command)
        page.show(result.stdout)
        page.show(f"exit code {result.exit_code}, {result.duration_ms:.1f} ms")
        if result.stderr:
            page.show(f"stderr: {result.stderr.strip()}")
    command = "echo started; setsid sleep 1000 & sleep 1000"
    page.code(f"await vm.exec({command!r}, timeout=0.3)")
    result = await vm.exec(command, timeout=0.3)
    page.show(f"stdout {result.stdout!r}, reason {result.reason!r}, exit code {result.exit_code}")
    left = [one.command for one in await vm.all_processes()]
    page.show(f"processes left behind: {left}")


async def _spawn(page: Page, vm: VM) -> None:
    page.title("spawn", "run a program in the background, follow its output")
    page.code('process = await vm.spawn("python3", ["counter.py"])\nasync for chunk in process.output(): ...')
    process = await vm.spawn("python3", ["counter.py"])
    async for chunk in process.output():
        for line in chunk.data.decode().splitlines():
            page.show(f"[pid {process.pid}] {chunk.stream}: {line}")
    page.show(f"[pid {process.pid}] exited with code {await process.wait()}")


async def _stdin(page: Page, vm: VM) -> None:
    page.title("stdin", "write to a running process")
    page.code('cat = await vm.spawn("cat")')
    cat = await vm.spawn("cat")
    page.code(r'await cat.write_stdin("hello from stdin\n"); await cat.close_stdin(); await cat.wait()')
    await cat.write_stdin("hello from stdin\n")
    await cat.close_stdin()
    code = await cat.wait()
    page.show((await cat.read_output()).events[0].data.decode())
    page.show(f"exit code {code}")


async def _lifecycle(page: Page, vm: VM) -> None:
    page.title("Lifecycle", "list, inspect, stop and kill processes")
    polite = await vm.spawn("sleep", ["1000"])
    stubborn = await vm.spawn("bash", ["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"])
    await stubborn.read_output(wait=PATIENCE)
    page.code("await vm.list_processes()")
    for one in await vm.list_processes():
        state = "running" if one.running else f"exited with {one.exit_code}"
        page.show(f"{one.pid:5} {state:<15} {one.command} {' '.join(one.args)[:50]}".rstrip())
    page.code(f"await vm.stop_process({polite.pid})")
    await vm.stop_process(polite.pid)
    page.show(f"exit code {await polite.wait()}: {(await vm.get_process(polite.pid)).signal}")
    page.code(f"await vm.stop_process({stubborn.pid}, kill_after=0.2)  # it ignores SIGTERM")
    await vm.stop_process(stubborn.pid, kill_after=0.2)
    page.show(f"exit code {await stubborn.wait()}: {(await vm.get_process(stubborn.pid)).signal}")


async def _tree(page: Page, vm: VM) -> None:
    page.title("Process tree", "every process, whoever started it, on whichever runtime")
    has_node = (await vm.exec("command -v node")).ok
    has_wasm = importlib.util.find_spec("wasmtime") is not None
    if not has_node:
        page.show("(no node on this host)")
    if has_wasm:
        await vm.files.write_file(
            "hello.wasm", module("hello from WebAssembly\n", times=60, pause=1.0), mode=0o755
        )
    else:
        page.show("(no wasmtime package on this host)")
    script = TREE.format(
        node="node server.js &\n" if has_node else "", wasm="./hello.wasm &\n" if has_wasm else ""
    )
    await vm.files.write_file("tree.sh", script)
    page.code('bash = await vm.spawn("bash", ["tree.sh"])  # which says:')
    page.show(script)
    page.code("await vm.process_tree()")
    bash = await vm.spawn("bash", ["tree.sh"])
    wanted = {"native", "python"} | ({"node"} if has_node else set()) | ({"wasm"} if has_wasm else set())
    await _until(vm, lambda running: {one.driver for one in running if one.rss_bytes} >= wanted)
    await _until(vm, lambda running: any(one.command == "sleep" for one in running))
    for node in await vm.process_tree():
        _show_node(page, node, "")
    await bash.kill()


async def _until(vm: VM, met: Callable[[list[ProcessInfo]], bool]) -> None:
    """Wait until the VM's processes are as wanted. Nobody tells when a program takes over a forked process: look."""
    async with asyncio.timeout(PATIENCE):
        while not met(await vm.all_processes()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _show_node(page: Page, node: ProcessTreeNode, indent: str) -> None:
    one = node.process
    command = " ".join((one.command, *one.args)).split("\n")[0]
    page.show(f"{one.pid:5} {one.driver:<7} {one.rss_bytes / 2**20:6.1f} MiB  {indent}{command[:60]}")
    for child in node.children:
        _show_node(page, child, indent + "  ")


async def _shell(page: Page, vm: VM) -> None:
    page.title("Shell", "an interactive bash on a terminal of its own")
    page.code("shell = await vm.open_shell(cols=80, rows=24)")
    shell = await vm.open_shell(cols=80, rows=24)
    cursor = await _show_until(page, shell, 0, "$ ")
    for line in ("ls -la /home/agentos\n", "stty size; tty\n"):
        page.code(f"await shell.write({line!r})")
        await shell.write(line)
        cursor = await _show_until(page, shell, cursor, "$ ")
    page.code("await shell.resize(120, 40)")
    await shell.resize(120, 40)
    page.code(r"await shell.write('stty size; sleep 1000\n'); await shell.write('\x03')  # Ctrl-C")
    await shell.write("stty size; sleep 1000\n")
    cursor = await _show_until(page, shell, cursor, "40 120")
    await _until(vm, lambda running: any(one.command == "sleep" for one in running))
    await shell.write("\x03")
    cursor = await _show_until(page, shell, cursor, "$ ")
    page.code("await shell.close()")
    await shell.close()
    page.show(f"exit code {shell.exit_code}")


async def _show_until(page: Page, shell: Shell, cursor: int, end: str) -> int:
    """Show what the terminal shows until that contains `end`, as plain text. Returns the cursor after it."""
    seen = ""
    async with asyncio.timeout(PATIENCE):
        while True:
            got = await shell.read(cursor, wait=PATIENCE)
            cursor = got.cursor
            seen += b"".join(one.data for one in got.events).decode(errors="replace")
            plain = _ESCAPES.sub("", seen)
            if end in plain.split("\n", 1)[-1] or got.exited:
                page.show(plain)
                return cursor
