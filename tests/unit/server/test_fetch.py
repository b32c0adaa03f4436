"""Answers of a VM's server that come without a pause leave the event loop to others, too."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, MutableMapping
from typing import Any

import h11
import pytest

from agentos.server import fetch
from agentos.server.http import Request
from agentos.server.preview_exchange import Exchange
from agentos.server.preview_headers import View

CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10_000
EARLY = b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3000
SECONDS = 0.3


@contextlib.contextmanager
def endless(first: bytes, more: bytes) -> Iterator[socket.socket]:
    """A socket at whose other end a thread says `first`, then `more` again and again."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def say() -> None:
        with contextlib.suppress(OSError):
            theirs.sendall(first)
            while True:
                theirs.sendall(more)

    thread = threading.Thread(target=say)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join()
        theirs.close()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("first", "more"), [CHUNKS, EARLY], ids=["chunks", "early hints"])
def test_a_fetch_can_be_given_up(first: bytes, more: bytes) -> None:
    """Its deadline comes, though there is always something to read."""
    request = h11.Request(method="GET", target="/", headers=[("host", "x")])

    async def body() -> None:
        with endless(first, more) as sock:
            async with asyncio.timeout(SECONDS):
                await fetch._exchange(sock, request, b"", 1 << 30)

    with pytest.raises(TimeoutError):
        asyncio.run(body())


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("first", "more"), [CHUNKS, EARLY], ids=["chunks", "early hints"])
def test_a_preview_can_be_given_up(first: bytes, more: bytes) -> None:
    """So does that of a preview, whose client takes all at once."""

    async def receive() -> dict[str, Any]:
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        pass

    async def body() -> None:
        request = Request({"type": "http", "path": "/", "headers": []})
        with endless(first, more) as sock:
            async with asyncio.timeout(SECONDS):
                await Exchange(View(80, b"/preview/x", b"/", "http"), request, receive, send).run(sock)

    asked: list[bool] = []
    with pytest.raises(TimeoutError):
        asyncio.run(body())
