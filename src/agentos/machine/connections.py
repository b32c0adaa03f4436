"""Connections to ports inside the VM, made by a servant in it (`connector.py`), which hands the sockets over.

The servant is forked for the first, and kept while it is needed: that takes longer than to connect.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import stat
from typing import Any

from agentos.errors import PortUnreachable
from agentos.machine.link import IDLE_SECONDS, Link
from agentos.machine.port import Port, whole

_CONNECT_SECONDS = 25.0
"""A connector that has not answered by then is stuck, for instance stopped by the guest."""
_TRIES = 2
"""A guest may kill the connector: whom that hits is served by the next."""
_Answer = tuple[int, list[int]]
_LOST: _Answer = (errno.ECONNABORTED, [])


class _Connector:
    """The host's end of one connector."""

    def __init__(self, link: Link, uid: int) -> None:
        self._link = link
        self._number, sock = link.fork_servant("connect", uid=uid)
        self._port = Port(link.loop, sock, self._received, self.close)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[_Answer]] = {}
        self._last = 0
        """The number of the newest request."""
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self._port.closed

    async def connect(self, port: int) -> _Answer:
        """An errno, or 0 and what was handed over."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        number = self._last = next(self._numbers)
        waiting: asyncio.Future[_Answer] = self._link.loop.create_future()
        self._waiting[number] = waiting
        try:
            self._port.send({"connect": port, "id": number})
            async with asyncio.timeout(_CONNECT_SECONDS):
                return await waiting
        except BaseException as error:
            if waiting.done() and not waiting.cancelled():  # it came at the last moment
                _close_all(waiting.result()[1])
            if not isinstance(error, TimeoutError):
                raise
            self._give_up()
            return errno.ETIMEDOUT, []
        finally:
            self._waiting.pop(number, None)
            if not self._waiting and self.alive:
                self._idle_timer = self._link.loop.call_later(IDLE_SECONDS, self.close)

    def _received(self, message: dict[str, Any], fds: list[int]) -> None:
        try:
            why = whole(message.get("errno"), 4095)
            if "failed" in message:  # to begin
                _close_all(fds)
                self._end((why or errno.EPROTO, []))
                return
            number = whole(message.get("id"), self._last, least=1)
            if len(fds) != (why == 0) or not all(map(_is_connection, fds)):
                raise ValueError("not a connection")
        except ValueError:
            # It is ours, so this is a defect or a guest that took it over: it gets no second word.
            _close_all(fds)
            self._give_up()
            return
        waiting = self._waiting.pop(number, None)
        if waiting is None or waiting.done():
            _close_all(fds)
        else:
            waiting.set_result((why, fds))

    def _give_up(self) -> None:
        self._link.send({"op": "end_servant", "number": self._number})
        self.close()

    def close(self) -> None:
        """Let it end. Who waits for it is told."""
        self._end(_LOST)

    def _end(self, answer: _Answer) -> None:
        self._port.close()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(answer)


class Connections:
    """The way to the ports of one VM."""

    def __init__(self, link: Link, uid: int) -> None:
        self._link = link
        self._uid = uid
        self._connector: _Connector | None = None

    async def open(self, port: int) -> socket.socket:
        """A non-blocking socket, connected to `port` on loopback. Raises PortUnreachable with the errno why not."""
        number = errno.ECONNABORTED
        for _ in range(_TRIES):
            if self._connector is None or not self._connector.alive:
                self._connector = _Connector(self._link, self._uid)
            number, fds = await self._connector.connect(port)
            if fds:
                connected = socket.socket(fileno=fds[0])
                connected.setblocking(False)
                return connected
            if number != errno.ECONNABORTED or self._connector.alive:
                break
        raise PortUnreachable(f"port {port}: {os.strerror(number)}", port=port, errno=number)

    def close(self) -> None:
        """The VM has ended."""
        if self._connector is not None:
            self._connector.close()


def _is_connection(fd: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    sock = socket.socket(fileno=os.dup(fd))
    with sock:
        return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
