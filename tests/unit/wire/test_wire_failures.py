"""Errors on the wire, and above all those that must never be there."""

from __future__ import annotations

import pytest

from agentos.errors import (
    BY_CODE,
    ConnectionLost,
    InvalidRequest,
    LimitExceeded,
    ProcessNotFound,
    ShellNotFound,
    Unauthorized,
    UnknownError,
    file_error,
)
from agentos.wire import failures
from agentos.wire.messages import ActorSpecifier, Error, HttpResponseError

RETRIED = [
    *(
        f"actor.{code}"
        for code in [
            "not_found",
            "starting",
            "stopping",
            "destroying",
            "not_configured",
            "dropped_reply",
            "restarting",
            "stopped",
            "destroyed_while_waiting_for_ready",
            "destroyed_during_creation",
        ]
    ),
    *(
        f"guard.{code}"
        for code in [
            "actor_ready_timeout",
            "actor_runner_failed",
            "service_unavailable",
            "actor_wake_retries_exceeded",
            "actor_stopped_while_waiting",
            "tunnel_request_aborted",
            "tunnel_message_timeout",
            "tunnel_response_closed",
            "gateway_response_start_timeout",
        ]
    ),
    "ws.going_away",
]


@pytest.mark.parametrize("code", BY_CODE)
def test_no_error_of_ours_is_retried(code: str) -> None:
    """No client repeats an action because of an ordinary failure."""
    group, name, _, _ = failures.failure_of(BY_CODE[code]("Actor is stopping"))
    assert not failures.is_retried(group, name, "Actor is stopping")
    assert f"{group}.{name}" not in RETRIED
    if "." in code and not code.startswith("actor."):
        assert f"{group}.{name}" == code


@pytest.mark.parametrize("code", RETRIED)
def test_codes_that_are_retried_never_leave(code: str) -> None:
    """Should an error bear such a code nevertheless, it is sent under another."""
    assert failures.is_retried(*code.split("."))
    group, name, message, _ = failures.failure_of(UnknownError(code, "text"))
    assert (group, name, message) == ("agentos", code.replace(".", "_"), "text")
    assert not failures.reconnects(failures.close_for(UnknownError(code, "text")).reason)


@pytest.mark.parametrize("code", BY_CODE)
def test_round_trip(code: str) -> None:
    """Every error of ours arrives as what it was."""
    error = BY_CODE[code]("what happened", pid=3, path="/x")
    assert failures.error_of(failures.error_message(error, 1)) == error
    assert failures.error_of(failures.http_error(error)) == error


def test_messages() -> None:
    """Group and code are the parts of our code; what has no details has no metadata."""
    actor = ActorSpecifier("a")
    assert failures.error_message(ProcessNotFound.of(7), 5, actor) == Error(
        "process", "not_found", "Process not found: 7", {"pid": 7}, 5, actor
    )
    assert failures.http_error(Unauthorized("no")) == HttpResponseError("auth", "denied", "no")


def test_strangers_tell_nothing() -> None:
    """The text of an exception that is none of ours stays inside."""
    told = failures.http_error(RuntimeError("/secret/path"))
    assert told == HttpResponseError("internal", "error", "An internal error occurred")


def test_foreign_errors() -> None:
    """An unknown code stays readable, and metadata of any form is kept."""
    error = failures.error_of(Error("user", "my_code", "nope", [1]))
    assert (error.code, error.message, error.details) == ("user.my_code", "nope", {"metadata": [1]})


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("x"), 400),
        (Unauthorized("x"), 401),
        (ProcessNotFound("x"), 404),
        (file_error(2, "no such file", "/x"), 404),
        (LimitExceeded("x"), 429),
        (RuntimeError("x"), 500),
    ],
)
def test_status(error: BaseException, status: int) -> None:
    """The status goes with the kind of error."""
    assert failures.http_status(error) == status


def test_closes() -> None:
    """A reason is the code, and the ray's id after it; it never exceeds what a WebSocket allows."""
    assert failures.close_for(Unauthorized("x")) == failures.Close(1011, "auth.denied")
    assert failures.close_for(Unauthorized("x"), "r1").reason == "auth.denied#r1"
    assert len(failures.close_for(UnknownError("a." + "é" * 200, "x"), "r" * 50).reason.encode()) <= 123
    assert not failures.reconnects(failures.MALFORMED.reason)
    assert failures.reconnects(failures.GOING_AWAY.reason)


def test_errors_of_closes() -> None:
    """A structured reason becomes its error, anything else a lost connection."""
    assert isinstance(failures.error_of_close(1011, "auth.denied#ray"), Unauthorized)
    for reason in ("", "Disposed", ".", "a.", "ws.going_away"):
        assert isinstance(failures.error_of_close(1006, reason), ConnectionLost)
    assert not failures.reconnects("guard.actor_ready_timeout")
    assert failures.reconnects("actor.not_found#ray")


def test_what_a_client_sent_is_not_sent_back_at_length() -> None:
    """Neither in the message nor in its details."""
    _, _, message, details = failures.failure_of(ShellNotFound.of("x" * 10_000_000))
    assert message.startswith("Shell not found: xxx")
    assert len(message) < 2100
    assert details is not None
    assert len(details["shellId"]) < 2100
    assert "10000000 characters" in details["shellId"]
