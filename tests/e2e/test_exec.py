"""exec: returns with its leader, names who stays, keeps output bounded and characters whole."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from e2e_support import Transcript, commands, needs_program, size_of, still_works

from agentos import VM
from agentos.errors import CommandFailed, SpawnFailed

BEATS = "i=0; while true; do echo $i; i=$((i+1)); echo $i > /tmp/beats; sleep 0.01; done"
"""Writes to the stdout that it inherited, and after each such write to a file."""


def test_the_result_tells_output_and_exit_code(in_vm: Any) -> None:
    """stdout, stderr and exit code come back apart, with a duration and what the program used."""

    async def body(vm: VM) -> None:
        result = await vm.exec("echo out; echo err >&2; exit 3")
        assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
        assert (result.reason, result.signal, result.orphans) == ("exited", None, ())
        assert not result.stdout_truncated
        assert not result.stderr_truncated
        assert result.duration_ms > 0
        assert result.usage.max_rss_bytes > 0
        assert not result.ok
        with pytest.raises(CommandFailed) as caught:
            result.check()
        assert caught.value.details["exitCode"] == 3
        assert caught.value.details["stderr"] == "err\n"
        assert str(caught.value) == "command failed: exit code 3; stderr: err"
        result = await vm.exec("-x; exit 5")
        assert (result.exit_code, "-x: command not found" in result.stderr) == (5, True)
        assert (await vm.exec("-x")).exit_code == 127

    in_vm(body)


def test_a_background_child_that_holds_the_pipe_does_not_hold_exec_up(in_vm: Any) -> None:
    """`sleep 60 &` returns at once, is named with its arguments, and lives on."""

    async def body(vm: VM) -> None:
        began = time.monotonic()
        result = await vm.exec("sleep 60 & echo started")
        assert time.monotonic() - began < 5
        assert (result.stdout, result.exit_code, result.reason) == ("started\n", 0, "exited")
        assert len(result.orphans) == 1
        assert [one.pid for one in await vm.all_processes()] == [result.orphans[0].pid]
        # Named while it still was bash's fork, or as what it became: both say which of the script's it is.
        result = await vm.exec("sleep 61 & read -t 0.2 < <(sleep 9)")
        assert "sleep 61" in [one.command for one in result.orphans]

    in_vm(body)


def test_a_background_child_may_go_on_writing_to_the_stdout_it_inherited(in_vm: Any) -> None:
    """Long after exec has returned, the child writes more than a pipe holds and does not die of SIGPIPE."""

    async def body(vm: VM) -> None:
        script = "(read -r go < /tmp/go; head -c 1000000 /dev/zero && echo alive > /tmp/result) &"
        result = await vm.exec(f"mkfifo /tmp/go /tmp/result; {script} echo left")
        assert result.stdout == "left\n"
        assert result.orphans
        result = await vm.exec("echo go > /tmp/go; cat /tmp/result", timeout=20)
        assert (result.stdout, result.reason) == ("alive\n", "exited")

    in_vm(body)


def test_on_leader_exit_wait_includes_what_children_write(in_vm: Any) -> None:
    """`wait` returns with the last of the lineage, and its output is in the result."""

    async def body(vm: VM) -> None:
        result = await vm.exec("(sleep 0.3; echo late) & echo first", on_leader_exit="wait")
        assert (result.stdout, result.orphans) == ("first\nlate\n", ())
        result = await vm.exec("(setsid sh -c 'sleep 0.3; echo far' &) ; exit 4", on_leader_exit="wait")
        assert (result.stdout, result.exit_code) == ("far\n", 4)

    in_vm(body)


def test_on_leader_exit_wait_ends_with_a_timeout(in_vm: Any) -> None:
    """A child that never ends is killed by the timeout while it is waited for, and the reason says so."""

    async def body(vm: VM) -> None:
        result = await vm.exec("sleep 1000 & echo first", on_leader_exit="wait", timeout=0.5)
        assert (result.stdout, result.reason, result.orphans) == ("first\n", "timeout", ())
        assert await commands(vm) == []

    in_vm(body)


def test_on_leader_exit_kill_leaves_nobody(in_vm: Any) -> None:
    """`kill` ends what the leader left, a session of its own included, and the exit code stays the leader's."""

    async def body(vm: VM) -> None:
        result = await vm.exec("setsid sleep 1000 & sleep 1001 & echo done; exit 5", on_leader_exit="kill")
        assert (result.stdout, result.exit_code, result.reason) == ("done\n", 5, "exited")
        assert result.orphans == ()
        assert await commands(vm) == []

    in_vm(body)


def test_stdin_is_given_and_is_empty_otherwise(in_vm: Any) -> None:
    """Text and bytes arrive whole, 3 MB of them too; without stdin a reader is at its end at once."""

    async def body(vm: VM) -> None:
        assert (await vm.exec("cat", stdin="größe\n")).stdout == "größe\n"
        assert (await vm.exec("cat", stdin=b"\xff\0", encoding="bytes")).stdout == b"\xff\0"
        assert (await vm.exec("wc -c", stdin=b"x" * 3_000_000)).stdout == "3000000\n"
        assert (await vm.exec("cat; echo end", timeout=10)).stdout == "end\n"
        # A program need not read what it is given.
        result = await vm.exec("true", stdin=b"x" * 3_000_000)
        assert (result.exit_code, result.reason) == (0, "exited")

    in_vm(body)


def test_stdin_larger_than_a_pipe_while_output_is_larger_too(in_vm: Any) -> None:
    """Feeding and reading go on at once: `cat` of 5 MB does not lock up."""

    async def body(vm: VM) -> None:
        data = bytes(range(256)) * 20_000
        result = await vm.exec("cat", stdin=data, encoding="bytes")
        assert result.stdout == data

    in_vm(body)


def test_capture_is_bounded_and_says_so(in_vm: Any) -> None:
    """The first bytes of each stream are kept, the rest is dropped, and only where it was the flag is set."""

    async def body(vm: VM) -> None:
        result = await vm.exec("printf 0123456789; printf abc >&2", max_output_bytes=4)
        assert (result.stdout, result.stderr) == ("0123", "abc")
        assert (result.stdout_truncated, result.stderr_truncated) == (True, False)
        result = await vm.exec("printf 0123", max_output_bytes=4)
        assert (result.stdout, result.stdout_truncated) == ("0123", False)
        result = await vm.exec("printf 0", max_output_bytes=0)
        assert (result.stdout, result.stdout_truncated, result.exit_code) == ("", True, 0)
        result = await vm.exec("head -c 50000000 /dev/zero | tr '\\0' x; echo end >&2")
        assert (len(result.stdout), result.stdout_truncated) == (16 * 1024 * 1024, True)
        assert (result.stderr, result.exit_code) == ("end\n", 0)

    in_vm(body)


def test_a_character_that_the_bound_cuts_is_left_out(in_vm: Any) -> None:
    """No replacement character is invented at the cut; as bytes, the cut is exact."""

    async def body(vm: VM) -> None:
        for bound, kept in ((1, ""), (3, "€"), (4, "€"), (5, "€"), (6, "€€")):
            result = await vm.exec("printf '€€€'", max_output_bytes=bound)
            assert (result.stdout, result.stdout_truncated) == (kept, True)
        result = await vm.exec("printf '€€€'", max_output_bytes=4, encoding="bytes")
        assert result.stdout == "€€€".encode()[:4]

    in_vm(body)


def test_a_character_split_across_writes_is_whole(in_vm: Any) -> None:
    """Four writes of one byte each, with time between, make one character; what is no UTF-8 becomes U+FFFD."""

    async def body(vm: VM) -> None:
        split = (
            r"printf '\xf0'; sleep 0.05; printf '\x9f'; sleep 0.05; printf '\x98'; sleep 0.05; printf '\x80'"
        )
        assert (await vm.exec(split)).stdout == "😀"
        assert (await vm.exec(r"printf 'a\xffb'")).stdout == "a�b"
        assert (await vm.exec(r"printf 'a\xf0\x9f'")).stdout.startswith("a�")

    in_vm(body)


def test_the_exit_code_never_comes_before_the_output(in_vm: Any) -> None:
    """Two hundred times, a program that writes and ends at once has its last byte in the result."""

    async def body(vm: VM) -> None:
        for number in range(200):
            result = await vm.exec_file("printf", [f"{number}:%s", "x" * 5000])
            assert result.stdout == f"{number}:" + "x" * 5000

    in_vm(body)


def test_many_at_once_do_not_mix(in_vm: Any) -> None:
    """A hundred commands at once each get their own output and exit code."""

    async def body(vm: VM) -> None:
        results = await asyncio.gather(*(vm.exec(f"echo {n}; exit {n}") for n in range(100)))
        assert [(one.stdout, one.exit_code) for one in results] == [(f"{n}\n", n) for n in range(100)]

    in_vm(body)


def test_a_signal_is_told_from_an_exit_code(in_vm: Any) -> None:
    """`kill -9 $$` has exit code 137, signal SIGKILL and reason signaled; `exit 137` was an exit."""

    async def body(vm: VM) -> None:
        result = await vm.exec("kill -9 $$")
        assert (result.exit_code, result.signal, result.reason) == (137, "SIGKILL", "signaled")
        result = await vm.exec("exit 137")
        assert (result.exit_code, result.signal, result.reason) == (137, None, "exited")
        result = await vm.exec("kill -SEGV $$")
        assert (result.exit_code, result.signal, result.reason) == (139, "SIGSEGV", "signaled")

    in_vm(body)


def test_a_command_that_is_not_found(in_vm: Any) -> None:
    """127 through the shell, as everybody expects; SpawnFailed through argv."""

    async def body(vm: VM) -> None:
        result = await vm.exec("no-such-program-here")
        assert (result.exit_code, result.reason) == (127, "exited")
        assert "not found" in result.stderr
        with pytest.raises(SpawnFailed) as caught:
            await vm.exec_file("no-such-program-here")
        assert caught.value.details == {"command": "no-such-program-here", "errno": 2, "step": "exec"}

    in_vm(body)


def test_a_builtin_is_not_looked_for_on_the_path(in_vm: Any) -> None:
    """A program of the user's that has a builtin's name is started where bash would start it, and only there."""

    async def body(vm: VM) -> None:
        await vm.files.mkdir(".local/bin")
        for name in ("echo", "true", "false", "ls"):
            await vm.files.write_file(f".local/bin/{name}", "#!/bin/sh\nprintf mine\nexit 9\n", mode=0o755)
        for command in ("echo hi", "echo hi;", "echo"):
            assert (await vm.exec(command)).stdout == command[5:].rstrip(";") + "\n"
        for command, code in (
            ("true", 0),
            ("false", 1),
            ("true a b", 0),
            ("false -x", 1),
            ("true --help", 0),
        ):
            result = await vm.exec(command)
            assert (result.exit_code, result.stdout) == (code, ""), command
        assert (await vm.exec("ls")).stdout == "mine"
        assert (await vm.exec("env echo hi")).stdout == "mine"

    in_vm(body)


def test_arguments_are_not_parsed(in_vm: Any) -> None:
    """exec_file hands over spaces, quotes, newlines, empty and undecodable arguments as they are."""

    async def body(vm: VM) -> None:
        args = ["a b", "", "$HOME", "'\"", "x\ny", "*", "ü", "\udcff"]
        result = await vm.exec_file("printf", ["%s\\0", *args], encoding="bytes")
        assert result.stdout.split(b"\0")[:-1] == [one.encode("utf-8", "surrogateescape") for one in args]

    in_vm(body)


def test_directory_environment_and_user(in_vm: Any) -> None:
    """cwd, env and user are the command's own: the VM's variables, then the call's, and home by default."""

    async def body(vm: VM) -> None:
        assert (await vm.exec("pwd; id -un; hostname")).stdout == "/home/agentos\nagentos\nagentos\n"
        assert (await vm.exec("pwd", cwd="/tmp")).stdout == "/tmp\n"
        await vm.exec("mkdir below")
        assert (await vm.exec("pwd", cwd="below")).stdout == "/home/agentos/below\n"
        result = await vm.exec("echo $A-$B-$C", env={"B": "call", "C": "x=y"})
        assert result.stdout == "vm-call-x=y\n"
        assert (await vm.exec("id -u; echo $HOME", user="root")).stdout == "0\n/root\n"

    in_vm(body, env={"A": "vm", "B": "vm"})


def test_a_runaway_writer_is_stopped(in_vm: Any) -> None:
    """One that writes without end is ended by the bound on all output, with what was captured."""

    async def body(vm: VM) -> None:
        result = await vm.exec("yes", max_output_bytes=6)
        assert (result.reason, result.stdout, result.stdout_truncated) == ("outputLimit", "y\ny\ny\n", True)
        assert await commands(vm) == []

    from agentos import Limits

    in_vm(body, limits=Limits(runaway_bytes=20_000_000))


def test_closing_the_vm_ends_a_running_exec_with_a_result(in_vm: Any) -> None:
    """An exec that runs when its VM is closed has reason vmStopped, and its output so far."""

    async def body(vm: VM) -> None:
        running = asyncio.create_task(vm.exec("echo before; echo > /tmp/fifo; sleep 1000"))
        await vm.exec("mkfifo /tmp/fifo 2>/dev/null; read < /tmp/fifo")
        await vm.close()
        result = await running
        assert (result.exit_code, result.reason, result.stdout) == (137, "vmStopped", "before\n")

    async def with_fifo(vm: VM) -> None:
        await vm.exec("mkfifo /tmp/fifo")
        await body(vm)

    in_vm(with_fifo)


def test_cancelling_an_exec_kills_it(in_vm: Any) -> None:
    """A cancelled caller leaves no process behind, whatever session it moved to."""

    async def body(vm: VM) -> None:
        await vm.exec("mkfifo /tmp/fifo")
        running = asyncio.create_task(vm.exec(f"setsid sh -c '{BEATS}' & echo > /tmp/fifo; sleep 1000"))
        await vm.exec("read < /tmp/fifo")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        # The kill was asked for on the same channel, so it is done when the next answer is there.
        assert await commands(vm) == []
        await still_works(vm)

    in_vm(body)


def test_a_time_limit_around_exec_is_a_cancellation(in_vm: Any) -> None:
    """asyncio.timeout around exec ends it, and its process with it."""

    async def body(vm: VM) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await vm.exec("sleep 1000")
        assert await commands(vm) == []
        await still_works(vm)

    in_vm(body)


def test_heredocs_and_long_scripts(in_vm: Any) -> None:
    """A script of 100 KB with here-documents runs as in any bash."""

    async def body(vm: VM) -> None:
        script = "cat <<'EOF'\n" + "line $x `y`\n" * 8000 + "EOF\necho $?"
        assert (await vm.exec(script)).stdout == "line $x `y`\n" * 8000 + "0\n"

    in_vm(body)


@needs_program("python3")
def test_output_of_a_child_that_outlives_its_parents_end_is_not_in_the_result_twice(in_vm: Any) -> None:
    """What a child writes after its leader's end belongs to no later command's result."""

    async def body(vm: VM) -> None:
        await vm.exec(f"({BEATS}) &")
        for _ in range(5):
            assert (await vm.exec("echo mine")).stdout == "mine\n"
        before = await size_of(vm, "/tmp/beats")
        assert before > 0
        process = await vm.spawn("sh", ["-c", "tail -f /tmp/beats"])
        await Transcript(process).until(rb"\d+\n")  # it still beats
        await process.kill()

    in_vm(body)
