"""Events, to every surface that has connections."""

from __future__ import annotations

from typing import Any

from surfaces import Surface


def of(name: str) -> Any:
    """The payloads of this event's kind among those seen."""
    return lambda seen: [payload for kind, payload in seen if kind == name]


def test_output_and_end_of_a_process(on_remote: Any) -> None:
    """Every byte of both streams with its offset, then the end, once, after all of it."""

    async def body(vm: Surface) -> None:
        async with vm.listen("processOutput", "processExit") as events:
            process = await vm.spawn("sh", ["-c", "echo out; echo err >&2; printf '\\377'; exit 4"])
            (end,) = await events.until(of("processExit"))
            assert (end.pid, end.exit_code, end.signal, end.reason) == (process.pid, 4, None, "exited")
            assert events.seen[-1][0] == "processExit"
            got = {"stdout": b"", "stderr": b""}
            for payload in of("processOutput")(events.seen):
                assert payload.pid == process.pid
                assert payload.offset == len(got[payload.stream])
                got[payload.stream] += payload.data
            assert got == {"stdout": b"out\n\xff", "stderr": b"err\n"}

    on_remote(body)


def test_the_shortest_processes_lose_nothing(on_remote: Any) -> None:
    """Twenty that end at once, each with its line and its end."""

    async def body(vm: Surface) -> None:
        async with vm.listen("processOutput", "processExit") as events:
            pids = [(await vm.spawn("echo", [f"line {number}"])).pid for number in range(20)]
            await events.until(lambda seen: len(of("processExit")(seen)) == 20)
            for number, pid in enumerate(pids):
                data = b"".join(one.data for one in of("processOutput")(events.seen) if one.pid == pid)
                assert data == b"line %d\n" % number

    on_remote(body)


def test_a_shell_and_its_end(on_remote: Any) -> None:
    """shellData, and shellExit after the last of it."""

    async def body(vm: Surface) -> None:
        async with vm.listen("shellData", "shellExit") as events:
            shell = await vm.open_shell()
            await vm.write_shell(shell.shell_id, "echo sum=$((40+2)); exit 6\n")
            (end,) = await events.until(of("shellExit"))
            assert (end.shell_id, end.exit_code) == (shell.shell_id, 6)
            assert events.seen[-1][0] == "shellExit"
            shown = b""
            for payload in of("shellData")(events.seen):
                assert (payload.shell_id, payload.offset) == (shell.shell_id, len(shown))
                shown += payload.data
            assert b"sum=42" in shown

    on_remote(body)


def test_only_what_was_asked_for(on_remote: Any) -> None:
    """Who listens to ends gets no output."""

    async def body(vm: Surface) -> None:
        async with vm.listen("processExit") as events:
            await vm.spawn("echo", ["unheard"])
            await events.until(of("processExit"))
            assert {name for name, _ in events.seen} == {"processExit"}

    on_remote(body)
