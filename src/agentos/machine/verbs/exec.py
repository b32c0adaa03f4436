"""Commands that are run to their end: exec, exec_file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from agentos.errors import InvalidRequest, LimitExceeded, SpawnFailed
from agentos.machine.execution import ExecOptions, Execution
from agentos.machine.jobs import Program, check_program, program_of
from agentos.machine.plainwords import plain_words
from agentos.machine.verbs.parts import VmParts
from agentos.model import ExecResult, Limits, check_count, check_data, check_seconds, check_text


class ExecVerbs(VmParts):
    """What runs to its end before the call returns."""

    _shell: str

    async def exec(
        self,
        command: str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        cpu_timeout: float | None = None,
        max_output_bytes: int | None = None,
        encoding: str = "utf8",
        on_leader_exit: str = "drain",
    ) -> ExecResult:
        """Run `command` with bash (sh where an image has no bash) and return what it did, when it has exited.

        A background child that it leaves does not hold the result up: it is named in `orphans`, lives on
        (`on_leader_exit` "drain"), is waited for ("wait") or killed ("kill"). `timeout`, `idle_timeout` (no
        output) and `cpu_timeout` end the command with every descendant; the result has the output so far
        and the `reason`. Output beyond `max_output_bytes` of a stream is dropped, and said to be. stdin is
        empty unless given. A command that bash can not find has exit code 127.
        """
        check_text("command", command)
        shell = self._shell
        # A command may look like an option of the shell.
        options_end = ["--"] if command.startswith(("-", "+")) else []
        argv = [os.path.basename(shell), "-c", *options_end, command]
        program = program_of(self.spec, argv, shell, cwd=cwd, env=env, user=user)
        options = _options(
            self.spec.limits, stdin, timeout, idle_timeout, cpu_timeout, max_output_bytes, encoding, on_leader_exit
        )  # fmt: skip
        words = plain_words(command, program.env)
        if words is not None:
            try:
                return await self._execute(program.in_place_of_bash(words), options)
            except SpawnFailed as error:
                if error.details.get("step") != "exec":
                    raise
        return await self._execute(program, options)

    async def exec_file(
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        timeout: float | None = None,
        idle_timeout: float | None = None,
        cpu_timeout: float | None = None,
        max_output_bytes: int | None = None,
        encoding: str = "utf8",
        on_leader_exit: str = "drain",
    ) -> ExecResult:
        """As `exec`, but runs the program `command` with `args`, which no shell looks at.

        Raises SpawnFailed when there is no such program.
        """
        program = check_program(self.spec, command, args, cwd=cwd, env=env, user=user)
        options = _options(
            self.spec.limits, stdin, timeout, idle_timeout, cpu_timeout, max_output_bytes, encoding, on_leader_exit
        )  # fmt: skip
        return await self._execute(program, options)

    async def _execute(self, program: Program, options: ExecOptions) -> ExecResult:
        self._check_running()
        starts = self._starts
        kills = starts.disk_kills
        starts.begin()
        try:
            result = await starts.insist(
                lambda reserve: Execution(self.link, options, starts.oom_kills, reserve=reserve).run(
                    program, keep=self.keep_draining
                )
            )
        finally:
            starts.end()
        if result.signal == "SIGKILL" and result.reason == "signaled" and starts.disk_kills > kills:
            result = replace(result, reason="diskLimit", limit=starts.disk_limit)
        starts.note_end(result.reason, None, program)
        return result


def _options(
    limits: Limits,
    stdin: object,
    timeout: object,
    idle_timeout: object,
    cpu_timeout: object,
    max_output_bytes: object,
    encoding: object,
    on_leader_exit: object,
) -> ExecOptions:
    if encoding not in ("utf8", "bytes"):
        raise InvalidRequest.argument("encoding", encoding, "utf8 or bytes")
    if on_leader_exit not in ("drain", "wait", "kill"):
        raise InvalidRequest.argument("on_leader_exit", on_leader_exit, "drain, wait or kill")
    most = limits.output_bytes
    if max_output_bytes is not None:
        most = check_count("max_output_bytes", max_output_bytes)
        if most > limits.output_bytes:
            raise LimitExceeded.of("output_bytes", most, limits.output_bytes)
    return ExecOptions(
        stdin=None if stdin is None else check_data("stdin", stdin),
        timeout=check_seconds("timeout", timeout),
        idle_timeout=check_seconds("idle_timeout", idle_timeout),
        cpu_timeout=check_seconds("cpu_timeout", cpu_timeout),
        max_output_bytes=most,
        runaway_bytes=limits.runaway_bytes,
        encoding=encoding,
        on_leader_exit=on_leader_exit,
    )
