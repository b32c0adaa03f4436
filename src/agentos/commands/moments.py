"""Durations, and moments as `docker logs --since` takes them."""

from __future__ import annotations

import argparse
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
_LATEST: Final = 1e11
_PART: Final = r"(\d+\.?\d*|\.\d+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)"
_WANTED: Final = (
    "a duration such as 10m or 1h30m, a time such as 2026-11-24T17:00:00Z, or seconds since the epoch"
)


def seconds(text: str) -> float:
    """The seconds that an option means: a number, or a duration. An argument type for argparse."""
    try:
        found = _duration(text)
        found = float(text) if found is None else found
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise argparse.ArgumentTypeError(f"wanted seconds, or a duration such as 90s or 1h30m, got {text!r}")
    return found


def _duration(text: str) -> float | None:
    if not re.fullmatch(f"({_PART})+", text):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, text))


def parse_moment(option: str, text: str) -> float:
    """Seconds since the epoch. A time without a zone is this machine's. Raises InvalidRequest naming the option."""
    ago = _duration(text)
    if ago is not None:
        return max(0.0, time.time() - ago)
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text)
    try:
        return max(0.0, datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError):
        raise InvalidRequest.argument(option, text, _WANTED) from None


def settable(moment: float) -> float:
    """`moment`, or the nearest that a file's time can be set to: those in a VM are what a guest makes them."""
    return min(max(0.0, moment), _LATEST)
