"""DNS messages (RFC 1035), as much of them as a forwarder needs. Everything that comes in is a stranger's data."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from agentos.network.addresses import Address

A: Final = 1
AAAA: Final = 28
_OPT: Final = 41
_IN: Final = 1
NOERROR: Final = 0
FORMERR: Final = 1
SERVFAIL: Final = 2
NXDOMAIN: Final = 3
_RESPONSE, _TRUNCATED, _WANTED, _AVAILABLE = 0x8000, 0x0200, 0x0100, 0x0080
PLAIN_BYTES: Final = 512
"""What a UDP answer may have where the question does not say more."""
UDP_BYTES: Final = 1232
MAX_TTL: Final = 3600
_HEADER: Final = struct.Struct(">HHHHHH")
_RECORD: Final = struct.Struct(">HHIH")
_LONGEST_NAME: Final = 255
_LONGEST_LABEL: Final = 63


class Malformed(ValueError):
    """It is no DNS message, or none of those that are understood here."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question, of class IN."""

    id: int
    name: str
    """In lower case, without a dot at its end; empty for the root."""
    kind: int
    most: int = PLAIN_BYTES
    """Bytes that whoever asks can take over UDP."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server said: `addresses` with the seconds that they hold, of the question's own type."""

    code: int
    addresses: tuple[Address, ...] = ()
    ttl: int = 0
    truncated: bool = False
    message: bytes = b""
    """The whole of it, for questions after something other than an address."""


def parse_query(data: bytes) -> Query:
    """The question in `data`. Raises Malformed."""
    try:
        number, flags, questions, _, _, additional = _HEADER.unpack_from(data)
        if flags & _RESPONSE or flags >> 11 & 0xF or questions != 1:
            raise Malformed("not one plain question")
        name, at = _name(data, _HEADER.size)
        kind, group = struct.unpack_from(">HH", data, at)
        most = PLAIN_BYTES
        if additional == 1 and data[at + 4 : at + 5] == b"\0":
            extra, size = struct.unpack_from(">HH", data, at + 5)
            if extra == _OPT:
                most = min(max(size, PLAIN_BYTES), UDP_BYTES)
    except struct.error:
        raise Malformed("too short") from None
    if group != _IN:
        raise Malformed("not of class IN")
    return Query(number, name, kind, most)


def ask(query: Query, number: int) -> bytes:
    """The message that asks a server the question of `query` under the id `number`. Raises Malformed."""
    head = _HEADER.pack(number, _WANTED, 1, 0, 0, 1)
    return head + _question(query) + b"\0" + _RECORD.pack(_OPT, UDP_BYTES, 0, 0)


def parse_reply(data: bytes, query: Query, number: int) -> Reply:
    """The answer in `data` to `ask(query, number)`. Raises Malformed, also where it answers another question."""
    try:
        found, flags, questions, answers, _, _ = _HEADER.unpack_from(data)
        if found != number or not flags & _RESPONSE or questions != 1:
            raise Malformed("not the answer to this question")
        name, at = _name(data, _HEADER.size)
        if (name, *struct.unpack_from(">HH", data, at)) != (query.name, query.kind, _IN):
            raise Malformed("the answer to another question")
        addresses, ttl = _addresses(data, at + 4, answers, query.kind)
    except struct.error:
        raise Malformed("too short") from None
    return Reply(flags & 0xF, tuple(addresses), ttl, bool(flags & _TRUNCATED), data)


def _addresses(data: bytes, at: int, count: int, kind: int) -> tuple[list[Address], int]:
    """Those of the answer section. What they are called is not looked at: aliases lead there from what was asked."""
    found: list[Address] = []
    ttl = MAX_TTL
    for _ in range(count):
        at = _skip_name(data, at)
        of, group, seconds, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        value = data[at : at + length]
        at += length
        if group != _IN or len(value) != length:
            raise Malformed("a record that is cut off")
        ttl = min(ttl, seconds)
        if of == kind == A and length == 4:
            found.append(IPv4Address(value))
        elif of == kind == AAAA and length == 16:
            found.append(IPv6Address(value))
    return found, ttl


def answer(
    query: Query, code: int, addresses: Iterable[Address] = (), ttl: int = 0, *, most: int = 65535
) -> bytes:
    """The message that answers `query`; as many of `addresses` as fit, said to be truncated if that is not all."""
    question = _question(query)
    records: list[bytes] = []
    size, flags = _HEADER.size + len(question), _RESPONSE | _WANTED | _AVAILABLE | code
    for address in addresses:
        packed = address.packed
        record = b"\xc0\x0c" + _RECORD.pack(A if len(packed) == 4 else AAAA, _IN, ttl, len(packed)) + packed
        if size + len(record) > most:
            flags |= _TRUNCATED
            break
        records.append(record)
        size += len(record)
    return _HEADER.pack(query.id, flags, 1, len(records), 0, 0) + question + b"".join(records)


def passed_on(query: Query, reply: Reply, *, most: int) -> bytes:
    """The server's own message as the answer to `query`; where it has more than `most` bytes, that it is truncated."""
    if len(reply.message) > most:
        flags = _RESPONSE | _WANTED | _AVAILABLE | _TRUNCATED | reply.code
        return _HEADER.pack(query.id, flags, 1, 0, 0, 0) + _question(query)
    return struct.pack(">H", query.id) + reply.message[2:]


def refusal(data: bytes, code: int) -> bytes:
    """The answer to what could not be understood; nothing where it has not even a header."""
    if len(data) < _HEADER.size or data[2] & 0x80:
        return b""
    return _HEADER.pack(struct.unpack_from(">H", data)[0], _RESPONSE | code, 0, 0, 0, 0)


def _question(query: Query) -> bytes:
    labels = query.name.encode("latin-1").split(b".") if query.name else []
    if not all(0 < len(one) <= _LONGEST_LABEL for one in labels):
        # A server would read another name in it: an empty label ends one, a long one is taken for a pointer.
        raise Malformed("a name that no message can carry")
    return b"".join(bytes([len(one)]) + one for one in labels) + b"\0" + struct.pack(">HH", query.kind, _IN)


def _name(data: bytes, at: int) -> tuple[str, int]:
    """The name at `at`, which is never compressed in a question, and where it ends."""
    labels: list[str] = []
    total = 0
    while True:
        if at >= len(data):
            raise Malformed("a name without an end")
        length = data[at]
        total += length + 1
        if length > _LONGEST_LABEL or total > _LONGEST_NAME:
            raise Malformed("a name that is too long")
        if length == 0:
            return ".".join(labels), at + 1
        label = data[at + 1 : at + 1 + length]
        if len(label) != length or b"." in label:
            raise Malformed("a label that no host has")
        labels.append(label.decode("latin-1").translate(_LOWER))
        at += 1 + length


_LOWER: Final = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def _skip_name(data: bytes, at: int) -> int:
    while True:
        if at >= len(data):
            raise Malformed("a name without an end")
        length = data[at]
        if length >= 0xC0:
            return at + 2
        if length > _LONGEST_LABEL:
            raise Malformed("a name that is too long")
        at += 1 + length
        if length == 0:
            return at
