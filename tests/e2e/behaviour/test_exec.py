"""exec and execFile: results, options, and every reason for which a command can end."""

from __future__ import annotations

import asyncio
from typing import Any

from e2e_support import as_root
from surfaces import Surface, fails


def test_a_result_has_every_field(on: Any) -> None:
    """Exit code and both streams apart; what it took; why it ended."""

    async def body(vm: Surface) -> None:
        result = await vm.exec("echo out; echo err >&2; exit 3")
        assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")
        assert (result.reason, result.signal) == ("exited", None)
        assert (result.stdout_truncated, result.stderr_truncated, result.orphans) == (False, False, ())
        assert result.duration_ms > 0
        assert result.usage.cpu_ms >= 0
        assert result.usage.max_rss_bytes > 0

    on(body)


def test_a_shell_parses_the_line_and_none_parses_arguments(on: Any) -> None:
    """Pipes and variables in exec; every byte as it is in execFile."""

    async def body(vm: Surface) -> None:
        assert (await vm.exec("x=5; echo $((x+1)) | tr 6 7")).stdout == "7\n"
        odd = ["$HOME", "a b", "", "*", "'\"\\", "-n", "größe", "\n"]
        result = await vm.exec_file("printf", ["<%s>", *odd])
        assert result.stdout == "".join(f"<{one}>" for one in odd)

    on(body)


def test_where_and_as_whom_it_runs(on: Any) -> None:
    """Home, user and host name by default; cwd, env and user by option, of one command only."""

    async def body(vm: Surface) -> None:
        told = (await vm.exec("pwd; id -un; id -u; hostname; echo $HOME")).stdout.split()
        assert told == ["/home/agentos", "agentos", "1000", "agentos", "/home/agentos"]
        told = await vm.exec("pwd; id -u; echo $COLOR", cwd="/tmp", user="root", env={"COLOR": "deep blue"})
        assert told.stdout == "/tmp\n0\ndeep blue\n"
        assert (await vm.exec("echo [$COLOR]")).stdout == "[]\n"
        assert (await vm.exec_file("env", [], env={"A": "1=2"})).stdout.count("A=1=2\n") == 1

    on(body)


def test_stdin_is_what_was_given_or_empty(on: Any) -> None:
    """Text, bytes, megabytes; a reader without is at its end at once; who does not read is no failure."""

    async def body(vm: Surface) -> None:
        assert (await vm.exec("cat", stdin="größe\n")).stdout == "größe\n"
        assert (await vm.exec("cat", stdin=b"\xff\x00", encoding="bytes")).stdout == b"\xff\x00"
        assert (await vm.exec("wc -c", stdin=b"x" * 2_000_000)).stdout == "2000000\n"
        assert (await vm.exec("cat; echo end")).stdout == "end\n"
        assert (await vm.exec("true", stdin=b"x" * 2_000_000)).reason == "exited"

    on(body)


def test_output_is_text_or_bytes(on: Any) -> None:
    """Undecodable bytes become U+FFFD, characters split between two writes are whole; bytes come as they are."""

    async def body(vm: Surface) -> None:
        assert (await vm.exec(r"printf '\377a\303'; sleep 0.05; printf '\244'")).stdout == "\ufffdaä"
        assert (await vm.exec(r"printf '\342\202'; sleep 0.05; printf '\254'")).stdout == "€"
        raw = await vm.exec(r"printf '\377\000\303'; printf e >&2", encoding="bytes")
        assert (raw.stdout, raw.stderr) == (b"\xff\x00\xc3", b"e")
        assert (await vm.exec(r"printf 'a\000b'")).stdout == "a\x00b"

    on(body)


def test_a_timeout_keeps_the_output_and_leaves_nobody(on: Any) -> None:
    """setsid and double forks included."""

    async def body(vm: Surface) -> None:
        line = "echo partial; setsid sleep 1000 & (setsid sleep 1001 &); sleep 1002"
        result = await vm.exec(line, timeout=0.4)
        assert (result.stdout, result.reason, result.exit_code) == ("partial\n", "timeout", 137)
        assert result.orphans == ()
        assert await vm.alive() == []

    on(body)


def test_silence_and_cpu_time_have_limits_of_their_own(on: Any) -> None:
    """idleTimeout and cpuTimeout, each with its reason."""

    async def body(vm: Surface) -> None:
        quiet = await vm.exec("for i in 1 2 3; do echo $i; sleep 0.1; done; sleep 1000", idle_timeout=0.6)
        assert (quiet.stdout, quiet.reason) == ("1\n2\n3\n", "idleTimeout")
        busy = await vm.exec("echo spinning; while :; do :; done", cpu_timeout=0.2)
        assert (busy.stdout, busy.reason) == ("spinning\n", "cpuTimeout")

    on(body)


def test_a_signal_is_told_from_an_exit_code(on: Any) -> None:
    """128 + n with the signal's name and `signaled`; the same number as an exit code is `exited`."""

    async def body(vm: Surface) -> None:
        killed = await vm.exec("kill -9 $$")
        assert (killed.exit_code, killed.signal, killed.reason) == (137, "SIGKILL", "signaled")
        left = await vm.exec("exit 137")
        assert (left.exit_code, left.signal, left.reason) == (137, None, "exited")

    on(body)


def test_captured_output_has_a_bound(on: Any) -> None:
    """What is beyond maxOutputBytes is dropped and said to be, of each stream alone; the command goes on."""

    async def body(vm: Surface) -> None:
        result = await vm.exec("yes | head -c 5000; echo e >&2; exit 4", max_output_bytes=1000)
        assert (len(result.stdout), result.stdout_truncated) == (1000, True)
        assert (result.stderr, result.stderr_truncated, result.exit_code) == ("e\n", False, 4)
        whole = await vm.exec("head -c 70000 /dev/zero")
        assert (len(whole.stdout), whole.stdout_truncated) == (64 * 1024, True)
        with fails("limit.exceeded", "output_bytes") as error:
            await vm.exec("true", max_output_bytes=10_000_000)
        assert error.details["limit"] == "output_bytes"

    on(body, kind="small")


def test_it_returns_with_its_leader(on: Any) -> None:
    """A background child that holds the pipe is named and lives on; or is waited for; or killed."""

    async def body(vm: Surface) -> None:
        result = await vm.exec("sleep 1000 & echo started")
        assert (result.stdout, result.reason) == ("started\n", "exited")
        (orphan,) = result.orphans
        assert await vm.alive() == [orphan.pid]
        await vm.exec(f"kill -9 {orphan.pid}")
        waited = await vm.exec("(sleep 0.2; echo late) & echo first", on_leader_exit="wait")
        assert (waited.stdout, waited.orphans) == ("first\nlate\n", ())
        killed = await vm.exec("setsid sleep 1000 & echo done; exit 5", on_leader_exit="kill")
        assert (killed.stdout, killed.exit_code, killed.orphans) == ("done\n", 5, ())
        assert await vm.alive() == []

    on(body)


def test_a_command_that_is_not_found(on: Any) -> None:
    """127 through the shell, an error through argv; so is one that may not be run, and a bad directory."""

    async def body(vm: Surface) -> None:
        result = await vm.exec("no-such-program")
        assert (result.exit_code, result.reason) == (127, "exited")
        assert "no-such-program" in result.stderr
        with fails("process.spawn_failed") as error:
            await vm.exec_file("no-such-program", [])
        assert error.details["errno"] == 2
        with fails("process.spawn_failed") as error:
            await vm.spawn("ls -la")
        assert "arguments are given apart" in error.message
        with fails("process.spawn_failed") as error:
            await vm.exec_file("/etc/passwd", [])
        assert error.details["errno"] == 13
        with fails("process.spawn_failed"):
            await vm.exec("true", cwd="/no/such/directory")
        assert (await vm.exec("echo fine")).stdout == "fine\n"

    on(body)


def test_many_at_once_do_not_mix(on: Any) -> None:
    """Thirty commands, each with its own output."""

    async def body(vm: Surface) -> None:
        results = await asyncio.gather(*(vm.exec(f"echo {number}; exit {number}") for number in range(30)))
        assert [(one.stdout, one.exit_code) for one in results] == [(f"{n}\n", n) for n in range(30)]

    on(body)


@as_root
def test_out_of_memory_is_a_reason(on: Any) -> None:
    """Where the VM's memory has a limit, who goes over it is killed, and the result says why."""

    async def body(vm: Surface) -> None:
        result = await vm.exec("echo begun; exec python3 -c 'x = bytearray(400_000_000)'")
        assert (result.stdout, result.reason) == ("begun\n", "oom")
        assert (await vm.exec("echo alive")).stdout == "alive\n"

    on(body, kind="small")
