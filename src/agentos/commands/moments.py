"""Moments, as `docker logs --since` takes them."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Final

from agentos.errors import InvalidRequest

_UNITS: Final = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,
    "\u03bcs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_PART: Final = r"(\d+\.?\d*|\.\d+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)"
_WANTED: Final = (
    "a duration such as 10m or 1h30m, a time such as 2026-11-24T17:00:00Z, or seconds since the epoch"
)


def parse_moment(option: str, text: str) -> float:
    """Seconds since the epoch. A time without a zone is this machine's. Raises InvalidRequest naming the option."""
    if re.fullmatch(f"({_PART})+", text):
        return max(
            0.0, time.time() - sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, text))
        )
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text)
    try:
        return max(0.0, datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError):
        raise InvalidRequest.argument(option, text, _WANTED) from None
