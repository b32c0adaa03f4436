"""Bad input: a typed error that names what was wrong; nothing was changed, and the VM answers on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from surfaces import Python, Surface, camel, fails


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


def test_arguments_are_named_as_the_caller_wrote_them(on: Any) -> None:
    """In Python as Python has them, on the wire as the wire has them, whoever it is that refuses them."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("cat", idempotency_key="used")
        for name, attempt in (
            ("idempotency_key", lambda: vm.spawn("true", idempotency_key="")),
            ("idempotency_key", lambda: vm.spawn("true", idempotency_key="x" * 257)),
            ("idempotency_key", lambda: vm.spawn("true", idempotency_key="used")),
            ("idempotency_key", lambda: vm.write_process_stdin(process.pid, "x", idempotency_key="x" * 257)),
            ("max_bytes", lambda: vm.read_process_output(process.pid, max_bytes=0)),
            ("max_entries", lambda: vm.readdir(".", max_entries=2**40)),
            ("make_parents", lambda: vm.write_file("x", "x", make_parents=5)),
            ("args[1]", lambda: vm.spawn("true", ["x", "a\0b"])),
        ):
            wanted = name if isinstance(vm, Python) else camel(name)
            with fails("request.invalid", f"^{re.escape(wanted)}: wanted ") as error:
                await attempt()
            assert error.details["argument"] == wanted

    on(body)


def test_nothing_passes_for_what_it_only_resembles(on: Any) -> None:
    """True is no second, 1 is no True, an empty key is a key; every surface says so, and does nothing."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("cat")
        await vm.write_file("kept/file", "as it was")
        for named, attempt in (
            ("lossless", lambda: vm.spawn("touch", ["x"], lossless=1)),
            ("idempotency_?key", lambda: vm.spawn("touch", ["x"], idempotency_key="")),
            ("idempotency_?key", lambda: vm.spawn("touch", ["x"], idempotency_key=0)),
            ("idempotency_?key", lambda: vm.write_process_stdin(process.pid, "x", idempotency_key="")),
            ("idempotency_?key", lambda: vm.write_shell("shell-1", "x", idempotency_key="")),
            ("append", lambda: vm.write_file("kept/file", "x", append=1)),
            ("make_?parents", lambda: vm.write_file("x/y", "x", make_parents=-1)),
            ("length", lambda: vm.read_file("kept/file", length="5")),
            ("parents", lambda: vm.mkdir("x", parents="no")),
            ("overwrite", lambda: vm.move("kept/file", "x", overwrite="no")),
            ("recursive", lambda: vm.delete_file("kept", recursive=1)),
            ("missing_?ok", lambda: vm.delete_file("nothing", missing_ok=1)),
            *(_only_in_python(vm, process.pid) if isinstance(vm, Python) else ()),
        ):
            with fails("request.invalid", f"(?i)({named})"):
                await attempt()
        assert [one.pid for one in await vm.list_processes()] == [process.pid]
        assert (await vm.exec("ls; cat kept/file")).stdout == "kept\nas it was"

    on(body)


def _only_in_python(vm: Python, pid: int) -> list[tuple[str, Callable[[], Any]]]:
    """Values that JavaScript does not have, or that its clients change before they send them."""
    return [
        ("timeout", lambda: vm.exec("touch x", timeout=True)),
        ("timeout", lambda: vm.exec("touch x", timeout=10**400)),
        ("timeout", lambda: vm.exec("touch x", timeout="5")),
        ("timeout", lambda: vm.spawn("touch", ["x"], timeout=True)),
        ("command", lambda: vm.exec("touch x\ud800")),
        (r"args\[0\]", lambda: vm.spawn("touch", ["\ud800"])),
        ("args", lambda: vm.spawn("touch", {"x"})),
        ("env", lambda: vm.exec("touch x", env={"A": "\ud800"})),
        ("wait", lambda: vm.read_process_output(pid, wait="5")),
        ("wait", lambda: vm.read_process_output(pid, wait=True)),
        ("since", lambda: vm.read_process_output(pid, since=10**400)),
        ("kill_?after", lambda: vm.stop_process(pid, kill_after=True)),
        ("data", lambda: vm.write_process_stdin(pid, "\ud800")),
        ("data", lambda: vm.write_file("x", "\ud800")),
        ("path", lambda: vm.write_file("\ud800", "x")),
        ("paths", lambda: vm.read_files(bytearray(b"x"))),
        ("paths", lambda: vm.read_files({"x": "y"})),
        ("files", lambda: vm.write_files("x")),
    ]


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
