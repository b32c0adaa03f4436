"""Connects to a TCP port inside the VM and hands the socket to the host: a socket stays in its network namespace."""

from __future__ import annotations

import errno
import socket

from agentos.machine.channel import BlockingChannel

_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_CONNECT_SECONDS = 10.0


def serve(channel: BlockingChannel, port: int) -> None:
    """Answer with a socket that is connected to `port` on loopback, or with the errno why not."""
    number = errno.ECONNREFUSED
    for family, address in _ADDRESSES:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.settimeout(_CONNECT_SECONDS)
                sock.connect((address, port))
                sock.settimeout(None)
            except OSError as error:
                number = error.errno or errno.ETIMEDOUT
                continue
            channel.send({"connected": port}, [sock.fileno()])
            return
    channel.send({"failed": "connect", "errno": number, "step": "connect"})
