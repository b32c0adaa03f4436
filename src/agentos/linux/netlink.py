"""netlink(7): addresses, routes and packet rules of a network namespace, asked for without any program's help.

Messages are put together here by hand, as the kernel's headers have them. A request that the kernel refuses
raises plain OSError with a note that says which.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Sequence

# linux/netlink.h
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
_NLMSG_ERROR = 2
_NLM_F_REQUEST, _NLM_F_ACK = 0x01, 0x04
_NLM_F_CREATE, _NLM_F_EXCL = 0x400, 0x200
_NLA_F_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_READ_BYTES = 32 * 1024

# linux/rtnetlink.h
_RTM_NEWADDR, _RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 20, 24, 25, 26
_RT_TABLE_MAIN = 254
_RTPROT_STATIC = 4
_RT_SCOPE_UNIVERSE, _RT_SCOPE_HOST = 0, 254
RTN_UNICAST, RTN_LOCAL, RTN_PROHIBIT = 1, 2, 8
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x02
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")

Message = tuple[int, int, bytes, str]
"""Type, flags, payload, and what it is for."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def open_socket(protocol: int) -> socket.socket:
    """A netlink socket in this process's network namespace."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)


def transact(sock: socket.socket, messages: Sequence[Message]) -> None:
    """Send all of `messages` at once and wait until the kernel has done each that asked for an answer."""
    data = b""
    waiting = {}
    for number, (kind, flags, payload, subject) in enumerate(messages, 1):
        data += _HEADER.pack(_HEADER.size + len(payload), kind, flags | _NLM_F_REQUEST, number, 0) + payload
        if flags & _NLM_F_ACK:
            waiting[number] = subject
    sock.send(data)
    while waiting:
        for kind, number, payload in _messages(sock.recv(_READ_BYTES)):
            if kind == _NLMSG_ERROR:
                _check(payload, waiting.pop(number, ""))


def _messages(data: bytes) -> Iterable[tuple[int, int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, _, number, _ = _HEADER.unpack_from(data)
        yield kind, number, data[_HEADER.size : length]
        data = data[max((length + 3) & ~3, _HEADER.size) :]


def _check(payload: bytes, subject: str) -> None:
    number = -struct.unpack_from("=i", payload)[0]
    if number:
        error = OSError(number, os.strerror(number))
        error.add_note(f"netlink({subject})")
        raise error


def _packed(address: str) -> tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


def new_address(address: str, prefix: int, index: int) -> Message:
    """Give an interface an address."""
    family, packed = _packed(address)
    head = _ADDRESS.pack(family, prefix, _IFA_F_NODAD, _RT_SCOPE_UNIVERSE, index)
    payload = head + attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
    return _RTM_NEWADDR, _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL, payload, f"address {address}"


def new_route(kind: int, network: str, index: int, source: str) -> Message:
    """Keep what goes to `network`, such as 10.0.0.0/8, in this namespace (RTN_LOCAL), or refuse it (RTN_PROHIBIT)."""
    payload = _route(kind, network, index, source)
    return _RTM_NEWROUTE, _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL, payload, f"route {network}"


def delete_route(kind: int, network: str, index: int, source: str) -> Message:
    """Take a route back that `new_route` made."""
    return _RTM_DELROUTE, _NLM_F_ACK, _route(kind, network, index, source), f"route {network}"


def _route(kind: int, network: str, index: int, source: str) -> bytes:
    address, _, prefix = network.partition("/")
    family, packed = _packed(address)
    scope = _RT_SCOPE_HOST if kind == RTN_LOCAL else _RT_SCOPE_UNIVERSE
    payload = _ROUTE.pack(family, int(prefix), 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, scope, kind, 0)
    payload += attribute(_RTA_DST, packed)
    if kind == RTN_LOCAL:
        payload += attribute(_RTA_OIF, struct.pack("=I", index))
        payload += attribute(_RTA_PREFSRC, _packed(source)[1])
    return payload


def route_type(sock: socket.socket, address: str) -> int:
    """What the kernel would do with a packet to `address`: RTN_UNICAST, RTN_LOCAL or another; 0: it has no way."""
    family, packed = _packed(address)
    payload = _ROUTE.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0) + attribute(_RTA_DST, packed)
    sock.send(_HEADER.pack(_HEADER.size + len(payload), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + payload)
    for kind, _, answer in _messages(sock.recv(_READ_BYTES)):
        if kind == _RTM_NEWROUTE:
            return int(_ROUTE.unpack_from(answer)[7])
        if kind == _NLMSG_ERROR:
            return 0
    raise OSError(errno.EPROTO, "no answer about a route", address)


# linux/netfilter/nf_tables.h, nfnetlink.h
_BATCH_BEGIN, _BATCH_END, _NFTABLES = 16, 17, 10
_NEWTABLE, _NEWCHAIN, _NEWRULE = 0, 3, 6
_PREROUTING, _MANGLE_PRIORITY = 0, -150
_META_L4PROTO = 16
_NETWORK_HEADER = 1
_EQUAL, _NOT_EQUAL = 0, 1
_DESTINATION = {socket.AF_INET: (16, 4), socket.AF_INET6: (24, 16)}
"""Offset and length of the destination's address in a packet."""


def _u32(value: int) -> bytes:
    return struct.pack(">i", value)


def _nft(message: int, family: int, payload: bytes, subject: str) -> Message:
    head = struct.pack(">BBH", family, 0, 0)
    return _NFTABLES << 8 | message, _NLM_F_ACK | _NLM_F_CREATE, head + payload, subject


def _expression(name: bytes, *attributes: bytes) -> bytes:
    return nested(1, attribute(1, name + b"\0"), nested(2, *attributes))


def _load_destination(family: int) -> bytes:
    offset, length = _DESTINATION[socket.AddressFamily(family)]
    where = (_u32(_NETWORK_HEADER), _u32(offset), _u32(length))
    return _expression(
        b"payload", attribute(1, _u32(1)), *(attribute(number, one) for number, one in enumerate(where, 2))
    )


def _mask(packed: bytes) -> bytes:
    return _expression(
        b"bitwise", attribute(1, _u32(1)), attribute(2, _u32(1)), attribute(3, _u32(len(packed))),
        nested(4, attribute(1, packed)), nested(5, attribute(1, bytes(len(packed)))),
    )  # fmt: skip


def _compare(operator: int, value: bytes) -> bytes:
    return _expression(
        b"cmp", attribute(1, _u32(1)), attribute(2, _u32(operator)), nested(3, attribute(1, value))
    )


def _set(register: int, value: bytes) -> bytes:
    return _expression(b"immediate", attribute(1, _u32(register)), nested(2, attribute(1, value)))


def divert_tcp(listener: tuple[str, int], own: Sequence[tuple[str, str]]) -> list[Message]:
    """Have the transparent `listener` accept every TCP connection to an address that is not one of `own`.

    `own` are pairs of mask and address. It sees as its own address the one that was connected to. To be sent in
    one `batch`, with that of the other family if there is one.
    """
    family, address = _packed(listener[0])
    table, chain = b"agentos\0", b"divert\0"
    rule = [
        _expression(b"meta", attribute(2, _u32(_META_L4PROTO)), attribute(1, _u32(1))),
        _compare(_EQUAL, bytes([socket.IPPROTO_TCP])),
    ]
    for mask, value in own:
        rule += [_load_destination(family), _mask(_packed(mask)[1]), _compare(_NOT_EQUAL, _packed(value)[1])]
    rule += [
        _set(1, address),
        _set(2, struct.pack(">H", listener[1])),
        _expression(b"tproxy", attribute(1, _u32(family)), attribute(2, _u32(1)), attribute(3, _u32(2))),
    ]
    hook = nested(4, attribute(1, _u32(_PREROUTING)), attribute(2, _u32(_MANGLE_PRIORITY)))
    chain_of_table = attribute(1, table) + attribute(3, chain) + hook + attribute(7, b"filter\0")
    return [
        _nft(_NEWTABLE, family, attribute(1, table), "table"),
        _nft(_NEWCHAIN, family, chain_of_table, "chain"),
        _nft(_NEWRULE, family, attribute(1, table) + attribute(2, chain) + nested(4, *rule), "rule"),
    ]


def batch(messages: Sequence[Message]) -> list[Message]:
    """`messages` to nf_tables as one change: all of it, or nothing."""
    head = struct.pack(">BBH", socket.AF_UNSPEC, 0, _NFTABLES)
    return [(_BATCH_BEGIN, 0, head, "begin"), *messages, (_BATCH_END, 0, head, "end")]
