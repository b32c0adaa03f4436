"""Logs as JSON lines: one object a line, with what the log call said in `extra`. In a terminal: as plain ones."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from agentos.printing import printable

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=repr)


class PlainFormatter(logging.Formatter):
    """A record as one line for a person."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [time.strftime("%H:%M:%S", time.localtime(record.created))]
        parts += [] if record.levelno == logging.INFO else [record.levelname.lower()]
        parts.append(record.getMessage())
        more = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        parts += [f"{name}={_short(value)}" for name, value in more.items() if value is not None]
        line = printable(" ".join(parts))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=repr)


def _is_ours(record: logging.LogRecord) -> bool:
    """Text that is not UTF-8 is a client's mistake, told to the client, and nothing for people to look at."""
    return not (record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError))


def log_to_stderr(level: str = "info") -> None:
    """Have agentos and the ASGI server write to stderr: JSON lines, or plain ones where that is a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter() if sys.stderr.isatty() else JsonFormatter())
    for name in ("agentos", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        if name == "uvicorn":
            # Filters of a logger do not see what its children log.
            logging.getLogger("uvicorn.error").addFilter(_is_ours)
        logger.propagate = False
        logger.setLevel(level.upper() if name == "agentos" else "WARNING")
