"""Where a client is in the streams of a VM, told to the next connection."""

from __future__ import annotations

from typing import Any

import pytest

from agentos.wire.client_connection import ClientConnection, EventArrived, Lost, Opened
from agentos.wire.connection import ActionCalled, ServerConnection
from agentos.wire.encodings import BARE, BARE_BYTES, Encoding
from agentos.wire.malformed import MalformedMessage
from agentos.wire.messages import ActionResponse, ActorSpecifier
from agentos.wire.positions import MOST_STREAMS, Positions, Resumption, read_resumption


def output(serial: int, cursor: int, **more: Any) -> tuple[dict[str, Any], ...]:
    """The arguments of a processOutput."""
    return (
        {"pid": serial * 10, "stream": "stdout", "data": b"x", "serial": serial, "cursor": cursor, **more},
    )


def test_what_came_is_asked_for_no_more() -> None:
    """The cursor after the last event of each stream that has not ended, and the greatest number."""
    positions = Positions()
    assert positions.request() == {}
    assert positions.resumed({"epoch": "e", "after": 2, "positions": [[1, 50, "process", 10]]}) == []
    positions.note("processOutput", output(1, 60))
    positions.note("processOutput", output(3, 7))
    positions.note("shellData", ({"shellId": "s", "data": b"", "serial": 4, "cursor": 9},))
    positions.note("processExit", ({"pid": 30, "exitCode": 0, "serial": 3},))
    positions.note("streamError", ({"scope": "process", "id": 10, "serial": 1, "cursor": 90},))
    positions.note("processExit", ({"pid": 50, "exitCode": 0, "serial": 5},))
    for name, args in (
        ("vmBooted", ({},)),
        ("other", ()),
        ("other", (1, 2)),
        ("processOutput", ({"pid": 1},)),
    ):
        positions.note(name, args)
    request = positions.request()
    assert request == {"epoch": "e", "after": 5, "positions": [[1, 90], [4, 9]]}
    assert read_resumption((request,)) == Resumption("e", 5, {1: 90, 4: 9})


def test_a_stream_that_was_silent_is_asked_for_from_its_beginning() -> None:
    """Though a later one has been told of: it has not been told to its end. Where it is gone, nobody knows its name."""
    positions = Positions()
    positions.resumed({"epoch": "e", "after": 2, "positions": [[1, 50, "process", 10]]})
    positions.note("processOutput", output(5, 7))
    positions.note("processExit", ({"pid": 50, "exitCode": 0, "serial": 5},))
    positions.note("processOutput", output(4, 3))
    assert positions.request() == {"epoch": "e", "after": 5, "positions": [[1, 50], [3, 0], [4, 3]]}
    answer = {"epoch": "e", "after": 5, "positions": [[1, 50, "process", 10]]}
    assert [one["id"] for one in positions.resumed(answer)] == [40]


def test_what_the_server_no_longer_has_is_told() -> None:
    """Streams that it does not name any more; all of them where its numbers are new."""
    positions = Positions()
    positions.resumed({"epoch": "e", "after": 0, "positions": []})
    positions.note("processOutput", output(1, 5))
    positions.note("shellData", ({"shellId": "s", "data": b"", "serial": 2, "cursor": 9},))
    answer = {"epoch": "e", "after": 2, "positions": [[1, 5, "process", 10]]}
    assert [(one["scope"], one["id"], one["code"]) for one in positions.resumed(answer)] == [
        ("shell", "s", "stream.lost")
    ]
    answer = {"epoch": "other", "after": 1, "positions": [[1, 0, "process", 99]]}
    assert [(one["scope"], one["id"]) for one in positions.resumed(answer)] == [("process", 10)]
    assert positions.request() == {"epoch": "other", "after": 1, "positions": [[1, 0]]}


def test_positions_are_bounded() -> None:
    """The oldest is forgotten."""
    positions = Positions("e")
    for serial in range(1, MOST_STREAMS + 2):
        positions.note("processOutput", output(serial, 1))
    assert len(positions.request()["positions"]) == MOST_STREAMS
    assert read_resumption((positions.request(),)) is not None
    positions.note("processOutput", output(2**60, 1))
    request = positions.request()
    assert len(request["positions"]) == MOST_STREAMS
    assert request["positions"][-1] == [2**60, 1]
    assert read_resumption((request,)) is not None


@pytest.mark.parametrize(
    "args",
    [
        (1,),
        ({}, {}),
        ([],),
        ({"epoch": 1, "after": 0, "positions": []},),
        ({"epoch": "e", "after": -1, "positions": []},),
        ({"epoch": "e", "after": True, "positions": []},),
        ({"epoch": "e", "after": 0},),
        ({"epoch": "e", "after": 0, "positions": {}},),
        ({"epoch": "e", "after": 0, "positions": [1]},),
        ({"epoch": "e", "after": 0, "positions": [[1]]},),
        ({"epoch": "e", "after": 0, "positions": [["1", 2]]},),
        ({"epoch": "e", "after": 0, "positions": [[1, -2]]},),
        ({"epoch": "e", "after": 0, "positions": [[1, 2]] * (MOST_STREAMS + 1)},),
    ],
)
def test_nonsense_is_refused(args: tuple[Any, ...]) -> None:
    """By name."""
    with pytest.raises(MalformedMessage):
        read_resumption(args)


@pytest.mark.parametrize("encoding", [BARE, BARE_BYTES])
def test_a_connection_says_it_before_it_subscribes(encoding: Encoding) -> None:
    """On each WebSocket, with what the ones before brought."""
    client = ClientConnection(encoding)
    client.subscribe("processOutput")
    for before in ({}, {"epoch": "e", "after": 1, "positions": [[1, 5]]}):
        server = ServerConnection(encoding, ActorSpecifier("abc"), "c")
        opened = client.receive(server.start())
        assert isinstance(opened, Opened)
        resume, _ = (server.receive(frame) for frame in opened.frames)
        assert isinstance(resume, ActionCalled)
        assert (resume.name, resume.args) == ("resumeEvents", (before,))
        positions = [[1, 5, "process", 10]] if before else []
        answer = {"epoch": "e", "after": 1 if before else 0, "positions": positions}
        assert client.receive(server.respond(resume.id, answer)) is None
        frame = server.event("processOutput", *output(1, 5))
        assert frame is not None
        assert isinstance(client.receive(frame), EventArrived)
        client.dropped()
    server = ServerConnection(encoding, ActorSpecifier("abc"), "c")
    opened = client.receive(server.start())
    assert isinstance(opened, Opened)
    resume = server.receive(opened.frames[0])
    assert isinstance(resume, ActionCalled)
    answer = {"epoch": "new", "after": 0, "positions": []}
    lost = client.receive(server.respond(resume.id, answer))
    assert isinstance(lost, Lost)
    assert [one["id"] for one in lost.errors] == [10]
    client.dropped()
    opened = client.receive(server.start())
    assert isinstance(opened, Opened)
    resume = encoding.decode_to_server(opened.frames[0])
    with pytest.raises(MalformedMessage):
        client.receive(encoding.encode_frame(ActionResponse(resume.id, {"epoch": 1})))  # type: ignore[union-attr]
