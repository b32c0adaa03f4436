"""Why a connection did not come about, or broke, in a few words."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import ssl
from typing import Final

import aiohttp

_WORDS: Final = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "connection reset",
    errno.EPIPE: "connection reset",
    errno.ETIMEDOUT: "timed out",
    errno.EHOSTUNREACH: "no route to this host",
    errno.ENETUNREACH: "no route to this network",
}


def never_began(error: BaseException) -> bool:
    """Whether it is that no connection came about. One that was reset at once had been taken by somebody."""
    if getattr(getattr(error, "os_error", None), "errno", None) in (errno.ECONNRESET, errno.EPIPE):
        return False
    return isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)


def reason_of(error: BaseException) -> str:
    """What happened, without address or punctuation."""
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({cause.verify_message})"
    if isinstance(cause, ssl.SSLError):
        return "it does not speak TLS as this client does"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "there is no host of this name"
    if isinstance(error, asyncio.TimeoutError | aiohttp.ServerTimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "closed before an answer came"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "closed in the middle of an answer"
    number = getattr(cause, "errno", None)
    if not isinstance(number, int):
        # Where a name has several addresses, what happened to each is only in the text.
        found = re.search(r"\[Errno (\d+)\]", str(cause))
        number = int(found[1]) if found else None
    if number is not None:
        return _WORDS.get(number) or os.strerror(number).lower()
    return str(cause) or type(cause).__name__
