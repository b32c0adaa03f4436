"""Messages and descriptors between host, zygote and init; nothing from the other end is trusted."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentos.machine.channel import (
    MAX_FDS,
    MAX_FRAME_BYTES,
    BlockingChannel,
    ChannelBroken,
    Decoder,
    frame,
    packed_frame,
    read,
    send,
)
from agentos.machine.jobwire import FULL_DISK, pack_job, unpack_job, unpack_report
from agentos.machine.launcher import end_in

Pair = tuple[BlockingChannel, BlockingChannel]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=6)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends, closed afterwards."""
    left, right = (BlockingChannel(one) for one in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def open_fds() -> set[str]:
    """The numbers of all open descriptors."""
    return set(os.listdir("/proc/self/fd"))


def test_a_message_arrives(pair: Pair) -> None:
    """As it was sent."""
    left, right = pair
    left.send({"op": "launch", "text": "ü\ud800\n", "list": [1, None, True]})
    assert right.receive() == ({"op": "launch", "text": "ü\ud800\n", "list": [1, None, True]}, [])


def test_descriptors_travel_with_their_message(pair: Pair) -> None:
    """Each message has its own, in order, close-on-exec; the sender keeps its copies."""
    left, right = pair
    pipes = [os.pipe() for _ in range(3)]
    left.send({"n": 1}, [pipes[0][0], pipes[1][0]])
    left.send({"n": 2})
    left.send({"n": 3}, [pipes[2][0]])
    received = []
    for number, count in ((1, 2), (2, 0), (3, 1)):
        message, fds = right.receive()
        assert (message["n"], len(fds)) == (number, count)
        received += fds
    for fd, (_, write_end) in zip(received, pipes, strict=True):
        assert not os.get_inheritable(fd)
        os.write(write_end, b"x")
        assert os.read(fd, 10) == b"x"
        os.close(fd)
    for one in pipes:
        for fd in one:
            os.close(fd)


def test_the_end_of_the_stream_breaks_the_channel(pair: Pair) -> None:
    """receive() never returns nothing."""
    left, right = pair
    left.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelBroken):
        right.receive()


def test_a_message_too_large_is_not_sent() -> None:
    """The sender hears of it, before a byte has gone out."""
    with pytest.raises(ValueError):
        frame({"x": "y" * MAX_FRAME_BYTES})


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<IB", MAX_FRAME_BYTES + 1, 0),
        struct.pack("<IB", 2, MAX_FDS + 1) + b"{}",
        struct.pack("<IB", 2, 1) + b"{}",
        struct.pack("<IB", 2, 0) + b"[]",
        struct.pack("<IB", 1, 0) + b"{",
        struct.pack("<IB", 2, 0) + b'"\xff',
        struct.pack("<IB", 4, 0) + b"null",
        struct.pack("<IB", 100_000, 0) + b"[" * 100_000,
    ],
    ids=["long", "many fds", "missing fd", "list", "half", "not ascii", "null", "deep"],
)
def test_what_is_no_frame_breaks_the_channel(data: bytes) -> None:
    """Whatever it is, and nothing of it is kept open."""
    decoder = Decoder()
    mine = os.pipe()
    before = open_fds()
    with pytest.raises(ChannelBroken):
        decoder.feed(frame({"fine": True}, 1) + data, [os.dup(mine[0])])
    assert open_fds() == before
    for fd in mine:
        os.close(fd)


def test_descriptors_that_no_message_claims_are_closed() -> None:
    """When the channel is."""
    decoder = Decoder()
    mine = os.pipe()
    before = open_fds()
    assert decoder.feed(frame({}), [os.dup(mine[0])]) == [({}, [])]
    decoder.close()
    assert open_fds() == before
    for fd in mine:
        os.close(fd)


def test_more_descriptors_than_a_frame_may_carry_are_closed(pair: Pair) -> None:
    """The kernel closes those that do not fit, the channel the rest."""
    left, right = pair
    fds = [os.dup(0) for _ in range(MAX_FDS * 2)]
    before = open_fds()
    socket.send_fds(left.sock, [frame({}, 1)], fds)
    with pytest.raises(ChannelBroken):
        read(right.sock)
    assert open_fds() == before
    for fd in fds:
        os.close(fd)


@given(MESSAGES, st.lists(st.integers(1, 40), min_size=1), st.randoms(use_true_random=False))
def test_any_chunking_gives_the_same_messages(
    messages: list[dict[str, Any]], sizes: list[int], luck: Random
) -> None:
    """A stream has no borders of its own; packed and other frames may follow one another."""
    stream = b"".join(packed_frame(pack_job(one)) if luck.random() < 0.5 else frame(one) for one in messages)
    decoder = Decoder(unpack=unpack_job)
    got = []
    number = 0
    while stream:
        size = sizes[number % len(sizes)]
        number += 1
        got += [message for message, _ in decoder.feed(stream[:size])]
        stream = stream[size:]
    assert got == messages


@given(st.binary(max_size=200), st.lists(st.integers(1, 20), min_size=1))
def test_any_bytes_decode_or_break(data: bytes, sizes: list[int]) -> None:
    """Nothing else can come of them, in whatever pieces; what decodes is an object."""
    decoder = Decoder()
    number = 0
    try:
        while data:
            size = sizes[number % len(sizes)]
            number += 1
            for message, fds in decoder.feed(data[:size]):
                assert isinstance(message, dict)
                assert not fds
            data = data[size:]
    except ChannelBroken:
        pass


@given(st.binary(max_size=60))
def test_any_body_in_a_good_header_decodes_or_breaks(body: bytes) -> None:
    """JSON objects come through as they are."""
    try:
        expected = json.loads(body.decode("ascii"))
    except (ValueError, RecursionError):
        expected = None
    data = struct.pack("<IB", len(body), 0) + body
    if isinstance(expected, dict):
        assert Decoder().feed(data) == [(expected, [])]
    else:
        with pytest.raises(ChannelBroken):
            Decoder().feed(data)


def test_a_packed_frame_is_for_who_agreed_on_it() -> None:
    """Descriptors come with it as with any other; elsewhere it breaks the channel, and they are closed."""
    mine = os.pipe()
    before = open_fds()
    packed = packed_frame(pack_job({"job": 7, "argv": ["a\udcff"]}), 1)
    [(message, [fd])] = Decoder(unpack=unpack_job).feed(packed, [os.dup(mine[0])])
    assert message == {"job": 7, "argv": ["a\udcff"]}
    os.close(fd)
    for data in (packed, packed + frame({})):
        with pytest.raises(ChannelBroken):
            Decoder().feed(data, [os.dup(mine[0])])
    assert open_fds() == before
    for fd in mine:
        os.close(fd)


@given(st.binary(max_size=80) | st.binary(min_size=28, max_size=28))
def test_any_report_is_one_or_breaks_the_channel(body: bytes) -> None:
    """A spawner may be the guest's: what it reports has numbers that a process can have, or is none."""
    try:
        [(report, _)] = Decoder(unpack=unpack_report).feed(packed_frame(body))
    except ChannelBroken:
        assert len(body) != 28 or body[-1] > 2
        return
    assert 0 <= report.status <= 0xFFFF
    assert FULL_DISK[report.full] in (None, "disk_bytes", "disk_files")


@pytest.mark.parametrize("end", [(0x10000, 0, 0), (0, 2**63, 0), (0, 0, 2**53 + 1), (0, -1, 0), (0, 0.0, 0)])
def test_an_end_that_no_process_can_have_is_refused(end: tuple[object, object, object]) -> None:
    """Nor do its numbers come near what a client is told."""
    assert end_in(9, 1500, 4) == (9, 1.5, 4096)
    with pytest.raises(ValueError, match="no number"):
        end_in(*end)


def test_a_large_message_with_descriptors_over_a_small_socket() -> None:
    """The descriptors go with the first part and are not sent again with the rest."""
    left, right = socket.socketpair()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    receiver = BlockingChannel(right)
    sender = threading.Thread(target=send, args=(left, {"x": "y" * 1_000_000}, [0]))
    sender.start()
    message, fds = receiver.receive()
    assert (len(message["x"]), len(fds)) == (1_000_000, 1)
    os.close(fds[0])
    sender.join()
    left.close()
    receiver.close()
