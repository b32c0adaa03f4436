"""Waiting for a socket on the event loop, so that whoever stops waiting leaves nothing registered."""

from __future__ import annotations

import asyncio
import os
import socket


async def readable(sock: socket.socket) -> None:
    """Return when there is something to read, an end or an error included."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock.fileno(), _done, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())


async def writable(sock: socket.socket) -> None:
    """Return when it takes more."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock.fileno(), _done, ready)
    try:
        await ready
    finally:
        loop.remove_writer(sock.fileno())


def _done(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def receive_some(sock: socket.socket, most: int) -> bytes:
    """What has come, at most `most` bytes; nothing at the end.

    Others have their turn first, even if there is something at once: whoever sends without a pause would have the
    event loop for itself, and no deadline would ever come.
    """
    await asyncio.sleep(0)
    while True:
        try:
            return sock.recv(most)
        except (BlockingIOError, InterruptedError):
            await readable(sock)


async def receive(sock: socket.socket, count: int) -> bytes:
    """Just `count` bytes. Raises ConnectionError where it ends before."""
    data = bytearray()
    while len(data) < count:
        more = await receive_some(sock, count - len(data))
        if not more:
            raise ConnectionResetError("it ended too early")
        data += more
    return bytes(data)


async def connect(sock: socket.socket, address: str, port: int) -> None:
    """Connect a non-blocking socket to a literal address. Raises OSError as connect(2) does."""
    try:
        sock.connect((address, port))
    except BlockingIOError:
        await writable(sock)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number)) from None


async def send_all(sock: socket.socket, data: bytes) -> None:
    """Send all of it."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except (BlockingIOError, InterruptedError):
            await writable(sock)
