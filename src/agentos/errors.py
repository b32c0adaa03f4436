"""The error tree: what went wrong, as a class to catch and a code that is the same on every surface.

    AgentOSError                                  .code .message .details
    ├─ InvalidRequest (ValueError)                request.invalid          an argument is wrong; nothing was changed
    │   └─ IsolationUnavailable                   vm.isolation_unavailable a tier that is not to be had here
    ├─ NotFound (LookupError)
    │   ├─ ProcessNotFound                        process.not_found
    │   ├─ ShellNotFound                          shell.not_found
    │   ├─ VmNotFound                             vm.not_found
    │   └─ ActionNotFound                         actor.action_not_found
    ├─ VmExists                                   actor.duplicate_key      a VM of this key, where a new one was wanted
    ├─ LimitExceeded                              limit.exceeded           a named limit: limit, value, maximum
    ├─ SpawnFailed (OSError)                      process.spawn_failed     the program could not be started
    ├─ StdinClosed (BrokenPipeError)              process.stdin_closed     nobody can read what was to be written
    ├─ WaitTimeout (TimeoutError)                 process.wait_timeout     waiting stopped; the process goes on
    ├─ CommandFailed                              process.command_failed   ExecResult.check() found a failure
    ├─ ShellClosed                                shell.closed
    ├─ FileError (OSError)                        file.failed
    │   ├─ FileMissing (FileNotFoundError)        file.not_found
    │   ├─ FileExists (FileExistsError)           file.exists
    │   ├─ FileDenied (PermissionError)           file.permission_denied
    │   ├─ IsDirectory (IsADirectoryError)        file.is_directory
    │   ├─ NotDirectory (NotADirectoryError)      file.not_directory
    │   ├─ NotRegularFile                         file.not_regular
    │   ├─ DirectoryNotEmpty                      file.not_empty
    │   └─ NoSpace                                file.no_space
    ├─ VmError
    │   ├─ PortUnreachable (ConnectionError)      vm.port_unreachable      nothing listens on a port in the VM
    │   ├─ FetchFailed                            vm.fetch_failed          what listens on a port did not answer in HTTP
    │   ├─ BootFailed                             vm.boot_failed           step, errno and what to change on the host
    │   └─ VmStopped                              vm.stopped               the VM was closed, or its init died
    ├─ Unauthorized (PermissionError)             auth.denied
    ├─ ConnectionLost (ConnectionError)           connection.lost          client only
    └─ InternalError                              internal.error           a defect of ours

A code's part before the dot is the wire's `group`, the rest its `code`.
"""

from __future__ import annotations

import errno as errno_names
import os
import reprlib
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar, Final


class _Short(reprlib.Repr):
    """As `repr`, of as much of a value as an error shows, however big it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 40
        self.maxstring = self.maxlong = self.maxother = 200

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0 and x:
            return "{...}"
        shown = [
            f"{self.repr1(key, level - 1)}: {self.repr1(one, level - 1)}"
            for key, one in islice(x.items(), self.maxdict)
        ]
        return "{" + ", ".join(shown + ["..."] * (len(x) > self.maxdict)) + "}"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: self.maxstring])

    def repr_set(self, x: set[Any], level: int) -> str:
        return repr(x) if len(x) <= self.maxlist else f"a set of {len(x)}"


_SHORT: Final = _Short()


class AgentOSError(Exception):
    """Base of all errors of agentos.

    `code` is stable and the same on every surface; `message` is for people; `details` holds
    JSON values only and always enough to rebuild the error on the other side of a wire. One that is an OSError
    has errno, strerror and filename too, where they are known.
    """

    code: ClassVar[str] = "internal.error"
    _errno: ClassVar[int] = 0
    """What an OSError's is where details have none."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details
        if isinstance(self, OSError):
            _tell_as_the_system(self, details.get("errno", self._errno), details.get("path"))

    def __str__(self) -> str:
        return self.message

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__reduce__() == self.__reduce__()

    def __hash__(self) -> int:
        return hash((type(self), self.message))

    def __reduce__(self) -> tuple[Any, ...]:
        return (error_from_code, (self.code, self.message, self.details))


def _tell_as_the_system(error: OSError, number: object, path: object) -> None:
    if isinstance(number, int) and number in errno_names.errorcode:
        error.errno, error.strerror = number, os.strerror(number)
    if isinstance(path, str):
        error.filename = path


class InternalError(AgentOSError):
    """Something failed that should not be able to fail: please report it."""


class InvalidRequest(AgentOSError, ValueError):
    """An argument is wrong: `details` has argument, got, wanted. Nothing was changed."""

    code = "request.invalid"

    @classmethod
    def argument(cls, name: str, got: object, wanted: str) -> InvalidRequest:
        """The error for argument `name`, which was `got` where `wanted` was wanted."""
        shown = _SHORT.repr(got)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return cls(f"{name}: wanted {wanted}, got {shown}", argument=name, got=shown, wanted=wanted)


class IsolationUnavailable(InvalidRequest):
    """This version or host cannot keep a VM apart in that way: `details` has isolation and available (a list)."""

    code = "vm.isolation_unavailable"

    @classmethod
    def of(cls, tier: str, why: str, available: list[str]) -> IsolationUnavailable:
        """The error for a tier that is known, and why it is not to be had."""
        message = f"isolation {tier!r} is not available: {why}; available: {', '.join(available)}"
        return cls(message, isolation=tier, available=available)


class NotFound(AgentOSError, LookupError):
    """Nothing of that name or number here."""

    code = "not_found"


class ProcessNotFound(NotFound):
    """No process with this pid was started through the API, or it has been forgotten since."""

    code = "process.not_found"

    @classmethod
    def of(cls, pid: int) -> ProcessNotFound:
        return cls(f"Process not found: {pid}", pid=pid)


class ShellNotFound(NotFound):
    """No shell with this id."""

    code = "shell.not_found"

    @classmethod
    def of(cls, shell_id: str) -> ShellNotFound:
        return cls(f"Shell not found: {shell_id}", shellId=shell_id)


class VmNotFound(NotFound):
    """No VM of this name and key."""

    code = "vm.not_found"

    @classmethod
    def of(cls, name: str, key: Sequence[str]) -> VmNotFound:
        shown = "/".join(key)
        return cls(f"there is no VM of the key {shown!r}", name=name, key=list(key))


class ActionNotFound(NotFound):
    """The VM has no such action."""

    code = "actor.action_not_found"


class VmExists(AgentOSError):
    """There is a VM of this name and key already: `details` has existing_actor_id and key."""

    code = "actor.duplicate_key"


class LimitExceeded(AgentOSError):
    """A named limit was reached: `details` has limit, value (wanted), maximum, and how to raise it."""

    code = "limit.exceeded"

    @classmethod
    def of(cls, limit: str, value: int, maximum: int, what: str = "") -> LimitExceeded:
        said = what or f"{value} is over the limit {limit}"
        return cls(
            f"{said} (maximum {maximum}; raise it with Limits({limit}=...))",
            limit=limit,
            value=value,
            maximum=maximum,
        )


class SpawnFailed(AgentOSError, OSError):
    """The program could not be started: `details` has command, errno and step (such as chdir or exec)."""

    code = "process.spawn_failed"

    @property
    def os_errno(self) -> int:
        """The errno of the step that failed (0 where the failure had none)."""
        return int(self.details.get("errno", 0))


class StdinClosed(AgentOSError, BrokenPipeError):
    """Nothing was or can be written: stdin was closed, or the process no longer reads it."""

    code = "process.stdin_closed"
    _errno = errno_names.EPIPE


class WaitTimeout(AgentOSError, TimeoutError):
    """The time limit of a wait passed. Only the waiting ended; the process goes on."""

    code = "process.wait_timeout"


class CommandFailed(AgentOSError):
    """A command ended in failure: `details` has the whole result, output included."""

    code = "process.command_failed"


class ShellClosed(AgentOSError):
    """The shell has ended or was closed: nothing can be written to it."""

    code = "shell.closed"


class FileError(AgentOSError, OSError):
    """A file action failed: `details` has path and errno."""

    code = "file.failed"


class FileMissing(FileError, FileNotFoundError):
    """No such file or directory in the VM."""

    code = "file.not_found"


class FileExists(FileError, FileExistsError):
    """The path exists already."""

    code = "file.exists"


class FileDenied(FileError, PermissionError):
    """The VM's user may not do that to this path."""

    code = "file.permission_denied"


class IsDirectory(FileError, IsADirectoryError):
    """The path is a directory where a file is wanted."""

    code = "file.is_directory"


class NotDirectory(FileError, NotADirectoryError):
    """A part of the path is not a directory."""

    code = "file.not_directory"


class NotRegularFile(FileError):
    """The path is a fifo, device or socket: its content is never read or written through the file actions."""

    code = "file.not_regular"


class DirectoryNotEmpty(FileError):
    """The directory has entries: delete it with recursive=True."""

    code = "file.not_empty"


class NoSpace(FileError):
    """The VM's disk is full (limits disk_bytes and disk_files)."""

    code = "file.no_space"


class VmError(AgentOSError):
    """Something about the VM as a whole."""

    code = "vm.failed"


class PortUnreachable(VmError, ConnectionError):
    """Nothing listens on a port of the VM's loopback, or it takes no connection: `details` has port and errno."""

    code = "vm.port_unreachable"


class FetchFailed(VmError):
    """The server in the VM did not answer as an HTTP server does: `details` has port."""

    code = "vm.fetch_failed"


class BootFailed(VmError):
    """The VM could not be made: `details` has step, errno and remedy (what to change on the host)."""

    code = "vm.boot_failed"


class VmStopped(VmError):
    """The VM is not running any more (closed, destroyed, or its init ended): `details` has reason."""

    code = "vm.stopped"


class Unauthorized(AgentOSError, PermissionError):
    """The request carries no valid token, or comes from a web page that may not make it."""

    code = "auth.denied"


class ConnectionLost(AgentOSError, ConnectionError):
    """The connection to the server broke before an answer came."""

    code = "connection.lost"


def _by_code() -> dict[str, type[AgentOSError]]:
    table: dict[str, type[AgentOSError]] = {}
    pending: list[type[AgentOSError]] = [InternalError]
    pending += [kind for kind in AgentOSError.__subclasses__() if kind is not InternalError]
    while pending:
        kind = pending.pop(0)
        table.setdefault(kind.code, kind)
        pending += kind.__subclasses__()
    return table


BY_CODE = _by_code()
"""Every code with its class."""


class UnknownError(AgentOSError):
    """An error whose code this version does not know: `code` holds it."""

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.code = code  # type: ignore[misc]  # an instance's own code is the point of this class


def error_from_code(code: str, message: str, details: dict[str, Any] | None = None) -> AgentOSError:
    """The error that `code`, `message` and `details` describe, as they come from a wire."""
    named = {str(key): value for key, value in (details or {}).items() if str(key) not in ("message", "code")}
    kind = BY_CODE.get(code)
    if kind is None:
        return UnknownError(code, message, **named)
    return kind(message, **named)


_FILE_ERRORS: dict[int, type[FileError]] = {
    errno_names.ENOENT: FileMissing,
    errno_names.EEXIST: FileExists,
    errno_names.EACCES: FileDenied,
    errno_names.EPERM: FileDenied,
    errno_names.EROFS: FileDenied,
    errno_names.EISDIR: IsDirectory,
    errno_names.ENOTDIR: NotDirectory,
    errno_names.ENOTEMPTY: DirectoryNotEmpty,
    errno_names.ENOSPC: NoSpace,
    errno_names.EDQUOT: NoSpace,
    errno_names.ENXIO: NotRegularFile,
    errno_names.ENODEV: NotRegularFile,
}


def file_error(number: int, text: str, path: str) -> FileError:
    """The FileError for errno `number` on `path`."""
    kind = _FILE_ERRORS.get(number, FileError)
    return kind(f"{text}: {path}", path=path, errno=number)
