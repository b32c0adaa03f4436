"""The events of a VM as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from agentos.conversions import read_value


@dataclass(frozen=True, slots=True)
class ProcessOutput:
    """processOutput: consecutive bytes of one stream; `offset` is the position of the first of them in it."""

    pid: int
    stream: str
    data: bytes
    offset: int = 0


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """processExit: after the last output of the process."""

    pid: int
    exit_code: int
    signal: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ShellData:
    """shellData: what the terminal shows next."""

    shell_id: str
    data: bytes
    offset: int = 0


@dataclass(frozen=True, slots=True)
class ShellExit:
    """shellExit: after the last data of the shell."""

    shell_id: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class VmBooted:
    """vmBooted: the VM runs."""


@dataclass(frozen=True, slots=True)
class VmShutdown:
    """vmShutdown: the VM is about to end."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class LimitReached:
    """limitReached: the VM came to a limit (a field of Limits) of `value`; `message` says how to raise it."""

    limit: str
    value: int
    message: str = ""
    pid: int | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class StreamError:
    """streamError: this connection fell behind, and `skipped` bytes of a stream were passed over."""

    scope: str
    id: Any = None
    code: str = ""
    skipped: int = 0
    message: str = ""


_KINDS: Final[dict[str, type]] = {
    kind.__name__[0].lower() + kind.__name__[1:]: kind
    for kind in (
        ProcessOutput,
        ProcessExit,
        ShellData,
        ShellExit,
        VmBooted,
        VmShutdown,
        LimitReached,
        StreamError,
    )
}


def read_event(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a handler is called with: the event as a value, or its arguments as they came where it is not known."""
    kind = _KINDS.get(name)
    if kind is None or len(args) > 1 or (args and not isinstance(args[0], dict)):
        return args
    return (read_value(kind, args[0] if args else {}),)
