"""Logs for programs and for people."""

from __future__ import annotations

import json
import logging

from agentos.server.logs import JsonFormatter, PlainFormatter


def record(level: int, message: str, **extra: object) -> logging.LogRecord:
    """As a logger makes it."""
    return logging.getLogger("agentos.server").makeRecord(
        "agentos.server", level, __file__, 1, message, (), None, extra=extra
    )


def test_a_line_for_a_person() -> None:
    """The time, what is worse than usual, and what belongs to it; nothing that a terminal would obey."""
    said = PlainFormatter().format(record(logging.INFO, "vm booted", key=["a", "b"], ms=1.5, reason=None))
    assert said[8:] == ' vm booted key=["a", "b"] ms=1.5'
    said = PlainFormatter().format(record(logging.ERROR, "no\x1b[2J", name_of="x"))
    assert said[8:] == " error no\\x1b[2J name_of=x"


def test_a_line_for_a_program() -> None:
    """One JSON object."""
    said = json.loads(JsonFormatter().format(record(logging.INFO, "vm booted", key=["a"])))
    assert (said["message"], said["level"], said["key"]) == ("vm booted", "info", ["a"])
