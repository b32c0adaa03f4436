"""Both sides of a connection, talking to one another and to what a hostile peer sends."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from agentos.errors import ActionNotFound, AgentOSError, InternalError, InvalidRequest, LimitExceeded
from agentos.wire import bare
from agentos.wire import client_connection as client_side
from agentos.wire import connection as server_side
from agentos.wire.client_connection import ClientConnection, Completed, EventArrived, Failed, Opened
from agentos.wire.connection import ActionCalled, Refused, ServerConnection, Subscribed, Unsubscribed
from agentos.wire.encodings import BARE_BYTES, CBOR, ENCODINGS, JSON, Encoding, Frame
from agentos.wire.malformed import AT_ONCE, FROM_CLIENT, MalformedMessage
from agentos.wire.messages import ActionRequest, ActorSpecifier, Error, Init, SubscriptionRequest

ACTOR = ActorSpecifier("abc", 1, "my-agent")


@pytest.fixture(params=[*ENCODINGS.values(), BARE_BYTES], ids=[*ENCODINGS, "bare with bytes"])
def encoding(request: pytest.FixtureRequest) -> Encoding:
    chosen: Encoding = request.param
    return chosen


def _server(encoding: Encoding) -> ServerConnection:
    return ServerConnection(encoding, ACTOR, "conn-1")


def _sent(frame: Frame | None) -> Frame:
    assert frame is not None
    return frame


def _request(encoding: Encoding, number: int, name: str = "exec") -> Frame:
    return encoding.encode_frame(ActionRequest(number, name))


def test_conversation(encoding: Encoding) -> None:
    """Init opens the connection, what waited is sent, answers find their calls in any order."""
    server, client = _server(encoding), ClientConnection(encoding)
    assert client.subscribe("processExit") is None
    assert client.call("spawn", ("sleep", ["1"])) == (0, None)
    opened = client.receive(server.start())
    assert isinstance(opened, Opened)
    assert (opened.actor_id, opened.connection_id) == ("abc", "conn-1")
    received = [server.receive(frame) for frame in opened.frames]
    assert received == [
        ActionCalled(1, "resumeEvents", ({},)),
        Subscribed("processExit"),
        ActionCalled(0, "spawn", ("sleep", ["1"])),
    ]
    assert client.receive(server.fail(1, ActionNotFound("an older server does not know it"))) is None
    number, frame = client.call("exec", ("$HOME/x", {"timeout": 5}))
    assert number == 2
    assert server.receive(_sent(frame)) == ActionCalled(2, "exec", ("$HOME/x", {"timeout": 5}))
    assert client.receive(_sent(server.event("processExit", {"pid": 4}))) == EventArrived(
        "processExit", ({"pid": 4},)
    )
    assert client.receive(server.respond(2, {"data": b"\x01"})) == Completed(2, {"data": b"\x01"})
    assert server.in_flight == {0}
    error = ActionNotFound("Action `spawn` was not found.")
    assert client.receive(server.fail(0, error)) == Failed((0,), error)
    assert server.in_flight == frozenset()


def test_events_only_for_subscribers(encoding: Encoding) -> None:
    """Only subscribed events are sent, once, however often they were asked for."""
    server = _server(encoding)
    subscribe = encoding.encode_frame(SubscriptionRequest("shellData", True))
    assert server.event("shellData") is None
    assert server.receive(subscribe) == Subscribed("shellData")
    assert server.receive(subscribe) is None
    assert server.wants("shellData")
    assert server.subscriptions == {"shellData"}
    assert server.event("shellData") is not None
    unsubscribe = encoding.encode_frame(SubscriptionRequest("shellData", False))
    assert server.receive(unsubscribe) == Unsubscribed("shellData")
    assert server.receive(unsubscribe) is None
    assert server.event("shellData") is None


def test_listeners_are_counted(encoding: Encoding) -> None:
    """The first listener subscribes and the last one unsubscribes."""
    server, client = _server(encoding), ClientConnection(encoding)
    client.receive(server.start())
    assert server.receive(_sent(client.subscribe("e"))) == Subscribed("e")
    assert client.subscribe("e") is None
    assert client.unsubscribe("e") is None
    assert server.receive(_sent(client.unsubscribe("e"))) == Unsubscribed("e")
    assert client.unsubscribe("e") is None


def test_reconnection(encoding: Encoding) -> None:
    """A drop fails what was sent; the next connection subscribes again and ids count on."""
    server, client = _server(encoding), ClientConnection(encoding)
    client.receive(server.start())
    client.subscribe("e")
    assert client.call("exec", ())[0] == 1
    assert client.dropped() == (1,)
    assert not client.open
    assert client.call("exec", ()) == (2, None)
    assert client.call("forgotten", ()) == (3, None)
    client.forget(3)
    assert client.dropped() == ()
    again = _server(encoding)
    opened = client.receive(again.start())
    assert isinstance(opened, Opened)
    assert [again.receive(frame) for frame in opened.frames][1:] == [
        Subscribed("e"),
        ActionCalled(2, "exec", ()),
    ]
    assert client.receive(again.start()) is None
    client.dropped()
    assert client.call("exec", ())[0] == 5
    assert client.give_up() == (5,)


def test_cancelling(encoding: Encoding) -> None:
    """What was sent is taken back at the server, what was not is never sent; nobody waits for answers."""
    server, client = _server(encoding), ClientConnection(encoding)
    number, _ = client.call("exec", ())
    assert client.cancel(number) is None
    opened = client.receive(server.start())
    assert isinstance(opened, Opened)
    assert len(opened.frames) == 1
    number, _ = client.call("exec", ())
    received = server.receive(_sent(client.cancel(number)))
    assert isinstance(received, ActionCalled)
    assert (received.name, received.args) == ("cancelAction", (number,))
    for one in (number, received.id):
        assert client.receive(server.respond(one, None)) is None
    assert client.cancel(number) is None


def test_error_without_id(encoding: Encoding) -> None:
    """It fails all actions in flight and leaves the connection usable."""
    server, client = _server(encoding), ClientConnection(encoding)
    client.receive(server.start())
    for _ in range(3):
        server.receive(_sent(client.call("exec", ())[1]))
    failed = client.receive(server.fail(None, ValueError("x")))
    assert failed == Failed((1, 2, 3), InternalError("An internal error occurred"))
    assert server.in_flight == frozenset()
    assert client.open
    assert client.receive(server.respond(1, None)) is None


def test_answers_nobody_waits_for(encoding: Encoding) -> None:
    """Answers to unknown ids and events nobody listens to are passed over."""
    client = ClientConnection(encoding)
    client.receive(encoding.encode_frame(Init("a", "b")))
    server = _server(encoding)
    server.receive(encoding.encode_frame(SubscriptionRequest("e", True)))
    for frame in (server.respond(9, 1), server.fail(9, ValueError()), _sent(server.event("e"))):
        assert client.receive(frame) is None
    number, _ = client.call("exec", ())
    client.forget(number)
    assert client.receive(server.respond(number, 1)) is None


def test_bad_arguments_can_be_answered() -> None:
    """A request whose id is readable is refused by itself; without one, the connection ends."""
    server = _server(JSON)
    bad = json.dumps({"body": {"tag": "ActionRequest", "val": {"id": 3, "name": "exec", "args": {}}}})
    refused = server.receive(bad)
    assert isinstance(refused, Refused)
    assert refused.action_id == 3
    assert isinstance(refused.error, InvalidRequest)
    answer = JSON.decode_to_client(server.fail(refused.action_id, refused.error))
    assert isinstance(answer, Error)
    assert (answer.group, answer.code, answer.action_id) == ("request", "invalid", 3)
    with pytest.raises(MalformedMessage):
        server.receive("{")
    server.receive(_request(JSON, 3))
    with pytest.raises(MalformedMessage):
        server.receive(bad)


def _calls(number: int) -> dict[str, list[Frame]]:
    """Frames by encoding that call an action of this id with what no value may be, or not here."""
    deep_text = "[" * 50_000 + '"]"' + "]" * 50_000
    head, identity = '{"body":{"val":{"name":"exec",', f'"id": ["$BigInt","{number}"]'
    texts = (
        f'{head}{identity},"args":{deep_text}}},"tag":"ActionRequest"}}}}',
        f'{head}"args":[{deep_text},{{"id":1}}],{identity}}},"tag":"ActionRequest"}}}}',
        f'{head}"args":[{"9" * 5000}],"id":{number}}},"tag":"ActionRequest"}}}}',
        f'{head}"args":{"[" * 200}"\\ud800\\""{"]" * 200},"id" : {number} }},"tag":"ActionRequest"}}}}',
    )
    whole = CBOR.encode_frame(ActionRequest(number, "exec", ()))
    assert isinstance(whole, bytes)
    deep = b"\x81" * 100_000 + b"\x62id"
    values = (
        deep, b"\xd8\x40" * 100_000 + b"\x40", b"\x9f" * 1000 + b"\xff" * 1000, b"\x81\xa1\x80\x00",
        b"\x81\x61\xff", b"\x81\xd9\xff\xff\xf9\x00\x00", b"\x82\x5f\x41x\xff\xf0",
        b"\xbf\x62id\x01\x63val\xa1\x62id\x02\x61x" + deep + b"\xff",
    )  # fmt: skip
    frames = [whole.replace(b"\x64args\x80", b"\x64args" + value) for value in values]
    at = whole.index(b"\x62id")
    identity_there = whole[at : at + 12]
    turned = whole.replace(identity_there, b"").replace(b"\x64args\x80", b"\x64args" + deep + identity_there)
    bare = b"\x04\x00\x00\x03\x04exec"
    return {
        "json": list(texts),
        "cbor": [*frames, turned],
        "bare": [bare + _sized(value) for value in values],
    }


def _sized(value: bytes) -> bytes:
    return bare.uint(len(value)) + value


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_cannot_be_read_spoils_its_action_alone(name: str) -> None:
    """Too deep, too long a number, a tag that nobody knows: the id is found before it or after it, and answered."""
    server = _server(ENCODINGS[name])
    for frame in _calls(3)[name]:
        refused = server.receive(frame)
        assert isinstance(refused, Refused), frame[-200:]
        assert refused.action_id == 3
        server.fail(3, refused.error)
        if name != "bare":  # whose id comes first, before anything can be wrong
            too_long = frame + (" ]" if isinstance(frame, str) else b"\x00")  # type: ignore[operator]
            for garbled in (frame[: len(frame) // 2], too_long):
                with pytest.raises(MalformedMessage):
                    server.receive(garbled)
    assert isinstance(server.receive(_request(ENCODINGS[name], 3)), ActionCalled)
    with pytest.raises(MalformedMessage):  # now its id is in use
        server.receive(_calls(3)[name][0])


FEW = replace(FROM_CLIENT, items=30_000)


def _too_many(number: int) -> dict[str, list[Frame]]:
    """Frames by encoding that call an action of this id with more values than a client may send."""
    count = 2 * FEW.items
    frames: dict[str, list[Frame]] = {}
    for name, one in ENCODINGS.items():
        frame = one.encode_frame(ActionRequest(number, "exec", (0,)))
        if isinstance(frame, str):
            head, tail = frame[: frame.index("[0]")], frame[frame.index("[0]") + 3 :]
            frames[name] = [
                f"{head}[0{more * count}]{tail}" for more in (",0", ",[]", ',""', ',"a,b:[{"', ',{"":0}')
            ]
        else:
            blobs = [
                b"\x9a" + count.to_bytes(4, "big") + value * count
                for value in (b"\x00", b"\x80", b"\x60", b"\xa0")
            ]
            blobs += [
                b"\x9f" + b"\x81" * 50 + b"\x00" * count + b"\xff",
                b"\x81\xba" + b"\x00\x00\xff\xff" + b"\x00" * 2**17,
            ]
            if name == "bare":
                frames[name] = [frame[: frame.index(b"exec") + 4] + _sized(blob) for blob in blobs]
            else:
                frames[name] = [frame.replace(b"\x81\x00", blob) for blob in blobs]
    return frames


@pytest.mark.parametrize("name", ENCODINGS)
def test_too_many_values_spoil_their_action_alone(name: str) -> None:
    """The id stands where given clients write it, and ours: before what is too much."""
    server = ServerConnection(ENCODINGS[name], ACTOR, "conn-1", FEW)
    for frame in _too_many(3)[name]:
        with pytest.raises(MalformedMessage):
            server.receive(frame, AT_ONCE)
        refused = server.receive(frame)
        assert isinstance(refused, Refused), frame[:200]
        assert refused.action_id == 3
        assert "values" in refused.error.message
    assert isinstance(server.receive(_request(ENCODINGS[name], 3)), ActionCalled)


def test_a_first_look_changes_nothing(encoding: Encoding) -> None:
    """What is too much for it is taken by the second one."""
    server = _server(encoding)
    frame = encoding.encode_frame(ActionRequest(1, "exec", ([0] * AT_ONCE.items,)))
    with pytest.raises(MalformedMessage):
        server.receive(frame, AT_ONCE)
    assert not server.in_flight
    assert isinstance(server.receive(frame), ActionCalled)
    assert isinstance(server.receive(_request(encoding, 2), AT_ONCE), ActionCalled)


def test_an_id_in_use_is_beyond_answering(encoding: Encoding) -> None:
    """Two calls under one id could not be told apart; once answered, an id may come again."""
    server = _server(encoding)
    server.receive(_request(encoding, 1))
    with pytest.raises(MalformedMessage):
        server.receive(_request(encoding, 1))
    server.respond(1, None)
    assert isinstance(server.receive(_request(encoding, 1)), ActionCalled)


def test_nothing_grows_without_bound(encoding: Encoding) -> None:
    """Calls and subscriptions of one connection are bounded, each with an error that names the bound."""
    server = _server(encoding)
    for number in range(server_side.MOST_IN_FLIGHT):
        assert isinstance(server.receive(_request(encoding, number)), ActionCalled)
    refused = server.receive(_request(encoding, 5000))
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, LimitExceeded)
    for number in range(server_side.MOST_SUBSCRIPTIONS):
        server.receive(encoding.encode_frame(SubscriptionRequest(f"e{number}", True)))
    for name in ("one more", "x" * 2000):
        refused = server.receive(encoding.encode_frame(SubscriptionRequest(name, True)))
        assert isinstance(refused, Refused)
        assert isinstance(refused.error, AgentOSError)
    assert len(server.subscriptions) == server_side.MOST_SUBSCRIPTIONS


def test_an_output_that_cannot_be_sent(encoding: Encoding) -> None:
    """The action stays in flight, so that it can be failed."""
    server = _server(encoding)
    server.receive(_request(encoding, 1))
    with pytest.raises(InvalidRequest):
        server.respond(1, object())
    assert server.in_flight == {1}
    client = ClientConnection(encoding)
    with pytest.raises(InvalidRequest):
        client.call("exec", (object(),))
    assert client.call("exec", ())[0] == 0


def test_client_refuses_nonsense(encoding: Encoding) -> None:
    """A server's frame that is malformed is an error, not a crash."""
    client = client_side.ClientConnection(encoding)
    with pytest.raises(MalformedMessage):
        client.receive(b"\xff\x00")
