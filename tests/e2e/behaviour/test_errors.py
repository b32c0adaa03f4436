"""Bad input: a typed error that names what was wrong; nothing was changed, and the VM answers on."""

from __future__ import annotations

from typing import Any

from surfaces import Surface, fails


def test_unknown_pids_and_shells(on: Any) -> None:
    """By every verb that takes one."""

    async def body(vm: Surface) -> None:
        for verb, more in (
            (vm.write_process_stdin, ["x"]), (vm.close_process_stdin, []), (vm.wait_process, []),
            (vm.get_process, []), (vm.stop_process, []), (vm.kill_process, []), (vm.signal_process, ["SIGINT"]),
            (vm.read_process_output, []),
        ):  # fmt: skip
            with fails("process.not_found", "^Process not found: 4711$") as error:
                await verb(4711, *more)
            assert error.details == {"pid": 4711}
        for verb, more in (
            (vm.write_shell, ["x"]), (vm.resize_shell, [80, 24]), (vm.close_shell, []), (vm.wait_shell, []),
            (vm.read_shell, []),
        ):  # fmt: skip
            with fails("shell.not_found", "^Shell not found: nope$") as error:
                await verb("nope", *more)
            assert error.details == {"shellId": "nope"}

    on(body)


def test_wrong_arguments_are_named(on: Any) -> None:
    """Each with what was wanted."""

    async def body(vm: Surface) -> None:
        for named, attempt in (
            ("command", lambda: vm.exec(5)),
            ("command", lambda: vm.exec("a\0b")),
            ("args", lambda: vm.exec_file("true", "text")),
            ("args", lambda: vm.spawn("true", [1])),
            ("cwd", lambda: vm.exec("true", cwd=5)),
            ("env", lambda: vm.exec("true", env=["A=b"])),
            ("env", lambda: vm.exec("true", env={"A": 5})),
            ("user", lambda: vm.exec("true", user="nobody-we-know")),
            ("encoding", lambda: vm.exec("true", encoding="latin-1")),
            ("onLeaderExit|on_leader_exit", lambda: vm.exec("true", on_leader_exit="hope")),
            ("timeout", lambda: vm.exec("true", timeout=-1)),
            ("maxOutputBytes|max_output_bytes", lambda: vm.exec("true", max_output_bytes=-1)),
            ("stdin", lambda: vm.exec("true", stdin=5)),
            ("pid", lambda: vm.get_process("seven")),
            ("pid", lambda: vm.get_process(-1)),
            ("signal", lambda: vm.signal_process(5, "SIGNOTHING")),
            ("cols", lambda: vm.open_shell(cols=0)),
            ("rows", lambda: vm.open_shell(rows=5000)),
            # wrong arguments come first, before it is asked what the pid or the shell is
            ("timeout", lambda: vm.wait_process(4711, timeout=-1)),
            ("data", lambda: vm.write_process_stdin(4711, 5)),
            ("cursor", lambda: vm.read_process_output(4711, cursor=-1)),
            ("maxBytes|max_bytes", lambda: vm.read_process_output(4711, max_bytes=0)),
            ("wait", lambda: vm.read_process_output(4711, wait=-1)),
            ("data", lambda: vm.write_shell("nope", 5)),
            ("rows", lambda: vm.resize_shell("nope", 80, 0)),
            ("timeout", lambda: vm.wait_shell("nope", timeout=-1)),
            ("cursor", lambda: vm.read_shell("nope", cursor=-1)),
            ("path", lambda: vm.read_file("")),
            ("path", lambda: vm.read_file("a\0b")),
            ("path", lambda: vm.stat(5)),
            ("data", lambda: vm.write_file("x", 5)),
        ):
            with fails("request.invalid", f"(?i)({named})"):
                await attempt()
        assert await vm.list_processes() == []
        assert await vm.list_shells() == []
        assert (await vm.exec("echo fine; ls")).stdout == "fine\n"

    on(body)


def test_too_much(on: Any) -> None:
    """Of arguments and environment: the limit is named, nothing was started."""

    async def body(vm: Surface) -> None:
        long = "x" * 100_000
        for limit, options in (
            ("argument_bytes", {"args": [long] * 7}),
            ("argument_bytes", {"args": [], "env": {f"A{number}": long for number in range(7)}}),
            ("MAX_ARG_STRLEN", {"args": [long * 2]}),
        ):
            with fails("limit.exceeded") as error:
                await vm.exec_file("true", **options)
            assert error.details["limit"] == limit
        assert (await vm.exec("echo fine")).stdout == "fine\n"

    on(body)
