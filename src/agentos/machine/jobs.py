"""What a caller asks to run, checked and turned into a spawner's job."""

from __future__ import annotations

import errno
import signal as signals
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from agentos.errors import InvalidRequest, LimitExceeded, SpawnFailed
from agentos.machine.launcher import ExitEvent
from agentos.machine.plan import HOME, UIDS
from agentos.model import ExitStatus, Reason, Usage, VmSpec, check_env, check_text, check_texts

BASH = "/bin/bash"
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
"""What programs are looked for in, after the user's own: most of them are found in the first places."""
MAX_ARGUMENT_BYTES = 128 * 1024 - 1
"""The kernel's bound on a single argument or variable, MAX_ARG_STRLEN of execve(2)."""

_KEY_CHARS = 256


class Program(NamedTuple):
    """A checked request to run a program."""

    argv: list[str]
    cwd: str
    env: dict[str, str]
    user: str
    path: str | None = None
    """Where the program is, when that need not be looked up."""
    as_bash: bool = False
    """Whether it is started in bash's place, and so finds in its environment what bash would have added."""

    def asked(self) -> Hashable:
        """What two requests for the same have in common."""
        return tuple(self.argv), self.cwd, frozenset(self.env.items()), self.user

    def job(self, **stdio: Any) -> dict[str, Any]:
        """The spawner's job; `stdio` is its stdin or pty entry."""
        uid = UIDS[self.user]
        return {
            "argv": self.argv, "cwd": self.cwd, "env": self.env, "uid": uid, **stdio,
            "path": self.path, "as_bash": self.as_bash,
        }  # fmt: skip


def check_program(
    spec: VmSpec,
    command: object,
    args: object = (),
    *,
    cwd: object = None,
    env: object = None,
    user: object = None,
    terminal: bool = False,
) -> Program:
    """The program to run, or InvalidRequest or LimitExceeded naming what is wrong with the request."""
    _check_count(spec, args, 1)
    argv = [check_text("command", command, empty=False), *check_args(args)]
    return program_of(spec, argv, None, cwd=cwd, env=env, user=user, terminal=terminal)


def program_of(
    spec: VmSpec,
    argv: list[str],
    path: str | None,
    *,
    cwd: object,
    env: object,
    user: object,
    terminal: bool = False,
    as_bash: bool = False,
) -> Program:
    """As `check_program`, with arguments that were checked, and where the program is, if that is known."""
    who = spec.user if user is None else check_user(user, spec.user)
    directory = HOME if cwd is None else check_text("cwd", cwd, empty=False)
    if not directory.startswith("/"):
        directory = f"{HOME}/{directory}"
    if env is None and not spec.env and not terminal:
        # Always the same object, which is not sent to a spawner twice.
        environment, size = _BASE_ENV[who], _BASE_BYTES[who]
    else:
        _check_count(spec, env, 3)
        environment = base_env(spec.env, who, terminal=terminal)
        environment.update(check_env(env))
        size = _size(map("=".join, environment.items()))
    size += _size([*argv, directory])
    if size > spec.limits.argument_bytes:
        said = f"command, arguments and environment have {size} bytes"
        raise LimitExceeded.of("argument_bytes", size, spec.limits.argument_bytes, said)
    return Program(argv, directory, environment, who, path, as_bash)


def _check_count(spec: VmSpec, texts: object, least: int) -> None:
    """Refuse, before each is looked at, so many of at least `least` bytes that they are over the limit."""
    if isinstance(texts, Sequence | Mapping) and not isinstance(texts, str | bytes):
        size = len(texts) * least
        if size > spec.limits.argument_bytes:
            said = f"{len(texts)} arguments or variables have {size} bytes or more"
            raise LimitExceeded.of("argument_bytes", size, spec.limits.argument_bytes, said)


def check_args(args: object) -> list[str]:
    """`args` as a list of text."""
    if isinstance(args, str | bytes) or not isinstance(args, Sequence):
        raise InvalidRequest.argument("args", args, "a list of text")
    return check_texts("args", args)


def check_user(user: object, default: str) -> str:
    """`user` as one of the VM's users."""
    if user is None:
        return default
    if not isinstance(user, str) or user not in UIDS:
        raise InvalidRequest.argument("user", user, "agentos or root")
    return user


def base_env(extra: Mapping[str, str], user: str, *, terminal: bool) -> dict[str, str]:
    """What a program finds in its environment when nobody says more."""
    environment = dict(_BASE_ENV[user])
    if terminal:
        environment["TERM"] = "xterm-256color"
        environment["COLORTERM"] = "truecolor"
    environment.update(extra)
    return environment


def _user_env(user: str, home: str) -> dict[str, str]:
    return {
        "PATH": f"{home}/.local/bin:{PATH}",
        "HOME": home,
        "USER": user,
        "LOGNAME": user,
        "SHELL": BASH,
        # Of the locale only the encoding: the other categories would load a dozen files into every program.
        # As its files are named: another spelling is looked for in vain in each program first.
        "LC_CTYPE": "C.utf8",
    }


def _size(texts: Iterable[str]) -> int:
    """Bytes that arguments and variables take. LimitExceeded where one is longer than the kernel takes."""
    total = 0
    for text in texts:
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))
        total += size + 1
        if size > MAX_ARGUMENT_BYTES:
            raise LimitExceeded(
                f"one argument or variable has {size} bytes, and Linux takes at most {MAX_ARGUMENT_BYTES} "
                "(write long input to stdin or a file)",
                limit="MAX_ARG_STRLEN",
                value=size,
                maximum=MAX_ARGUMENT_BYTES,
            )
    return total


_BASE_ENV = {"agentos": _user_env("agentos", HOME), "root": _user_env("root", "/root")}
_BASE_BYTES = {user: _size(map("=".join, env.items())) for user, env in _BASE_ENV.items()}


def check_key(key: object) -> str | None:
    """`key` as an idempotency key; None where none is given."""
    if key is None:
        return None
    text = check_text("idempotency_key", key, empty=False)
    if len(text) > _KEY_CHARS:
        raise InvalidRequest.argument("idempotency_key", key, f"at most {_KEY_CHARS} characters")
    return text


def check_signal(signal: object) -> int:
    """`signal` ("SIGINT", "INT" or a number) as a number."""
    if isinstance(signal, str):
        name = signal if signal.startswith("SIG") else f"SIG{signal}"
        found = getattr(signals, name, None)
        if isinstance(found, signals.Signals):
            return int(found)
    elif isinstance(signal, int) and not isinstance(signal, bool) and 0 <= signal <= 64:
        return int(signal)
    raise InvalidRequest.argument("signal", signal, 'a signal such as "SIGINT", or a number from 0 to 64')


def signal_name(number: int) -> str:
    """The name of a signal, also of a real-time one."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def exit_status(event: ExitEvent, *, stopped: Reason | None, oom: bool) -> ExitStatus:
    """How the leader ended. `stopped` says that we ended it, and why; `oom` that the kernel did, for its memory."""
    usage = Usage(event.cpu_ms, event.max_rss_bytes)
    number = event.status & 0x7F
    code = 128 + number if number else event.status >> 8
    name = signal_name(number) if number else None
    reason: Reason = "signaled" if number else "exited"
    if oom and (number == signals.SIGKILL or code == 128 + signals.SIGKILL):
        reason = "oom"
    if stopped:
        reason = stopped
    return ExitStatus(code, name, reason, usage)


def lost_at_start() -> SpawnFailed:
    """The error of a program that a guest's kill of everything hit while it was started."""
    return SpawnFailed("it was killed while it was started", errno=errno.ECANCELED, step="start")


def spawn_failed(error: SpawnFailed, program: Program) -> SpawnFailed:
    """The spawner's short error, told in full."""
    step = error.details.get("step", "exec")
    subject = {"exec": program.argv[0], "chdir": program.cwd}.get(step, program.argv[0])
    what = "working directory" if step == "chdir" else "program"
    message = (
        f"{what} {subject!r} cannot be used: {error.message}"
        if step in ("exec", "chdir")
        else f"{step}: {error.message}"
    )
    if step == "exec" and len(program.argv) == 1 and " " in program.argv[0].strip():
        message += " (arguments are given apart from the program; only exec takes a line for a shell)"
    return SpawnFailed(message, command=program.argv[0], **error.details)
