"""Commands that are run to their end: exec, exec_file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentos.errors import InvalidRequest, LimitExceeded, SpawnFailed
from agentos.machine.execution import ExecOptions, Execution
from agentos.machine.jobs import Program, check_program, program_of
from agentos.machine.plainwords import TWINS, leaves_bash_alone, plain_words
from agentos.machine.verbs.parts import VmParts
from agentos.model import ExecResult, Limits, check_count, check_data, check_seconds, check_text

_USUAL = (None, None, None, None, None, "utf8", "drain")
"""The options that most calls have."""


class ExecVerbs(VmParts):
    """What runs to its end before the call returns."""

    _shell: str
    _usual: ExecOptions | None = None

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
        options = self._exec_options(
            stdin, timeout, idle_timeout, cpu_timeout, max_output_bytes, encoding, on_leader_exit
        )  # fmt: skip
        words = plain_words(command)
        if words is not None:
            path = TWINS.get(words[0])
            program = program_of(self.spec, words, path, cwd=cwd, env=env, user=user, as_bash=True)
            # What is always in the environment does.
            if (env is None and not self.spec.env) or leaves_bash_alone(program.env):
                try:
                    return await self._execute(program, options)
                except SpawnFailed as error:
                    if error.details.get("step") != "exec":
                        raise
        # A command may look like an option of the shell.
        options_end = ["--"] if command.startswith(("-", "+")) else []
        argv = [os.path.basename(self._shell), "-c", *options_end, command]
        program = program_of(self.spec, argv, self._shell, cwd=cwd, env=env, user=user)
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
        options = self._exec_options(
            stdin, timeout, idle_timeout, cpu_timeout, max_output_bytes, encoding, on_leader_exit
        )  # fmt: skip
        return await self._execute(program, options)

    def _exec_options(self, *given: Any) -> ExecOptions:
        if given != _USUAL:
            return _options(self.spec.limits, *given)
        if self._usual is None:
            self._usual = _options(self.spec.limits, *given)
        return self._usual

    async def _execute(self, program: Program, options: ExecOptions) -> ExecResult:
        link, starts = self._link, self._starts
        if link is None or link.ended.done():
            raise self.link.stopped_error()
        kills = starts.disk_kills
        execution = Execution(link, program, options, starts.oom_kills, self.keep_draining)
        starts.begin()
        try:
            result = await starts.insist(execution.run)
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
    wall = idle = cpu = None
    timed = timeout is not None or idle_timeout is not None or cpu_timeout is not None
    if timed:
        wall = check_seconds("timeout", timeout)
        idle = check_seconds("idle_timeout", idle_timeout)
        cpu = check_seconds("cpu_timeout", cpu_timeout)
    given = None if stdin is None else check_data("stdin", stdin)
    return ExecOptions(given, timed, wall, idle, cpu, most, limits.runaway_bytes, encoding, on_leader_exit)
