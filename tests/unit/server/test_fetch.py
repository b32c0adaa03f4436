"""Answers of a VM's server that come without a pause leave the event loop to others, too."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator, MutableMapping
from typing import Any

import h11
import pytest

from agentos.server import fetch
from agentos.server.answers import Answer
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


def test_one_read_of_tiny_pieces_has_turns_for_others_in_it() -> None:
    """After every 16 of its events: a read may bring ten thousand, and waits for nothing in between."""
    head, chunks = CHUNKS
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())

    async def body() -> list[int]:
        turns, reads = 0, 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        class Counted(socket.socket):
            def recv(self, *args: Any) -> bytes:
                nonlocal reads
                reads += 1
                return super().recv(*args)

        ours, theirs = socket.socketpair()
        with theirs, Counted(fileno=ours.detach()) as sock:
            sock.setblocking(False)
            theirs.setblocking(False)
            theirs.sendall(head + chunks + b"0\r\n\r\n")
            answer = Answer(connection, sock, 1 << 20)
            counting = asyncio.create_task(count())
            seen: list[int] = []
            while type(await answer.event()) is not h11.EndOfMessage:
                seen.append(turns)
            counting.cancel()
        assert reads == 1
        return seen

    seen = asyncio.run(body())
    assert len(seen) == 10_001
    assert max(Counter(seen).values()) <= 16
