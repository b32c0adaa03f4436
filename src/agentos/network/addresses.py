"""Which addresses there are no rules for: those that no VM may ever reach, and those that only an address names.

The tables are written out, and not taken from `ipaddress.is_global`, whose answers differ between Python versions.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Address = IPv4Address | IPv6Address
AnyNetwork = IPv4Network | IPv6Network

FORBIDDEN: Final = tuple(
    ip_network(one)
    for one in (
        "0.0.0.0/8",  # this host
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local; the metadata of most clouds
        "192.0.0.192/32",  # metadata (Oracle, older)
        "168.63.129.16/32",  # metadata (Azure): a public address
        "100.100.100.200/32",  # metadata (Alibaba)
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "::/96",  # unspecified, loopback, IPv4-compatible
        "::ffff:0:0/96",  # IPv4-mapped: taken as the IPv4 address before it is looked up here
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local, retired
        "ff00::/8",  # multicast
        "fd00:ec2::254/128",  # metadata (Amazon)
        "fd20:ce::254/128",  # metadata (Google)
        "fd00:42::42/128",  # metadata (Scaleway)
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "2001::/32",  # Teredo: the same
        "64:ff9b:1::/48",  # NAT64 of the local network
        "192.0.2.1/32", "fd6b:7a4c:9e21::/64",  # a VM's own
    )
)  # fmt: skip
"""Nobody can allow these."""

PRIVATE: Final = tuple(
    ip_network(one)
    for one in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24",
        "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "fc00::/7", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16", "100::/8", "200::/7",
    )
)  # fmt: skip
"""Not of the public internet: reached only where an allow-list names the address."""

_NAT64: Final = IPv6Network("64:ff9b::/96")
_PUBLIC_IPV6: Final = IPv6Network("2000::/3")


def parse(text: str) -> Address | None:
    """`text` as an address, None where it is none. Only the usual forms: no octal, hexadecimal or single number."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return None
        return address.ipv4_mapped or address
    return address


def meant(address: Address) -> Address:
    """Where packets to `address` end up: the IPv4 address that a NAT64 one holds, and otherwise itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(address.packed[12:])
    return address


def is_forbidden(address: Address) -> bool:
    """Whether no VM may reach it, whatever its rules say."""
    return any(meant(address) in one for one in FORBIDDEN)


def is_public(address: Address) -> bool:
    """Whether it is of the internet at large."""
    place = meant(address)
    if isinstance(place, IPv6Address) and place not in _PUBLIC_IPV6:
        return False
    return not any(place in one for one in (*FORBIDDEN, *PRIVATE))
