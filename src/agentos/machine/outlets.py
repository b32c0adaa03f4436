"""The sockets inside a VM behind which the host's network services are: made while it boots, handed out to the host.

A VM has no interface but loopback. Where the kernel has the rules for it (nf_tables, TPROXY), every TCP
connection to an address outside is accepted by one listening socket, which learns whither it was meant.
Where it has not, programs find the proxy by their environment. The VM's programs can change neither: the
network namespace's privileges end with the boot.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from agentos.linux import netlink

LOOPBACK = 1
"""The index of lo, the first interface of every network namespace."""
SERVICE = "127.0.0.53"
"""Where the services listen: an address that no program of the VM chooses for its own, unless it takes all."""
DNS_PORT, PROXY_PORT, DIVERT_PORT = 53, 3128, 1
ADDRESS, ADDRESS6 = "192.0.2.1", "fd6b:7a4c:9e21::1"
"""What programs see as their own address. That of IPv6 is a private one, so that IPv4 is tried first where both go."""
_BACKLOG = 128
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75  # linux/in.h, in6.h
_HOST_MASK, _HOST_MASK6 = "255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
_OWN = [("255.0.0.0", "127.0.0.0"), (_HOST_MASK, ADDRESS)]
_OWN6 = [(_HOST_MASK6, "::1"), (_HOST_MASK6, ADDRESS6)]


def open_outlets(routes: list[list[object]]) -> dict[str, socket.socket]:
    """Name the sockets: `dns`, `dns-tcp`, `proxy`; where connections can be diverted also `tcp`, `tcp6`, `routes`.

    `routes` are pairs of whether to accept and a network. Raises OSError.
    """
    made = {
        "dns": _bound(socket.AF_INET, socket.SOCK_DGRAM, SERVICE, DNS_PORT),
        "dns-tcp": _listener(SERVICE, DNS_PORT),
        "proxy": _listener(SERVICE, PROXY_PORT),
    }
    families = [("tcp", SERVICE, _OWN, ADDRESS), ("tcp6", "::1", _OWN6, ADDRESS6)]
    while families:
        try:
            return made | _divert(families, routes)
        except OSError:
            families.pop()  # a kernel without IPv6, or at last without the rules
    return made


def _divert(
    families: list[tuple[str, str, list[tuple[str, str]], str]], routes: list[list[object]]
) -> dict[str, socket.socket]:
    """All of it or nothing: the routes come last, and without them nothing comes to what was made before."""
    made: dict[str, socket.socket] = {}
    rules: list[netlink.Message] = []
    ways: list[netlink.Message] = []
    made["routes"] = netlink.open_socket(netlink.NETLINK_ROUTE)
    try:
        for name, service, own, address in families:
            made[name] = _listener(service, DIVERT_PORT, transparent=True)
            rules += netlink.divert_tcp((service, DIVERT_PORT), own)
            ways.append(netlink.new_address(address, 128 if ":" in address else 32, LOOPBACK))
            for accept, network in routes:
                if (":" in str(network)) == (":" in address):
                    kind = netlink.RTN_LOCAL if accept else netlink.RTN_PROHIBIT
                    ways.append(netlink.new_route(kind, str(network), LOOPBACK, address))
        with netlink.open_socket(netlink.NETLINK_NETFILTER) as nft:
            netlink.transact(nft, netlink.batch(rules))
        netlink.transact(made["routes"], ways)
    except BaseException:
        for sock in made.values():
            sock.close()
        raise
    return made


class Ways:
    """The host's hand on a VM's routing table: single addresses that its programs may try to connect to."""

    def __init__(self, routes: socket.socket) -> None:
        self._routes = routes

    def open(self, address: str) -> None:
        """Let connections to it come as far as the host. Raises OSError."""
        self._change(netlink.new_route, address)

    def shut(self, address: str) -> None:
        """Have the kernel refuse them again. Raises OSError."""
        self._change(netlink.delete_route, address)

    def _change(self, change: Callable[[int, str, int, str], netlink.Message], address: str) -> None:
        network, source = (f"{address}/128", ADDRESS6) if ":" in address else (f"{address}/32", ADDRESS)
        netlink.transact(self._routes, [change(netlink.RTN_LOCAL, network, LOOPBACK, source)])

    def close(self) -> None:
        """Let go of it."""
        self._routes.close()


def _listener(address: str, port: int, *, transparent: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = _bound(family, socket.SOCK_STREAM, address, port, transparent=transparent)
    sock.listen(_BACKLOG)
    return sock


def _bound(family: int, kind: int, address: str, port: int, *, transparent: bool = False) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if transparent and family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        elif transparent:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        error.add_note(f"bind({address}:{port}): {os.strerror(error.errno or 0)}")
        raise
    return sock
