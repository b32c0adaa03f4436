"""Shells: a real terminal, its size, its scrollback and its end."""

from __future__ import annotations

import asyncio
from typing import Any

from surfaces import Surface, fails


def test_it_is_a_terminal_with_job_control(on: Any) -> None:
    """Ctrl-C ends what runs in front, not the shell; resizing is seen by the program in front."""

    async def body(vm: Surface) -> None:
        shell = await vm.open_shell(cols=100, rows=30)
        await vm.write_shell(shell.shell_id, "tty; stty size\n")
        await vm.screen_until(shell.shell_id, rb"/dev/pts/\d+.*30 100")
        await vm.write_shell(shell.shell_id, "echo be''gun; sleep 1000\n")
        await vm.screen_until(shell.shell_id, b"begun")
        while "sleep" not in [one.command for one in await vm.all_processes()]:
            pass  # bash has not made it its job yet
        await vm.write_shell(shell.shell_id, b"\x03")
        await vm.screen_until(shell.shell_id, rb"begun.*\^C.*\$ ")
        await vm.write_shell(shell.shell_id, "echo code $?\n")
        await vm.screen_until(shell.shell_id, b"code 130")
        await vm.write_shell(shell.shell_id, "trap 'stty size; echo resi''zed' WINCH; echo rea''dy\n")
        await vm.screen_until(shell.shell_id, b"ready")
        await vm.resize_shell(shell.shell_id, 120, 40)
        await vm.write_shell(shell.shell_id, "\n")
        await vm.screen_until(shell.shell_id, b"40 120.*resized")
        (info,) = await vm.list_shells()
        assert (info.cols, info.rows, info.running, info.exit_code) == (120, 40, True, None)

    on(body)


def test_a_line_with_a_key_is_typed_once(on: Any) -> None:
    """As a client types it that asks again when it has heard no answer; another key types it again."""

    async def body(vm: Surface) -> None:
        shell = await vm.open_shell(command="cat")
        for key in ("one", "one", "two", "one", "two"):
            await vm.write_shell(shell.shell_id, f"{key}\n", idempotency_key=key)
        await vm.write_shell(shell.shell_id, "\x04")
        assert await vm.wait_shell(shell.shell_id) == 0
        page = await vm.read_shell(shell.shell_id)
        shown = b"".join(chunk.data for chunk in page.events)
        assert (shown.count(b"one\r\n"), shown.count(b"two\r\n")) == (2, 2)  # as typed, and as cat says it
        with fails("request.invalid", "^idempotency_?[kK]ey: .*not used for another request.*'one'"):
            await vm.write_shell(shell.shell_id, "other\n", idempotency_key="one")
        # It was typed, so it is no error to ask once more; what is new is.
        await vm.write_shell(shell.shell_id, "one\n", idempotency_key="one")
        with fails("shell.closed"):
            await vm.write_shell(shell.shell_id, "x", idempotency_key="three")

    on(body)


def test_a_key_opens_one_shell(on: Any) -> None:
    """However often it is asked; asked for another shell, it is refused by its name, and nothing is opened."""

    async def body(vm: Surface) -> None:
        asked: dict[str, Any] = {"command": "cat", "cols": 100, "idempotency_key": "once"}
        shells = await asyncio.gather(*(vm.open_shell(**asked) for _ in range(5)))
        assert len({one.shell_id for one in shells}) == 1
        for other in ({"command": "sh"}, {"cols": 101}, {"rows": 30}, {"cwd": "/tmp"}, {"env": {"A": "1"}}):
            with fails("request.invalid", "^idempotency_?[kK]ey: .*not used for another request.*'once'"):
                await vm.open_shell(**{**asked, **other})
        await vm.write_shell(shells[0].shell_id, "\x04")
        assert await vm.wait_shell(shells[0].shell_id) == 0
        # One that has ended too: whoever asks again learns of its end.
        assert (await vm.open_shell(**asked)).shell_id == shells[0].shell_id
        assert len(await vm.list_shells()) == 1

    on(body)


def test_what_runs_in_it(on: Any) -> None:
    """Another program, with arguments, environment, directory and user."""

    async def body(vm: Surface) -> None:
        line = "pwd; id -un; echo $COLOR; test -t 1 && exit 7"
        shell = await vm.open_shell(
            command="sh", args=["-c", line], env={"COLOR": "blue"}, cwd="/tmp", user="root"
        )
        assert await vm.wait_shell(shell.shell_id) == 7
        seen = await vm.screen_until(shell.shell_id, b"blue")
        assert seen.split() == [b"/tmp", b"root", b"blue"]
        (info,) = await vm.list_shells()
        assert (info.command, info.args, info.running, info.exit_code) == ("sh", ("-c", line), False, 7)

    on(body)


def test_scrollback_is_replayed_from_a_cursor(on: Any) -> None:
    """Cursor 0 begins with what is retained, a gap is counted, and the end is told."""

    async def body(vm: Surface) -> None:
        shell = await vm.open_shell(command="seq", args=["10000"])
        assert await vm.wait_shell(shell.shell_id) == 0
        page = await vm.read_shell(shell.shell_id, cursor=0)
        shown = b"".join(one.data for one in page.events)
        assert (page.truncated, page.exited) == (True, True)
        assert 0 < len(shown) <= 8 * 1024
        assert shown.endswith(b"9999\r\n10000\r\n")
        whole = sum(len(str(number)) + 2 for number in range(1, 10_001))
        assert page.skipped + len(shown) == whole
        assert (await vm.read_shell(shell.shell_id, cursor=page.cursor)).events == ()

    on(body, kind="small")


def test_closing_hangs_up(on: Any) -> None:
    """What ran in it is gone; closing again is nothing; writing is an error; waiting still answers."""

    async def body(vm: Surface) -> None:
        shell = await vm.open_shell()
        await vm.write_shell(shell.shell_id, "echo be''gun; sleep 1000\n")
        await vm.screen_until(shell.shell_id, b"begun")
        with fails("process.wait_timeout"):
            await vm.wait_shell(shell.shell_id, timeout=0.1)
        await vm.close_shell(shell.shell_id)
        assert await vm.wait_shell(shell.shell_id) == 129
        while await vm.alive():
            pass  # the kernel has told sleep as well, which may take a moment longer
        await vm.close_shell(shell.shell_id)
        with fails("shell.closed"):
            await vm.write_shell(shell.shell_id, "x")
        with fails("shell.closed"):
            await vm.resize_shell(shell.shell_id, 80, 24)

    on(body)


def test_what_was_just_typed_is_done_before_the_end(on: Any) -> None:
    """Commands that are typed and followed by a close, as a program does that knows no prompt."""

    async def body(vm: Surface) -> None:
        shell = await vm.open_shell()
        await vm.write_shell(shell.shell_id, "ls -la /home/agentos; echo sum=$((40+2))\n")
        await vm.resize_shell(shell.shell_id, 120, 40)
        await vm.close_shell(shell.shell_id)
        shown = await vm.screen_until(shell.shell_id, b"sum=42")
        assert b".bashrc" in shown
        assert await vm.wait_shell(shell.shell_id) == 0

    on(body)


def test_shells_have_a_limit(on: Any) -> None:
    """With its name."""

    async def body(vm: Surface) -> None:
        for _ in range(2):
            await vm.open_shell()
        with fails("limit.exceeded", "shells") as error:
            await vm.open_shell()
        assert error.details["limit"] == "shells"

    on(body, kind="small")


def test_processes_of_a_shell_are_in_the_table(on: Any) -> None:
    """With the shell that they belong to where the API started them."""

    async def body(vm: Surface) -> None:
        shell = await vm.open_shell()
        await vm.write_shell(shell.shell_id, "sh -c 'echo be''gun; read line' &\n")
        await vm.screen_until(shell.shell_id, b"begun")
        (top,) = await vm.process_tree()
        assert (top.process.shell_id, top.process.managed) == (shell.shell_id, True)
        assert [node.process.command for node in top.children] == ["sh"]

    on(body)
