"""DNS messages: what is understood, what is answered, and that no input does anything but raise Malformed."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentos.network import dns
from agentos.network.dns import Malformed, Query

NAME = b"\x03WeB\x07example\x03com\0"


def message(
    *, flags: int = 0x100, questions: int = 1, name: bytes = NAME, kind: int = dns.A, group: int = 1
) -> bytes:
    """A question."""
    return struct.pack(">HHHHHH", 7, flags, questions, 0, 0, 0) + name + struct.pack(">HH", kind, group)


def test_a_question() -> None:
    """Its name in lower case; the size that is asked for, within bounds."""
    assert dns.parse_query(message()) == Query(7, "web.example.com", dns.A)
    for size, most in ((100, 512), (1000, 1000), (4096, 1232)):
        data = bytearray(message() + b"\0" + struct.pack(">HHIH", 41, size, 0, 0))
        data[11] = 1
        assert dns.parse_query(bytes(data)).most == most
    asked = dns.ask(Query(7, "web.example.com", dns.AAAA), 99)
    assert dns.parse_query(asked) == Query(99, "web.example.com", dns.AAAA, dns.UDP_BYTES)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 11, message(flags=0x8100), message(flags=0x2900), message(questions=0), message(questions=2),
        message(group=3), message()[:-1], message(name=b"\xc0\x0c"), message(name=b"\x40" + b"a" * 64 + b"\0"),
        message(name=(b"\x3f" + b"a" * 63) * 4 + b"\0"), message(name=b"\x03a.b\0"), message(name=b"\x05ab"),
    ],
)  # fmt: skip
def test_no_question(data: bytes) -> None:
    """Said to be malformed; answered where there is a header of a question."""
    with pytest.raises(Malformed):
        dns.parse_query(data)
    refusal = dns.refusal(data, dns.FORMERR)
    assert refusal == b"" or (len(refusal) == 12 and refusal[3] & 15 == dns.FORMERR)


def test_an_answer_is_understood() -> None:
    """What is written is what is read; with another id or for another question it is not taken."""
    query = Query(7, "web.example.com", dns.A)
    addresses = [ip_address("1.2.3.4"), ip_address("1.2.3.5")]
    data = dns.answer(query, dns.NOERROR, addresses, 60)
    reply = dns.parse_reply(data, query, 7)
    assert (reply.code, list(reply.addresses), reply.ttl, reply.truncated) == (0, addresses, 60, False)
    for other, number in (
        (query, 8),
        (Query(7, "web.example.org", dns.A), 7),
        (Query(7, query.name, dns.AAAA), 7),
    ):
        with pytest.raises(Malformed):
            dns.parse_reply(data, other, number)
    with pytest.raises(Malformed):
        dns.parse_reply(data[:-1], query, 7)
    assert dns.parse_reply(dns.answer(query, dns.NXDOMAIN), query, 7).code == dns.NXDOMAIN


def test_a_long_answer_is_cut() -> None:
    """To whole records, and says so."""
    query = Query(7, "web.example.com", dns.AAAA)
    data = dns.answer(query, 0, [ip_address(number + 2**127) for number in range(100)], 1, most=512)
    reply = dns.parse_reply(data, query, 7)
    assert len(data) <= 512
    assert reply.truncated
    assert len(reply.addresses) == (512 - 33) // 28
    whole = dns.parse_reply(dns.answer(query, 0, [ip_address(2**127)] * 50, 1), query, 7)
    assert len(dns.passed_on(query, whole, most=512)) == 33
    assert dns.passed_on(Query(9, query.name, query.kind), whole, most=5000)[:2] == b"\0\x09"


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    """Either a question, or Malformed; the same for answers."""
    query = Query(int.from_bytes(data[:2], "big"), "web.example.com", dns.A)
    for parse in (dns.parse_query, lambda one: dns.parse_reply(one, query, query.id)):
        try:
            parse(data)
        except Malformed:
            pass
    dns.refusal(data, dns.SERVFAIL)


@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_damaged_answers(data: st.DataObject) -> None:
    """A flipped byte anywhere in a true answer."""
    query = Query(7, "web.example.com", dns.A)
    whole = bytearray(dns.answer(query, 0, [ip_address("1.2.3.4")] * 3, 60))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        dns.parse_reply(bytes(whole), query, 7)
    except Malformed:
        pass


@pytest.mark.parametrize(
    "name", ["a..example.org", ".example.org", "a.", "l" * 64 + ".example.org", "l" * 200]
)
def test_names_that_no_message_can_carry(name: str) -> None:
    """An empty label would end the name early, a long one be read as a pointer: another name would be asked for."""
    with pytest.raises(Malformed):
        dns.ask(Query(1, name, dns.A), 7)
