"""Errors on the wire: `{group, code, message, metadata}`, statuses, and the reasons of a close.

A code's part before the dot is the group. Some codes make given clients repeat a request, up to sixty
times; those never stand for an ordinary failure, or an action that did something and then failed would do
it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from agentos.errors import (
    AgentOSError,
    ConnectionLost,
    FileMissing,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Unauthorized,
    error_from_code,
)
from agentos.wire.messages import ActorSpecifier, Error, HttpResponseError

_OWN_GROUP: Final = "agentos"
"""The group of codes that have no dot."""

_LONGEST_TEXT: Final = 2000
"""Characters of a message, or of a text in its details."""

_RETRIED: Final[dict[str, frozenset[str]]] = {
    "actor": frozenset(
        (
            "not_found",
            "starting",
            "stopping",
            "stopped",
            "destroying",
            "not_configured",
            "dropped_reply",
            "restarting",
        )
    ),
    "guard": frozenset(
        (
            "actor_ready_timeout",
            "actor_runner_failed",
            "service_unavailable",
            "actor_wake_retries_exceeded",
            "actor_stopped_while_waiting",
            "tunnel_request_aborted",
            "tunnel_message_timeout",
            "tunnel_response_closed",
            "gateway_response_start_timeout",
        )
    ),
    "ws": frozenset(("going_away",)),
}


def is_retried(group: str, code: str, message: str = "") -> bool:
    """Whether given clients repeat a request, or connect again, on an error like this."""
    if group == "actor" and (code.startswith("destroyed_") or message == "Actor is stopping"):
        return True
    return code in _RETRIED.get(group, ())


def failure_of(error: BaseException) -> tuple[str, str, str, dict[str, Any] | None]:
    """Group, code, message and metadata for `error`, never a code that is retried.

    Of an exception that is none of ours nothing is told: its message may hold what is not for a client.
    """
    if not isinstance(error, AgentOSError):
        error = InternalError("An internal error occurred")
    group, dot, code = error.code.partition(".")
    if not dot:
        group, code = _OWN_GROUP, group
    if is_retried(group, code, error.message):
        group, code = _OWN_GROUP, f"{group}_{code}"
    details = {name: _cut(one) for name, one in error.details.items()}
    return group, code, _cut(error.message), details or None


def _cut(value: Any) -> Any:
    """Text that quotes what a client sent is as long as what it sent: that much is not sent back."""
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"{value[: _LONGEST_TEXT - 40]}... ({len(value)} characters)"
    return value


def error_message(error: BaseException, action_id: int | None, actor: ActorSpecifier | None = None) -> Error:
    """The message that tells a connection of `error`; without `action_id` all its actions fail."""
    group, code, message, metadata = failure_of(error)
    return Error(group, code, message, metadata, action_id, actor)


def http_error(error: BaseException, actor: ActorSpecifier | None = None) -> HttpResponseError:
    """The body that answers a request with `error`."""
    return HttpResponseError(*failure_of(error), actor)


def http_status(error: BaseException) -> int:
    """The status that goes with `http_error`. Clients look at the body only."""
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return 500


_STATUSES: Final[tuple[tuple[type[AgentOSError], int], ...]] = (
    (InvalidRequest, 400),
    (Unauthorized, 401),
    (NotFound, 404),
    (FileMissing, 404),
    (LimitExceeded, 429),
)


def error_of(failure: Error | HttpResponseError) -> AgentOSError:
    """The error that a message from the wire tells of."""
    return _error(failure.group, failure.code, failure.message, failure.metadata)


def _error(group: str, code: str, message: str, metadata: Any) -> AgentOSError:
    details = metadata if isinstance(metadata, dict) else None if metadata is None else {"metadata": metadata}
    return error_from_code(code if group == _OWN_GROUP else f"{group}.{code}", message, details)


@dataclass(frozen=True, slots=True)
class Close:
    """How a WebSocket is closed. A client reads the reason, never the number."""

    code: int
    reason: str


MALFORMED: Final = Close(1011, "actor.invalid_request")
"""After a frame that no answer can be given to."""
TOO_MUCH: Final = Close(1011, "limit.exceeded")
"""Too much has come of messages that are not whole yet, from this and other clients."""
GOING_AWAY: Final = Close(1012, "ws.going_away")
"""The server restarts: clients keep trying until it is there again, calls in flight fail."""
COME_BACK: Final = HttpResponseError("actor", "stopping", "the server is about to end: nothing was done")
"""What a request is answered with meanwhile: the one error on which clients repeat it, for some seconds."""
DESTROYED: Final = Close(1000, "")
"""The actor is gone. A client connects again; refuse it then with the reason of an error."""

_LONGEST_REASON: Final = 123


def close_for(error: BaseException, ray_id: str = "") -> Close:
    """The close that refuses a connection for `error`, for good.

    A handshake has to be accepted first: a client that is refused with a status may wait forever.
    """
    group, code, _, _ = failure_of(error)
    reason = f"{group}.{code}".encode("ascii", "replace")[:_LONGEST_REASON].decode()
    with_ray = f"{reason}#{ray_id}"
    return Close(1011, with_ray if ray_id and len(with_ray) <= _LONGEST_REASON else reason)


def error_of_close(code: int, reason: str) -> AgentOSError:
    """Why a connection ended: the error that the reason names, ConnectionLost where it names none."""
    group, _, name = reason.partition("#")[0].partition(".")
    said = f"Connection closed: {reason}" if reason else f"Connection closed (code {code})"
    if not group or not name or (group, name) == ("ws", "going_away"):
        return ConnectionLost(said, closeCode=code, reason=reason)
    return _error(group, name, said, None)


def reconnects(reason: str) -> bool:
    """Whether a client whose connection was refused with `reason` before it was open should try again."""
    group, _, name = reason.partition("#")[0].partition(".")
    return is_retried(group, name) and (group, name) != ("guard", "actor_ready_timeout")
