"""Shells: a real terminal with job control, real full-screen programs, scrollback that can be replayed, hang-up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from typing import Any

import pytest
from e2e_support import Transcript, commands, needs_program, peak_rss_bytes, reset_peak, still_works

from agentos import VM, Limits, Shell
from agentos.errors import LimitExceeded, ShellClosed, ShellNotFound, WaitTimeout

MIB = 1024 * 1024
PROMPT = rb"READY> "


async def bash(vm: VM, **options: Any) -> tuple[Shell, Transcript]:
    """An interactive bash with a prompt that is easy to recognize, at its prompt."""
    shell = await vm.open_shell("bash", ["--norc"], env={"PS1": "READY> "}, **options)
    transcript = Transcript(shell)
    await transcript.until(PROMPT)
    return shell, transcript


async def told(shell: Shell, transcript: Transcript, command: str) -> bytes:
    """Type a command at the prompt; what it printed until the next prompt."""
    await shell.write(command + "\n")
    typed = await transcript.until(re.escape(command.encode()) + rb"\r\n")
    found = await transcript.until(PROMPT)
    return re.sub(rb"\x1b\[\?2004[hl]\r?", b"", transcript.data[typed.end() : found.start()])


def test_it_is_a_terminal(in_vm: Any) -> None:
    """An interactive login-like bash on a tty of its own, as the VM's user at home, with TERM set."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm)
        assert (await told(shell, transcript, "tty")).startswith(b"/dev/pts/")
        assert b"agentos" in await told(shell, transcript, "id -un; pwd; echo $TERM")
        assert b"xterm-256color" in transcript.data
        assert b"/home/agentos" in transcript.data
        assert b"no job control" not in transcript.data
        await shell.close()
        shell = await vm.open_shell()  # as a caller opens it who says nothing
        transcript = Transcript(shell)
        await shell.write("echo $((6 * 7))\n")
        await transcript.until(rb"\b42\r\n")
        await shell.close()

    in_vm(body)


def test_sizes(in_vm: Any) -> None:
    """stty sees the size asked for and every later one, and a program in the foreground gets SIGWINCH."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm)
        assert b"24 80" in await told(shell, transcript, "stty size")
        await shell.resize(132, 50)
        assert b"50 132" in await told(shell, transcript, "stty size")
        watch = (
            "import os, signal\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])\n"
            "print('watching', flush=True)\n"
            "while signal.sigwait([signal.SIGWINCH]): print(*os.get_terminal_size(), 'changed', flush=True)\n"
        )
        await vm.files.write_file("watch.py", watch)
        await shell.write("python3 watch.py\n")
        await transcript.until(b"watching\r\n")
        await vm.resize_shell(shell.shell_id, 99, 33)
        await transcript.until(b"99 33 changed\r\n")
        assert [(one.cols, one.rows) for one in await vm.list_shells()] == [(99, 33)]
        await shell.close()
        wide = await vm.open_shell("stty", ["size"], cols=200, rows=10)
        assert b"10 200" in await Transcript(wide).to_end()

    in_vm(body)


def test_job_control(in_vm: Any) -> None:
    """Ctrl-C interrupts, Ctrl-Z stops, jobs and fg know of it, Ctrl-D ends the shell with its exit code."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm)
        await shell.write("echo begin; sleep 1000\n")
        await transcript.until(rb"[\r\n]begin\r\n")
        while "sleep 1000" not in await commands(vm):
            pass  # until then it is not what the terminal's signals go to
        await shell.write(b"\x03")
        await transcript.until(PROMPT)
        assert b"130" in await told(shell, transcript, "echo $?")
        await shell.write("echo begin; cat\n")
        await transcript.until(rb"[\r\n]begin\r\n")
        await shell.write("one\n")
        await transcript.until(b"one\r\none\r\n")
        await shell.write(b"\x1a")
        await transcript.until(rb"Stopped\s+cat")
        await transcript.until(PROMPT)
        assert b"Stopped" in await told(shell, transcript, "jobs")
        await shell.write("fg\n")
        await transcript.until(b"cat\r\n")
        await shell.write("two\n")
        await transcript.until(b"two\r\ntwo\r\n")
        await shell.write(b"\x04")
        await transcript.until(PROMPT)
        await shell.write("(exit 7)\n\x04")
        assert await shell.wait() == 7
        assert await vm.wait_shell(shell.shell_id) == 7  # late, and again
        assert b"exit" in await transcript.to_end()

    in_vm(body)


def test_exit_codes_and_signals(in_vm: Any) -> None:
    """exit, a signal and a program of one's own each end the shell with what they should."""

    async def body(vm: VM) -> None:
        shell, _ = await bash(vm)
        await shell.write("exit 42\n")
        assert await shell.wait() == 42
        shell, _ = await bash(vm)
        await shell.write("kill -9 $$\n")
        assert await shell.wait() == 137
        shell = await vm.open_shell("python3", ["-c", "import sys; print(sys.stdin.isatty()); sys.exit(5)"])
        assert await shell.wait() == 5
        assert await Transcript(shell).to_end() == b"True\r\n"

    in_vm(body)


def test_a_wait_that_ends_early(in_vm: Any) -> None:
    """WaitTimeout ends the wait and not the shell."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm)
        with pytest.raises(WaitTimeout) as caught:
            await shell.wait(0.05)
        assert caught.value.details["shellId"] == shell.shell_id
        assert b"ok" in await told(shell, transcript, "echo ok")

    in_vm(body)


def test_the_last_words_are_in_the_log_when_the_end_is_known(in_vm: Any) -> None:
    """A hundred times, what a program wrote last to its terminal is there when its shell has ended."""

    async def body(vm: VM) -> None:
        for number in range(100):
            shell = await vm.open_shell("printf", [f"{number}-%s", "x" * 2000])
            assert await shell.wait() == 0
            page = await shell.read()
            assert b"".join(one.data for one in page.events) == b"%d-" % number + b"x" * 2000
            assert page.exited

    in_vm(body)


def test_scrollback_is_replayed(in_vm: Any) -> None:
    """Cursor 0 gives what is retained, a cursor in the middle what follows it, to several readers alike."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm)
        await told(shell, transcript, "echo first-mark")
        middle = transcript.cursor
        await told(shell, transcript, "echo second-mark")
        await shell.write("exit\n")
        whole = await transcript.to_end()
        assert await Transcript(shell).to_end() == whole
        tail = await Transcript(shell, cursor=middle).to_end()
        assert whole.endswith(tail)
        assert b"second-mark" in tail
        assert b"first-mark" not in tail
        assert b"first-mark" in (await vm.read_shell(shell.shell_id)).events[0].data

    in_vm(body)


def test_scrollback_is_bounded(in_vm: Any) -> None:
    """A terminal that is flooded keeps the newest, tells how much is gone, and costs no more than its bound."""

    async def body(vm: VM) -> None:
        await vm.exec("true")
        reset_peak()
        before = peak_rss_bytes()
        shell = await vm.open_shell("sh", ["-c", "yes 0123456789abcdef | head -c 30000000; echo the end"])
        assert await shell.wait() == 0
        assert peak_rss_bytes() - before < 12 * MIB
        page = await shell.read(0, max_bytes=4 * MIB)
        kept = b"".join(one.data for one in page.events)
        assert kept.endswith(b"the end\r\n")
        assert page.truncated
        assert len(kept) + page.skipped == shell.log.end
        assert len(kept) <= 1 * MIB

    in_vm(body, limits=Limits(scrollback_bytes=1 * MIB))


def test_hang_up(in_vm: Any) -> None:
    """Closing ends the shell and its job, as a closed window would; what was started with nohup lives on."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm)
        await told(shell, transcript, "nohup sleep 1001 > /dev/null 2>&1 &")
        while "sleep 1001" not in await commands(vm):
            pass  # nohup has not begun to ignore the signal yet
        await shell.write("echo begin; sleep 1000\n")
        await transcript.until(rb"[\r\n]begin\r\n")
        while "sleep 1000" not in await commands(vm):
            pass  # bash has not made it its job yet
        await vm.close_shell(shell.shell_id)
        assert not shell.running
        assert await shell.wait() >= 128
        while await commands(vm) != ["sleep 1001"]:
            pass  # what was hung up may not have been reaped yet
        with pytest.raises(ShellClosed):
            await shell.write("x")
        with pytest.raises(ShellClosed):
            await shell.resize(10, 10)
        await shell.close()
        assert [one.running for one in await vm.list_shells()] == [False]
        await still_works(vm)

    in_vm(body)


def test_a_shell_that_ignores_the_hang_up_is_killed(in_vm: Any) -> None:
    """Who ignores SIGHUP, with children in sessions of their own, is gone when close has returned."""

    async def body(vm: VM) -> None:
        script = "trap '' HUP TERM; setsid sleep 1000 & echo up; while :; do sleep 1001; done"
        shell = await vm.open_shell("bash", ["-c", script])
        await Transcript(shell).until(b"up\r\n")
        await shell.close()
        assert await commands(vm) == []
        assert await shell.wait() == 137

    in_vm(body)


def test_ten_at_once(in_vm: Any) -> None:
    """Ten shells at once each have their own terminal, directory and output."""

    async def body(vm: VM) -> None:
        opened = await asyncio.gather(*(bash(vm) for _ in range(10)))
        answers = await asyncio.gather(
            *(told(shell, transcript, f"A={n}; tty; echo $A") for n, (shell, transcript) in enumerate(opened))
        )
        ttys = set()
        for number, answer in enumerate(answers):
            tty, value = answer.split()[:2]
            ttys.add(tty)
            assert value == b"%d" % number
        assert len(ttys) == len({shell.shell_id for shell, _ in opened}) == 10
        assert len(await vm.list_shells()) == 10
        await asyncio.gather(*(shell.close() for shell, _ in opened))
        assert await commands(vm) == []

    in_vm(body)


def test_a_guest_that_never_reads_its_terminal(in_vm: Any) -> None:
    """What is typed and not read is bounded: the writer waits, and is released when the shell is closed."""

    async def body(vm: VM) -> None:
        shell = await vm.open_shell("sh", ["-c", "stty raw -echo; echo up; sleep 1000"])
        await Transcript(shell).until(b"up")
        accepted = 0

        async def type_on() -> None:
            nonlocal accepted
            while True:
                await shell.write(b"x" * 10_000)
                accepted += 10_000

        typing = asyncio.create_task(type_on())
        await vm.exec("true")
        await vm.exec("true")
        assert not typing.done()
        assert accepted <= 256 * 1024 + 80_000
        await shell.close()
        with pytest.raises(ShellClosed):
            await typing

    in_vm(body, limits=Limits(stdin_bytes=256 * 1024))


def test_a_large_paste_arrives_whole(in_vm: Any) -> None:
    """A megabyte typed at once reaches a program that reads slowly, byte for byte."""

    async def body(vm: VM) -> None:
        reader = (
            "import sys, tty, hashlib, os\ntty.setraw(0)\nprint('up', flush=True)\nh = hashlib.sha256(); n = 0\n"
            "while n < 1000000:\n    d = os.read(0, 1000); n += len(d); h.update(d)\nprint(h.hexdigest())\n"
        )
        shell = await vm.open_shell("python3", ["-c", reader])
        transcript = Transcript(shell)
        await transcript.until(b"up")
        import hashlib

        data = bytes(range(250)) * 4000
        await shell.write(data)
        await transcript.until(hashlib.sha256(data).hexdigest().encode())

    in_vm(body)


def test_limits_and_unknown_shells(in_vm: Any) -> None:
    """The limit of open shells is named; ended ones do not count; unknown ones are ShellNotFound."""

    async def body(vm: VM) -> None:
        shells = [await vm.open_shell() for _ in range(3)]
        with pytest.raises(LimitExceeded) as caught:
            await vm.open_shell()
        assert caught.value.details == {"limit": "shells", "value": 4, "maximum": 3}
        await shells[0].close()
        again = await vm.open_shell()
        assert again.shell_id not in {one.shell_id for one in shells}
        for ended in (*shells[1:], again):
            await ended.close()
        assert len(await vm.list_shells()) == 2
        with pytest.raises(ShellNotFound) as missing:
            await vm.wait_shell(shells[0].shell_id)
        assert missing.value.details == {"shellId": shells[0].shell_id}

    in_vm(body, limits=Limits(shells=3, exited_shells=2))


def test_the_table_knows_the_shells_processes(in_vm: Any) -> None:
    """The shell's own process is shown as managed, with the shell's id; its children are under it."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm)
        await shell.write("echo begin; sleep 1000\n")
        await transcript.until(rb"[\r\n]begin\r\n")
        while len(table := await vm.all_processes()) < 2:
            pass
        (entry,) = [one for one in table if one.pid == shell.pid]
        assert (entry.managed, entry.shell_id) == (True, shell.shell_id)
        (child,) = [one for one in table if one.ppid == shell.pid]
        assert (child.managed, child.shell_id) == (False, None)

    in_vm(body)


@needs_program("vim")
def test_vim(in_vm: Any) -> None:
    """vim draws its screen, takes keys, follows a resize, writes the file and gives the screen back."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm, cols=100, rows=30)
        await shell.write("vim -u NONE -N note.txt\n")
        await transcript.until(rb"note\.txt.*\[New")
        await shell.write("ihello from vim")
        await transcript.until(b"hello from vim")
        await shell.resize(60, 20)
        await transcript.until(rb"\x1b\[2J")
        await shell.write("\x1b:echo &columns 'x' &lines\r")
        await transcript.until(b"60 x 20")
        await shell.write(":wq\r")
        await transcript.until(PROMPT)
        assert await vm.files.read_file("note.txt") == b"hello from vim\n"

    in_vm(body)


@needs_program("less")
def test_less(in_vm: Any) -> None:
    """less shows a page, searches and quits."""

    async def body(vm: VM) -> None:
        shell, transcript = await bash(vm)
        await shell.write("seq 10000 | less\n")
        await transcript.until(rb"\b23\r\n")
        await shell.write("/7777\r")
        await transcript.until(b"7777")
        await shell.write("G")
        await transcript.until(rb"10000")
        await shell.write("q")
        await transcript.until(PROMPT)

    in_vm(body)


@needs_program("htop")
def test_htop(in_vm: Any) -> None:
    """htop draws the VM's processes and quits."""

    async def body(vm: VM) -> None:
        await vm.spawn("sleep", ["98765"])
        shell, transcript = await bash(vm, cols=140, rows=40)
        await shell.write("htop\n")
        await transcript.until(b"98765")
        await shell.write("q")
        await transcript.until(PROMPT)

    in_vm(body)


def _terminals() -> int:
    """The masters that this process has open."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing
            found += os.readlink(f"/proc/self/fd/{fd}").endswith("ptmx")
    return found


def test_an_opening_that_is_cancelled_leaves_no_terminal(in_vm: Any) -> None:
    """Neither one that has come already nor one that is still to come."""

    async def body(vm: VM) -> None:
        before = _terminals()
        for steps in range(40):
            opening = asyncio.ensure_future(vm.open_shell("cat"))
            for _ in range(steps % 4):
                await asyncio.sleep(0)
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await opening).close()
        await vm.exec("true")  # what is told later came later: all of them are there
        async with asyncio.timeout(10):
            while _terminals() > before:  # noqa: ASYNC110 (a descriptor says nothing when it is closed)
                await asyncio.sleep(0.01)

    in_vm(body)


def test_a_shell_is_known_when_it_is_open(in_vm: Any) -> None:
    """While it is being opened it counts, but nobody can wait for the end of what may never begin."""

    async def body(vm: VM) -> None:
        opening = asyncio.ensure_future(vm.open_shell("cat"))
        await asyncio.sleep(0)
        assert await vm.list_shells() == []
        for call in (vm.close_shell, vm.wait_shell):
            with pytest.raises(ShellNotFound):
                await call("shell-1")
        with pytest.raises(LimitExceeded) as caught:
            await vm.open_shell()
        assert caught.value.details["limit"] == "shells"
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        shell = await vm.open_shell("cat")
        assert [one.pid for one in await vm.list_shells()] == [shell.pid]
        await shell.close()

    in_vm(body, limits=Limits(shells=1))


@needs_program("tmux")
def test_tmux(in_vm: Any) -> None:
    """tmux splits its window, survives a detach and a hang-up, and is attached to again from another shell."""

    async def body(vm: VM) -> None:
        # Keys that come within a millisecond are a paste to tmux, unless it is told otherwise.
        await vm.files.write_file(".tmux.conf", "set -g assume-paste-time 0\n")
        shell, transcript = await bash(vm, cols=100, rows=30)
        await shell.write("tmux new -s work\n")
        await transcript.until(rb"\[work\]")
        await shell.write("echo in-$((40 + 2))-tmux\n")
        await transcript.until(b"in-42-tmux")
        await shell.write("\x02%")
        await shell.write("tmux list-panes | wc -l | sed 's/^/panes:/'\n")
        await transcript.until(b"panes:2")
        await shell.write("\x02d")
        await transcript.until(rb"\[detached \(from session work\)\]")
        await shell.close()
        shell, transcript = await bash(vm, cols=100, rows=30)
        await shell.write("tmux attach -t work\n")
        await transcript.until(b"in-42-tmux")
        await shell.write("tmux kill-server\n")
        await transcript.until(PROMPT)
        await shell.close()

    in_vm(body)


def test_a_program_that_closes_its_terminal_is_not_hung_up(in_vm: Any) -> None:
    """It ends as it would in any terminal, and can say something until then: by /dev/tty, which is still its own."""

    async def body(vm: VM) -> None:
        script = "exec <&- >&- 2>&-; sleep 0.3; echo 'still here' >/dev/tty; exit 7"
        closing = await vm.open_shell("bash", ["-c", script])
        for _ in range(10):
            shell = await vm.open_shell("cat")
            await shell.write("typed\n\x04")
            assert await shell.wait() == 0
        assert await closing.wait() == 7
        assert b"".join([chunk.data async for chunk in closing.output()]) == b"still here\r\n"

    in_vm(body)
