"""The name server of one VM: answers on sockets inside it, asks the host's servers, and shows what the rules allow."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

from agentos.network import dns
from agentos.network.addresses import Address, is_forbidden
from agentos.network.dns import Malformed, Query
from agentos.network.gate import Gate, Refused
from agentos.network.pace import Pace
from agentos.network.resolver import NoAnswer, Resolver
from agentos.network.waiting import receive, send_all

MOST_LOOKUPS: Final = 64
"""Questions of a VM that are not answered yet; further ones are answered with a failure."""
_PER_SECOND: Final = 500.0
_AT_ONCE: Final = 16
_IDLE_SECONDS: Final = 10.0


class NameService:
    """Serves on `udp` at once; TCP connections are handed to `serve_stream`."""

    def __init__(self, gate: Gate, resolver: Resolver, udp: socket.socket) -> None:
        self._gate = gate
        self._resolver = resolver
        self._udp = udp
        self._lookups: set[asyncio.Task[None]] = set()
        self._next_turn = 0.0
        self._pace = Pace(_PER_SECOND, self._udp, self._received)

    def close(self) -> None:
        """Stop."""
        self._pace.close()
        for task in self._lookups:
            task.cancel()

    def _received(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._pace.take():
                return
            try:
                data, sender = self._udp.recvfrom(4096)
            except OSError:  # BlockingIOError when that was all
                return
            traffic = self._gate.traffic
            if len(self._lookups) >= MOST_LOOKUPS or traffic.descriptors >= traffic.most_descriptors:
                self._send(dns.refusal(data, dns.SERVFAIL), sender)
                continue
            task = asyncio.get_running_loop().create_task(self._serve_datagram(data, sender))
            self._lookups.add(task)
            task.add_done_callback(self._lookups.discard)

    async def _serve_datagram(self, data: bytes, sender: Any) -> None:
        self._gate.traffic.descriptors += 1
        try:
            self._send(await self._answer(data, udp=True), sender)
        finally:
            self._gate.traffic.descriptors -= 1

    def _send(self, data: bytes, to: Any) -> None:
        if data:
            try:
                self._udp.sendto(data, to)
            except OSError:
                pass  # whoever asked has gone, or does not read: it asks again

    async def serve_stream(self, sock: socket.socket) -> None:
        """Answer the questions of one TCP connection, each after its length."""
        while True:
            await self._turn()
            async with asyncio.timeout(_IDLE_SECONDS):
                size = int.from_bytes(await receive(sock, 2), "big")
                data = await receive(sock, size)
                reply = await self._answer(data, udp=False)
                await send_all(sock, len(reply).to_bytes(2, "big") + reply)

    async def _turn(self) -> None:
        """Wait until one more question over TCP may be taken: all connections of the VM have one pace."""
        now = asyncio.get_running_loop().time()
        at = max(self._next_turn, now)
        self._next_turn = at + 1 / _PER_SECOND
        await asyncio.sleep(at - now)

    async def _answer(self, data: bytes, *, udp: bool) -> bytes:
        try:
            query = dns.parse_query(data)
        except Malformed:
            return dns.refusal(data, dns.FORMERR)
        most = query.most if udp else 65535
        self._gate.traffic.lookups += 1
        try:
            if not self._gate.network.may_resolve(query.name):
                raise Refused(query.name, "not-allowed")
            if query.kind in (dns.A, dns.AAAA):
                addresses, ttl = await self._lookup(query)
                return dns.answer(query, dns.NOERROR, addresses, ttl, most=most)
            reply = await self._resolver.ask(query)
            return dns.passed_on(query, reply, most=most)
        except Refused as refused:
            # Not REFUSED: programs would try again, where this name is simply not there for them.
            self._gate.note(refused)
            return dns.answer(query, dns.NXDOMAIN)
        except NoName:
            return dns.answer(query, dns.NXDOMAIN)
        except NoAnswer:
            return dns.answer(query, dns.SERVFAIL)

    async def _lookup(self, query: Query) -> tuple[list[Address], int]:
        reply = await self._resolver.ask(query)
        if reply.code == dns.NXDOMAIN:
            raise NoName(query.name)
        shown = self._gate.shown(query.name, reply.addresses)
        may_show = self._gate.network.may_show
        if query.kind == dns.A and reply.addresses and not any(may_show(one) for one in reply.addresses):
            private = [one for one in reply.addresses if not is_forbidden(one)]
            self._gate.note(
                Refused(f"{query.name} ({private[0]})", "private-address")
                if private
                else Refused(query.name, "forbidden-address")
            )
        return shown, reply.ttl

    async def addresses(self, name: str) -> list[Address]:
        """The addresses of `name` that the VM may know, IPv4 first. Raises Refused, NoName, NoAnswer."""
        if not self._gate.network.may_resolve(name):
            raise Refused(name, "not-allowed")
        queries = [self._lookup(Query(0, name, kind)) for kind in (dns.A, dns.AAAA)]
        found = await asyncio.gather(*queries, return_exceptions=True)
        known = [one[0] for one in found if not isinstance(one, BaseException)]
        if not known:
            assert isinstance(found[0], BaseException)
            raise found[0]
        return [address for addresses in known for address in addresses]


class NoName(Exception):
    """There is no such name."""
