"""Bad input: a typed error with a code, and details that name the argument; nothing has changed and nothing leaks."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from e2e_support import as_root, commands, one_id, open_descriptors, still_works

from agentos import VM, Host, Limits, Mount, VmSpec
from agentos.errors import (
    AgentOSError,
    BootFailed,
    FileDenied,
    FileMissing,
    InvalidRequest,
    LimitExceeded,
    ProcessNotFound,
    ShellNotFound,
    SpawnFailed,
    VmStopped,
)

Call = Callable[[VM], Awaitable[Any]]

WRONG: dict[str, tuple[Call, str]] = {
    "exec no text": (lambda vm: vm.exec(42), "command"),  # type: ignore[arg-type]
    "exec None": (lambda vm: vm.exec(None), "command"),  # type: ignore[arg-type]
    "exec bytes": (lambda vm: vm.exec(b"true"), "command"),  # type: ignore[arg-type]
    "exec NUL": (lambda vm: vm.exec("echo a\0b"), "command"),
    "exec lone surrogate": (lambda vm: vm.exec("echo \ud800"), "command"),
    "file empty": (lambda vm: vm.exec_file(""), "command"),
    "file NUL": (lambda vm: vm.exec_file("a\0b"), "command"),
    "args one text": (lambda vm: vm.exec_file("echo", "abc"), "args"),
    "args number": (lambda vm: vm.spawn("echo", 5), "args"),  # type: ignore[arg-type]
    "args a set": (lambda vm: vm.spawn("echo", {"a"}), "args"),  # type: ignore[arg-type]
    "arg NUL": (lambda vm: vm.spawn("echo", ["ok", "a\0b"]), "args[1]"),
    "arg number": (lambda vm: vm.spawn("echo", ["ok", 3]), "args[1]"),  # type: ignore[list-item]
    "arg None": (lambda vm: vm.spawn("echo", [None]), "args[0]"),  # type: ignore[list-item]
    "env list": (lambda vm: vm.exec("true", env=["A=b"]), "env"),  # type: ignore[arg-type]
    "env value": (lambda vm: vm.exec("true", env={"A": 1}), "env['A']"),  # type: ignore[dict-item]
    "env value None": (lambda vm: vm.exec("true", env={"A": None}), "env['A']"),  # type: ignore[dict-item]
    "env bytes": (lambda vm: vm.exec("true", env={"A": b"\xff"}), "env['A']"),  # type: ignore[dict-item]
    "env value NUL": (lambda vm: vm.spawn("true", env={"A": "a\0"}), "env['A']"),
    "env name": (lambda vm: vm.spawn("true", env={"A=B": "x"}), "env variable"),
    "env name empty": (lambda vm: vm.spawn("true", env={"": "x"}), "env variable"),
    "env name number": (lambda vm: vm.spawn("true", env={1: "x"}), "env variable"),  # type: ignore[dict-item]
    "cwd NUL": (lambda vm: vm.exec("true", cwd="/tmp\0"), "cwd"),
    "cwd number": (lambda vm: vm.exec("true", cwd=7), "cwd"),  # type: ignore[arg-type]
    "cwd empty": (lambda vm: vm.exec("true", cwd=""), "cwd"),
    "user unknown": (lambda vm: vm.exec("true", user="nobody"), "user"),
    "user number": (lambda vm: vm.exec("true", user=0), "user"),  # type: ignore[arg-type]
    "stdin number": (lambda vm: vm.exec("cat", stdin=5), "stdin"),  # type: ignore[arg-type]
    "stdin list": (lambda vm: vm.exec("cat", stdin=[1]), "stdin"),  # type: ignore[arg-type]
    "timeout negative": (lambda vm: vm.exec("true", timeout=-1), "timeout"),
    "timeout text": (lambda vm: vm.exec("true", timeout="1"), "timeout"),  # type: ignore[arg-type]
    "timeout True": (lambda vm: vm.exec("true", timeout=True), "timeout"),
    "timeout nan": (lambda vm: vm.exec("true", timeout=math.nan), "timeout"),
    "timeout infinite": (lambda vm: vm.exec("true", timeout=math.inf), "timeout"),
    "idle negative": (lambda vm: vm.exec("true", idle_timeout=-0.1), "idle_timeout"),
    "cpu text": (lambda vm: vm.exec("true", cpu_timeout="x"), "cpu_timeout"),  # type: ignore[arg-type]
    "output negative": (lambda vm: vm.exec("true", max_output_bytes=-1), "max_output_bytes"),
    "output float": (lambda vm: vm.exec("true", max_output_bytes=1.5), "max_output_bytes"),  # type: ignore[arg-type]
    "encoding": (lambda vm: vm.exec("true", encoding="latin1"), "encoding"),
    "encoding list": (lambda vm: vm.exec("true", encoding=["utf8"]), "encoding"),  # type: ignore[arg-type]
    "leader exit": (lambda vm: vm.exec("true", on_leader_exit="stay"), "on_leader_exit"),
    "spawn timeout": (lambda vm: vm.spawn("true", timeout=-1), "timeout"),
    "lossless": (lambda vm: vm.spawn("true", lossless=1), "lossless"),  # type: ignore[arg-type]
    "key empty": (lambda vm: vm.spawn("true", idempotency_key=""), "idempotency_key"),
    "key long": (lambda vm: vm.spawn("true", idempotency_key="x" * 257), "idempotency_key"),
    "key number": (lambda vm: vm.spawn("true", idempotency_key=1), "idempotency_key"),  # type: ignore[arg-type]
    "pid text": (lambda vm: vm.wait_process("1"), "pid"),  # type: ignore[arg-type]
    "pid negative": (lambda vm: vm.kill_process(-1), "pid"),
    "pid float": (lambda vm: vm.get_process(1.0), "pid"),  # type: ignore[arg-type]
    "pid True": (lambda vm: vm.get_process(True), "pid"),
    "signal unknown": (lambda vm: vm.signal_process(1, "SIGNOPE"), "signal"),
    "signal negative": (lambda vm: vm.signal_process(1, -9), "signal"),
    "signal large": (lambda vm: vm.signal_process(1, 65), "signal"),
    "signal private": (lambda vm: vm.signal_process(1, "_DFL"), "signal"),
    "kill after": (lambda vm: vm.stop_process(1, kill_after=-1), "kill_after"),
    "shell cols": (lambda vm: vm.open_shell(cols=0), "cols"),
    "shell rows": (lambda vm: vm.open_shell(rows=5000), "rows"),
    "shell rows text": (lambda vm: vm.open_shell(rows="24"), "rows"),  # type: ignore[arg-type]
    "shell command empty": (lambda vm: vm.open_shell(""), "command"),
    "shell args": (lambda vm: vm.open_shell("bash", "-c"), "args"),
    "shell env": (lambda vm: vm.open_shell(env={"A": 5}), "env['A']"),  # type: ignore[dict-item]
    "shell id number": (lambda vm: vm.wait_shell(5), "shell_id"),  # type: ignore[arg-type]
    "port": (lambda vm: vm.connect(0), "port"),
    "port large": (lambda vm: vm.connect(65536), "port"),
}


def test_every_wrong_argument_is_named(in_vm: Any) -> None:
    """Each wrong value is InvalidRequest, also a ValueError, naming the argument, what came and what was wanted."""

    async def body(vm: VM) -> None:
        await vm.exec("true")
        descriptors = open_descriptors()
        for name, (call, argument) in WRONG.items():
            with pytest.raises(ValueError) as caught:
                await call(vm)
            error = caught.value
            assert isinstance(error, InvalidRequest), f"{name}: {error!r}"
            assert error.code == "request.invalid", name
            assert error.details["argument"] == argument, f"{name}: {error.details}"
            assert error.details["wanted"], name
            assert argument in error.message, name
        assert open_descriptors() == descriptors
        assert await commands(vm) == []
        assert await vm.list_processes() == []
        assert await vm.list_shells() == []
        await still_works(vm)

    in_vm(body, alone=True)


def test_wrong_arguments_of_handles(in_vm: Any) -> None:
    """Handles of processes and shells check as the VM does."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("cat")
        shell = await vm.open_shell()
        wrong: list[tuple[Callable[[], Any], str]] = [
            (lambda: process.write_stdin(5), "data"),  # type: ignore[arg-type]
            (lambda: process.write_stdin(None), "data"),  # type: ignore[arg-type]
            (lambda: process.write_stdin([65]), "data"),  # type: ignore[arg-type]
            (lambda: process.write_stdin("\ud800"), "data"),
            (lambda: vm.write_process_stdin(process.pid, 5), "data"),  # type: ignore[arg-type]
            (lambda: process.wait(-1), "timeout"),
            (lambda: process.wait("x"), "timeout"),  # type: ignore[arg-type]
            (lambda: process.read_output(-1), "cursor"),
            (lambda: process.read_output("0"), "cursor"),  # type: ignore[arg-type]
            (lambda: process.read_output(0, max_bytes=0), "max_bytes"),
            (lambda: process.read_output(0, wait=-1), "wait"),
            (lambda: process.signal("NOPE"), "signal"),
            (lambda: process.stop(kill_after=-1), "kill_after"),
            (lambda: shell.write(5), "data"),  # type: ignore[arg-type]
            (lambda: shell.write("\ud800"), "data"),
            (lambda: vm.write_shell(shell.shell_id, None), "data"),  # type: ignore[arg-type]
            (lambda: shell.resize(0, 24), "cols"),
            (lambda: shell.resize(80, -1), "rows"),
            (lambda: shell.resize(80, 24.5), "rows"),  # type: ignore[arg-type]
            (lambda: shell.wait(-1), "timeout"),
            (lambda: shell.read(-1), "cursor"),
            (lambda: shell.read(0, max_bytes=-1), "max_bytes"),
        ]
        for number, (call, argument) in enumerate(wrong):
            with pytest.raises(InvalidRequest) as caught:
                await call()
            assert caught.value.details["argument"] == argument, number
        with pytest.raises(InvalidRequest):
            process.output(-1)
        assert process.log.end == 0
        assert process.running
        assert (shell.size.cols, shell.size.rows) == (80, 24)
        await process.close_stdin()
        assert await process.wait() == 0
        await still_works(vm)

    in_vm(body)


def test_unknown_pids_and_shells(in_vm: Any) -> None:
    """Each verb says `Process not found: PID` or `Shell not found: ID`, for pids of others too."""

    async def body(vm: VM) -> None:
        result = await vm.exec("sleep 1000 & echo $!; until grep -q sleep /proc/$!/comm; do :; done")
        foreign = int(result.stdout)
        for pid in (999_999, foreign, 1, 0, 2**40):
            for call in (
                vm.get_process, vm.wait_process, vm.kill_process, vm.stop_process, vm.close_process_stdin,
                vm.read_process_output, lambda pid: vm.signal_process(pid, 9),
                lambda pid: vm.write_process_stdin(pid, "x"),
            ):  # fmt: skip
                with pytest.raises(ProcessNotFound) as caught:
                    await call(pid)
                error = caught.value
                assert error.message == f"Process not found: {pid}"
                assert (error.code, error.details) == ("process.not_found", {"pid": pid})
        assert "sleep 1000" in await commands(vm)
        for shell_id in ("shell-1", "", "../x"):
            for action in (
                vm.wait_shell, vm.close_shell, vm.read_shell, lambda one: vm.write_shell(one, "x"),
                lambda one: vm.resize_shell(one, 80, 24),
            ):  # fmt: skip
                with pytest.raises(ShellNotFound) as missing:
                    await action(shell_id)
                assert (missing.value.code, missing.value.details) == (
                    "shell.not_found",
                    {"shellId": shell_id},
                )
        await still_works(vm)

    in_vm(body)


def test_programs_that_cannot_be_started(in_vm: Any) -> None:
    """SpawnFailed, also an OSError, with program, errno and step: missing, no program, a directory, not executable."""

    async def body(vm: VM) -> None:
        await vm.files.write_file("text", "no program")
        await vm.exec(
            "chmod +x text; touch plain; mkdir dir; printf '#!/no/interpreter\\n' > script; chmod +x script"
        )
        await vm.exec("mkdir /tmp/secret; chmod 700 /tmp/secret", user="root")
        descriptors = open_descriptors()
        cases: list[tuple[str, dict[str, Any], str, int]] = [
            ("/no/such/program", {}, "exec", 2),
            ("no-such-program", {}, "exec", 2),
            ("./plain", {}, "exec", 13),
            ("./dir", {}, "exec", 13),
            ("./text", {}, "exec", 8),
            ("./script", {}, "exec", 2),
            ("./text/below", {}, "exec", 20),
            ("./" + "x" * 5000, {}, "exec", 36),
            ("true", {"cwd": "/no/such"}, "chdir", 2),
            ("true", {"cwd": "no-such"}, "chdir", 2),
            ("true", {"cwd": "text"}, "chdir", 20),
            ("true", {"cwd": "/" + "x" * 5000}, "chdir", 36),
            ("true", {"env": {"PATH": "/nowhere"}}, "exec", 2),
        ]
        if not await one_id(vm):
            cases += [("true", {"cwd": path}, "chdir", 13) for path in ("/tmp/secret", "/root")]
        for command, options, step, number in cases:
            for call in (vm.spawn, vm.exec_file, vm.open_shell):
                with pytest.raises(OSError) as caught:
                    await call(command, **options)
                error = caught.value
                assert isinstance(error, SpawnFailed), repr(error)
                assert (error.code, error.details) == (
                    "process.spawn_failed",
                    {"command": command, "errno": number, "step": step},
                ), (command, options)
                named = options.get("cwd", command) if step == "chdir" else command
                assert named in error.message
        assert open_descriptors() == descriptors
        assert await vm.list_processes() == []
        assert await vm.list_shells() == []
        await still_works(vm)

    in_vm(body, alone=True)


def test_arguments_that_are_too_large(in_vm: Any) -> None:
    """1 MB in one argument or in many, or in the environment, is LimitExceeded naming the limit."""

    async def body(vm: VM) -> None:
        calls: list[tuple[Call, str]] = [
            (lambda vm: vm.exec("x" * 1_000_000), "MAX_ARG_STRLEN"),
            (lambda vm: vm.spawn("echo", ["x" * 1_000_000]), "MAX_ARG_STRLEN"),
            (lambda vm: vm.spawn("echo", ["x" * 100] * 10_000), "argument_bytes"),
            (lambda vm: vm.exec("true", env={"A": "x" * 1_000_000}), "MAX_ARG_STRLEN"),
            (lambda vm: vm.exec("true", env={f"A{n}": "x" * 100 for n in range(10_000)}), "argument_bytes"),
            (lambda vm: vm.open_shell("echo", ["é" * 70_000]), "MAX_ARG_STRLEN"),
            (lambda vm: vm.spawn("true", cwd="/" + "x" * 5_000_000), "MAX_ARG_STRLEN"),
        ]
        for number, (call, limit) in enumerate(calls):
            with pytest.raises(LimitExceeded) as caught:
                await call(vm)
            details = caught.value.details
            assert details["limit"] == limit, number
            assert details["value"] > details["maximum"]
        result = await vm.exec_file("sh", ["-c", "echo $#", "sh", *["x" * 100] * 4000])
        assert result.stdout == "4000\n"
        longest = "x" * (128 * 1024 - 1)
        assert (await vm.exec_file("printf", ["%s", longest])).stdout == longest
        await still_works(vm)

    in_vm(body)


def test_a_limit_of_output_above_the_vms(in_vm: Any) -> None:
    """max_output_bytes beyond the VM's output_bytes is LimitExceeded, and says how to raise it."""

    async def body(vm: VM) -> None:
        with pytest.raises(LimitExceeded) as caught:
            await vm.exec("true", max_output_bytes=2_000_000)
        assert caught.value.details == {"limit": "output_bytes", "value": 2_000_000, "maximum": 1_000_000}
        assert "Limits(output_bytes=...)" in caught.value.message

    in_vm(body, limits=Limits(output_bytes=1_000_000))


def test_a_vm_that_does_not_run(run: Any) -> None:
    """Every verb of a VM that was never started, or was closed, is VmStopped and says which; nothing hangs."""

    def verbs(vm: VM) -> list[Callable[[], Any]]:
        return [
            lambda: vm.exec("true"), lambda: vm.exec_file("true"), lambda: vm.spawn("true"), lambda: vm.open_shell(),
            lambda: vm.list_processes(), lambda: vm.all_processes(), lambda: vm.process_tree(),
            lambda: vm.list_shells(), lambda: vm.connect(80), lambda: vm.files.read_file("x"),
        ]  # fmt: skip

    async def main() -> None:
        vm = VM()
        for verb in verbs(vm):
            with pytest.raises(VmStopped) as caught:
                await verb()
            assert caught.value.details["reason"] == "new"
        await vm.start()
        process = await vm.spawn("cat")
        shell = await vm.open_shell()
        await vm.close()
        for number, verb in enumerate(verbs(vm)):
            with pytest.raises(VmStopped) as caught:
                await verb()
            assert (caught.value.code, caught.value.details) == ("vm.stopped", {"reason": "closed"}), number
        # What is known of processes stays known; stopping what has stopped is no error.
        assert (await vm.get_process(process.pid)).reason == "vmStopped"
        assert await process.wait() == await shell.wait() == 137
        for harmless in (process.kill, process.stop, shell.close, vm.close):
            await harmless()
        refused: list[Callable[[], Any]] = [
            lambda: process.write_stdin("x"),
            lambda: shell.write("x"),
            lambda: shell.resize(80, 24),
        ]
        for call in refused:
            with pytest.raises(AgentOSError):
                await call()

    run(main)


@as_root
def test_a_vm_that_fails_in_an_unforeseen_way_fails_alone() -> None:
    """What no check has caught is an error of the one VM: those of the same host run on, and others can be made."""
    limits = Limits()
    object.__setattr__(limits, "cpu_cores", math.inf)

    async def main() -> None:
        async with Host() as host, VM(host=host) as before:
            with pytest.raises(BootFailed):
                await VM(limits=limits, host=host).start()
            assert (await before.exec("echo alive")).stdout == "alive\n"
            async with VM(host=host) as after:
                assert (await after.exec("echo alive")).stdout == "alive\n"

    asyncio.run(main())


def test_wrong_specs() -> None:
    """What a VM is made from is checked when it is said, before anything is booted."""
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: VM(hostname=""), "hostname"),
        (lambda: VM(hostname="a b"), "hostname"),
        (lambda: VM(hostname="x" * 65), "hostname"),
        (lambda: VM(user="me"), "user"),
        (lambda: VM(network="bridge"), "network"),
        (lambda: VM(isolation="none"), "isolation"),
        (lambda: VM(env={"A": 1}), "env['A']"),  # type: ignore[dict-item]
        (lambda: VM(env="A=1"), "env"),  # type: ignore[arg-type]
        (lambda: VM(limits={"processes": 5}), "limits"),  # type: ignore[arg-type]
        (lambda: VM(mounts=["/tmp"]), "mounts[0]"),  # type: ignore[list-item]
        (lambda: VM(mounts=5), "mounts"),  # type: ignore[arg-type]
        (lambda: VM(files=["x"]), "files"),  # type: ignore[arg-type]
        (lambda: VM(files={"x": 5}), "files['x']"),  # type: ignore[dict-item]
        (lambda: VM(spec={}), "spec"),  # type: ignore[arg-type]
        (lambda: VM(spec=VmSpec(), env={"A": "1"}), "spec"),
        (lambda: VM(spec=VmSpec(), user="root"), "spec"),
        (lambda: VM(host="localhost"), "host"),  # type: ignore[arg-type]
        (lambda: Limits(memory_bytes=0), "limits.memory_bytes"),
        (lambda: Limits(processes=-5), "limits.processes"),
        (lambda: Limits(open_files=1.5), "limits.open_files"),  # type: ignore[arg-type]
        (lambda: Limits(disk_bytes=True), "limits.disk_bytes"),
        (lambda: Limits(cpu_cores=0), "limits.cpu_cores"),
        (lambda: Limits(cpu_cores=math.nan), "limits.cpu_cores"),
        (lambda: Limits(cpu_weight=10_001), "limits.cpu_weight"),
        (lambda: Limits(shells="3"), "limits.shells"),  # type: ignore[arg-type]
        (lambda: Mount("relative", "/x"), "mount.host_path"),
        (lambda: Mount("/tmp", "/proc/x"), "mount.guest_path"),
        (lambda: Mount("/tmp", "/a/../proc"), "mount.guest_path"),
        (lambda: Mount("/tmp", "/"), "mount.guest_path"),
    ]
    for number, (make, argument) in enumerate(wrong):
        with pytest.raises(InvalidRequest) as caught:
            make()
        assert caught.value.details["argument"] == argument, number


def test_paths_outside_lead_nowhere(in_vm: Any) -> None:
    """.., absolute links and /proc/1/root are the VM's own; a file of the host's is not reached through any."""
    secret = f"/tmp/agentos-test-{os.getpid()}"
    with open(secret, "w", encoding="utf-8") as file:
        file.write("of the host")

    async def body(vm: VM) -> None:
        await vm.exec(f"ln -s {secret} link; ln -s / root; ln -s ../../../../../../../tmp up")
        name = os.path.basename(secret)
        for path in (
            secret, f"../../../../../..{secret}", "link", f"root{secret}", f"up/{name}",
            f"/proc/1/root{secret}", f"/proc/self/root{secret}", f"/proc/self/cwd/../../..{secret}",
        ):  # fmt: skip
            with pytest.raises((FileMissing, FileDenied)):
                await vm.files.read_file(path)
            assert (await vm.exec_file("cat", [path])).exit_code == 1
        with pytest.raises(SpawnFailed):
            await vm.exec("true", cwd=f"../../../../../../..{secret}-dir")
        assert (await vm.exec("pwd", cwd="../../../../..")).stdout.strip("/\n") == ""
        assert (await vm.exec("ls /root; ls -d ../../../../../etc/agentos*")).exit_code != 0
        await still_works(vm)

    try:
        in_vm(body)
    finally:
        os.unlink(secret)
