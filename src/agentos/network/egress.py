"""The host's end of one VM's network: takes its connections, checks each, and carries them out.

The sockets that it listens on were made inside the VM's network namespace and handed out; those that it
connects with are the host's. Everything is on the event loop of the VM, and ends with the VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from agentos.network.addresses import Address, parse
from agentos.network.gate import Gate, Refused, Traffic, Ways
from agentos.network.names import NameService
from agentos.network.pace import Pace
from agentos.network.proxy import serve_proxy
from agentos.network.relay import Relay, reset
from agentos.network.resolver import Resolver
from agentos.network.rules import Network
from agentos.network.waiting import connect

log = logging.getLogger("agentos.network")

CONNECT_SECONDS: Final = 15.0
"""For the other end to accept a connection, all of a name's addresses together."""
CONNECTIONS_PER_SECOND: Final = 500.0
"""That one VM can begin, refused ones included; further ones wait."""
_AT_ONCE: Final = 8
_DESCRIPTORS: Final = 2
"""Of a connection: the VM's end and the host's."""
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_KEEPALIVE_SECONDS: Final = 60
_HOST_NAME: Final = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\Z")


class Egress:
    """Serves one VM until `close`. `sockets` are those that the VM has handed out, by name, owned here as `ways` is."""

    def __init__(
        self,
        network: Network,
        sockets: Mapping[str, socket.socket],
        *,
        most: int,
        traffic: Traffic,
        labels: Mapping[str, Any],
        ways: Ways | None = None,
        on_full: Callable[[], None] = lambda: None,
        resolver: Resolver | None = None,
    ) -> None:
        self._sockets = dict(sockets)
        self._traffic = traffic
        self._most = most
        self.on_full = on_full
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}
        for sock in self._sockets.values():
            sock.setblocking(False)
        self.gate = Gate(network, traffic, labels, ways)
        self.names = NameService(self.gate, resolver or Resolver(), self._sockets["dns"])
        serve = {
            "dns-tcp": self.names.serve_stream, "proxy": self._serve_proxy,
            "tcp": self._serve_diverted, "tcp6": self._serve_diverted,
        }  # fmt: skip
        self._doors = [
            _Door(self, self._sockets[name], one) for name, one in serve.items() if name in self._sockets
        ]

    def close(self) -> None:
        """End every connection and let go of all sockets."""
        self.names.close()
        for door in self._doors:
            door.pace.close()
        for task in self._tasks:
            task.cancel()
        for sock in self._sockets.values():
            sock.close()
        self.gate.close()

    # -- connections of the VM

    def full(self) -> bool:
        """Whether it has as many connections as it may."""
        return len(self._tasks) >= self._most

    def host_is_full(self) -> bool:
        """Whether all VMs together hold as many of the host's descriptors as they may."""
        if self._traffic.descriptors < self._traffic.most_descriptors:
            return False
        self.gate.warn(
            "the connections of VMs hold half of the descriptors that this process may open (ulimit -n)"
        )
        return True

    def begin(self, sock: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Serve a connection that the VM has made, in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._one(sock, serve))
        self._tasks[task] = sock
        self._traffic.descriptors += _DESCRIPTORS
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        was_full = self.full()
        self._tasks.pop(task).close()  # a task that was cancelled before it began has not
        self._traffic.descriptors -= _DESCRIPTORS
        if was_full:
            for door in self._doors:
                door.pace.resume()

    async def _one(self, sock: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._traffic.open += 1
        try:
            await serve(sock)
        except Refused as refused:
            self.gate.note(refused)
            reset(sock)
        except (OSError, ValueError):  # whoever connected has gone, said nothing for too long, or nonsense
            reset(sock)
        except Exception:
            log.exception("a connection of a VM failed")
            reset(sock)
        finally:
            self._traffic.open -= 1
            sock.close()

    async def _serve_diverted(self, sock: socket.socket) -> None:
        """A connection to anywhere: the socket's own address is what the program in the VM connected to."""
        host, port = sock.getsockname()[:2]
        address = parse(host)
        if address is None:
            raise Refused(host, "forbidden-address")
        outer = await self.connect([address], port)
        await self.carry(sock, outer)

    async def _serve_proxy(self, sock: socket.socket) -> None:
        await serve_proxy(self, sock)

    # -- out

    async def connect_name(self, host: str, port: int) -> socket.socket:
        """Connect to a name or literal address. Raises Refused, NoName, NoAnswer or OSError."""
        address = parse(host)
        if address is not None:
            return await self.connect([address], port)
        name = host.lower().removesuffix(".")
        if not _HOST_NAME.match(name) or len(name) > 253 or name.rpartition(".")[2][0].isdigit():
            # Numbers that some programs take for addresses: 2130706433, 0x7f.1, 0177.0.0.1. And what in a DNS message
            # would be another name than here, such as one with two dots in a row.
            raise Refused(host[:300], "name")
        return await self.connect(await self.names.addresses(name), port, [name])

    async def connect(
        self, addresses: Sequence[Address], port: int, names: Sequence[str] = ()
    ) -> socket.socket:
        """A socket that is connected to the first of `addresses` which takes it. Raises Refused or OSError.

        What is checked is the very address that is connected to: a name that changes its mind changes nothing.
        """
        error: Exception = OSError(errno.EHOSTUNREACH, "the name has no address")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                for address in addresses:
                    try:
                        self.gate.check(address, port, names)
                        return await _connected(address, port)
                    except (Refused, OSError) as failed:
                        error = failed
        except TimeoutError as late:
            error = late
        if not isinstance(error, Refused):
            self._traffic.failed += 1
        raise error

    async def carry(self, inner: socket.socket, outer: socket.socket) -> None:
        """Carry bytes between the VM's socket and the host's until both ways have ended."""
        self._traffic.connections += 1
        relay = Relay(inner, outer)
        try:
            await relay.run()
        finally:
            self._traffic.sent_bytes += relay.sent
            self._traffic.received_bytes += relay.received


def proxy_env(host: str, port: int) -> dict[str, str]:
    """What programs look for to find the proxy; for where connections are not diverted."""
    url = f"http://{host}:{port}"
    names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    own = "localhost,127.0.0.1,::1"
    return {**dict.fromkeys(names, url), "no_proxy": own, "NO_PROXY": own, "NODE_USE_ENV_PROXY": "1"}


async def _connected(address: Address, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
        await connect(sock, str(address), port)
    except BaseException:
        sock.close()
        raise
    return sock


class _Door:
    """One listening socket: its connections are taken as fast as the VM may begin them, and while it may have more."""

    def __init__(
        self, egress: Egress, sock: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        self._egress = egress
        self._sock = sock
        self._serve = serve
        self.pace = Pace(CONNECTIONS_PER_SECOND, sock, self._take)

    def _take(self) -> None:
        for _ in range(_AT_ONCE):
            if self._egress.full():
                # Those that come now wait in the kernel, up to the listener's backlog.
                self._egress.on_full()
                self.pace.pause()
                return
            if self._egress.host_is_full():
                self.pace.rest()
                return
            if not self.pace.take():
                return
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    self._egress.gate.warn("no descriptor is left for the network connections of VMs")
                    self.pace.rest()
                return
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._egress.begin(sock, self._serve)
