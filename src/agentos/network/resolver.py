"""Asks the host's name servers, those of /etc/resolv.conf, without a thread: one UDP socket for each question.

The host's own /etc/hosts and other sources of names are not asked: they speak of the host's surroundings.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from pathlib import Path
from typing import Final

from agentos.network import dns
from agentos.network.addresses import parse
from agentos.network.dns import Malformed, Query, Reply
from agentos.network.waiting import connect, readable, receive, send_all

_RESOLV_CONF: Final = Path("/etc/resolv.conf")
_TRY_SECONDS: Final = 2.0
"""For one server to answer, before the next is asked."""
_TRIES: Final = 2
_MOST_SERVERS: Final = 3


class NoAnswer(Exception):
    """No name server answered."""


class Resolver:
    """The name servers of this host, as they were when resolv.conf last changed."""

    def __init__(self, path: Path = _RESOLV_CONF) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None
        self._servers: list[str] = []

    def servers(self) -> list[str]:
        """Their addresses, in the order in which they are asked."""
        try:
            stat = self._path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns)
            if seen != self._read_at:
                self._servers = _servers(self._path.read_text("utf-8", "replace"))
                self._read_at = seen
        except OSError:
            return ["127.0.0.1"]
        return self._servers

    async def ask(self, query: Query) -> Reply:
        """What the first server says that answers. Raises NoAnswer."""
        for _ in range(_TRIES):
            for server in self.servers():
                try:
                    async with asyncio.timeout(_TRY_SECONDS):
                        reply = await _over_udp(server, query)
                        if reply.truncated:
                            reply = await _over_tcp(server, query)
                except (OSError, Malformed):  # TimeoutError is one
                    continue
                if reply.code in (dns.NOERROR, dns.NXDOMAIN):
                    return reply
        raise NoAnswer(query.name)


def _servers(text: str) -> list[str]:
    """The `nameserver` lines of resolv.conf(5)."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver" and (parse(words[1]) or "%" in words[1]):
            found.append(words[1])
    return found[:_MOST_SERVERS] or ["127.0.0.1"]


def _socket(server: str, kind: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    return socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


async def _over_udp(server: str, query: Query) -> Reply:
    """Each question from a port of its own, under an id of its own, which a forger would have to guess."""
    number = secrets.randbelow(65536)
    with _socket(server, socket.SOCK_DGRAM) as sock:
        sock.connect((server, 53))
        sock.send(dns.ask(query, number))
        while True:
            await readable(sock)
            try:
                return dns.parse_reply(sock.recv(65535), query, number)
            except (Malformed, BlockingIOError):
                continue  # somebody else's, or forged: the right one may still come


async def _over_tcp(server: str, query: Query) -> Reply:
    number = secrets.randbelow(65536)
    message = dns.ask(query, number)
    with _socket(server, socket.SOCK_STREAM) as sock:
        await connect(sock, server, 53)
        await send_all(sock, len(message).to_bytes(2, "big") + message)
        size = int.from_bytes(await receive(sock, 2), "big")
        return dns.parse_reply(await receive(sock, size), query, number)
