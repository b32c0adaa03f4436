"""What a server inside a VM answers over HTTP/1.1, event by event: nothing of it is to be trusted."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

import h11

from agentos.network.waiting import receive_some

_EVENTS_AT_ONCE: Final = 16
"""Pieces of an answer that are taken before others have their turn: one may be a single byte."""


class Answer:
    """The events of `connection` as they come from `sock`, in reads of at most `chunk_bytes`. Closes neither."""

    def __init__(self, connection: h11.Connection, sock: socket.socket, chunk_bytes: int) -> None:
        self._connection = connection
        self._sock = sock
        self._chunk_bytes = chunk_bytes
        self._taken = 0

    async def event(self) -> object:
        """The next one. Raises h11.RemoteProtocolError for what is not HTTP, or no longer, and OSError."""
        self._taken += 1
        if self._taken % _EVENTS_AT_ONCE == 0:
            await asyncio.sleep(0)
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await receive_some(self._sock, self._chunk_bytes))
        if event is h11.PAUSED:
            # After an upgrade that the caller asked for, or a CONNECT: h11 says so again and again.
            raise h11.RemoteProtocolError("it switched to another protocol")
        return event
