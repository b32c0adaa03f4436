"""The sockets inside a VM behind which the host's network services are: made while it boots, handed out to the host.

A VM has no interface but loopback. Where the kernel has the rules for it (nf_tables, TPROXY), every TCP
connection to an address outside is accepted by one listening socket, which learns whither it was meant.
Where it has not, programs find the proxy by their environment. The VM's programs can change neither: the
network namespace's privileges end with the boot.
"""

from __future__ import annotations

import os
import socket

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
    """Name the sockets: `dns`, `dns-tcp`, `proxy`, and where connections can be diverted `tcp` and `tcp6`.

    `routes` are pairs of whether to accept and a network. Raises OSError.
    """
    made = {
        "dns": _bound(socket.AF_INET, socket.SOCK_DGRAM, SERVICE, DNS_PORT),
        "dns-tcp": _listener(SERVICE, DNS_PORT),
        "proxy": _listener(SERVICE, PROXY_PORT),
    }
    with (
        netlink.open_socket(netlink.NETLINK_ROUTE) as route,
        netlink.open_socket(netlink.NETLINK_NETFILTER) as nft,
    ):
        for name, service, own, address in (
            ("tcp", SERVICE, _OWN, ADDRESS), ("tcp6", "::1", _OWN6, ADDRESS6),
        ):  # fmt: skip
            try:
                made[name] = _divert(route, nft, service, own, address, routes)
            except OSError:
                # Nothing is half done for a family: without its routes, what the rules divert never comes.
                continue
    return made


def _divert(
    route: socket.socket, nft: socket.socket, service: str, own: list[tuple[str, str]], address: str,
    routes: list[list[object]],
) -> socket.socket:  # fmt: skip
    listener = _listener(service, DIVERT_PORT, transparent=True)
    try:
        netlink.transact(nft, netlink.divert_tcp((service, DIVERT_PORT), own))
        messages = [netlink.new_address(address, 128 if ":" in address else 32, LOOPBACK)]
        for accept, network in routes:
            if (":" in str(network)) == (":" in address):
                kind = netlink.RTN_LOCAL if accept else netlink.RTN_PROHIBIT
                messages.append(netlink.new_route(kind, str(network), LOOPBACK, address))
        netlink.transact(route, messages)
    except BaseException:
        listener.close()
        raise
    return listener


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
