"""Connections to ports inside the VM, made by a servant in it (`connector.py`), which hands the socket over."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from typing import Any

from agentos.errors import SpawnFailed
from agentos.machine.link import Link, Port

_CONNECT_SECONDS = 25.0
"""A connector that has not answered by then is stuck, for instance stopped by the guest."""


async def connect_inside(link: Link, uid: int, port: int) -> socket.socket:
    """Have a servant of the VM connect, and take the socket that it hands over."""
    answered: asyncio.Future[tuple[dict[str, Any], list[int]]] = link.loop.create_future()

    def received(message: dict[str, Any], fds: list[int]) -> None:
        if answered.done():
            for fd in fds:
                os.close(fd)
        else:
            answered.set_result((message, fds))

    def ended() -> None:
        if not answered.done():
            answered.set_result(({"errno": errno.ECONNABORTED}, []))

    port_to_servant = Port(link.loop, link.fork_servant("connect", uid=uid, port=port)[1], received, ended)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            message, fds = await answered
    except TimeoutError:
        message, fds = {"errno": errno.ETIMEDOUT}, []
    finally:
        port_to_servant.close()
    if len(fds) == 1 and stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
        connected = socket.socket(fileno=fds[0])
        if connected.family in (socket.AF_INET, socket.AF_INET6) and connected.type == socket.SOCK_STREAM:
            connected.setblocking(False)
            return connected
        fds = [connected.detach()]
    for fd in fds:
        os.close(fd)
    number = message.get("errno")
    if type(number) is not int or not 0 < number < 4096:
        number = errno.EPROTO
    raise SpawnFailed(f"port {port}: {os.strerror(number)}", errno=number, step="connect", port=port)
