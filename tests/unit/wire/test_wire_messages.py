"""Messages: strictness, older versions, and what may be left out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentos.errors import InvalidRequest
from agentos.wire import bare, cbor, structs
from agentos.wire.encodings import (
    BARE,
    BARE_BYTES,
    CBOR,
    CBOR_BYTES,
    ENCODINGS,
    JSON,
    Encoding,
    decode_http_error,
    encode_value,
    encoding_named,
)
from agentos.wire.malformed import FROM_CLIENT, FROM_SERVER, MalformedMessage
from agentos.wire.messages import (
    TO_CLIENT,
    TO_SERVER,
    ActionRequest,
    ActionResponse,
    ActorSpecifier,
    Error,
    Event,
    HttpActionRequest,
    HttpActionResponse,
    HttpQueueSendRequest,
    HttpQueueSendResponse,
    HttpResponseError,
    Init,
    SubscriptionRequest,
)
from agentos.wire.values import UNDEFINED

ALL = [*ENCODINGS.values(), BARE_BYTES, CBOR_BYTES]


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_requests_of_every_version(version: int) -> None:
    """What a client sends is the same in versions 1 to 4."""
    for message in (ActionRequest(300, "exec", ("ls", {"cwd": "/"})), SubscriptionRequest("e", False)):
        frame = structs.write_frame(message, TO_SERVER, version)
        assert frame[:2] == bytes((version, 0))
        assert BARE.decode_to_server(frame) == message
    body = structs.write_body(HttpActionRequest((1,)), version)
    assert BARE.decode_body(HttpActionRequest, body) == HttpActionRequest((1,))


def test_older_versions_lack_fields() -> None:
    """Version 1 has a connection token, and an error says which actor it is from since version 4."""
    init = Init("a", "b")
    assert structs.write_frame(init, TO_CLIENT, 1).hex() == "0100000161016200"
    assert BARE.decode_to_client(bytes.fromhex("01000001610162022121")) == init
    error = Error("g", "c", "m", None, 1, ActorSpecifier("a"))
    frame = structs.write_frame(error, TO_CLIENT, 3)
    assert BARE.decode_to_client(frame) == Error("g", "c", "m", None, 1)


@pytest.mark.parametrize("kind", [HttpQueueSendRequest, HttpQueueSendResponse])
def test_queues_came_with_version_3(kind: type[Any]) -> None:
    """Queue messages of an older version are refused, on either side."""
    with pytest.raises(MalformedMessage):
        BARE.decode_body(kind, bytes.fromhex("0200 01 f6 00 00 00"))
    with pytest.raises(InvalidRequest):
        structs.write_body(kind("completed"), 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "04",
        "0400",
        "0000 00",
        "0500 00 00 0161 01 80",
        "ffff 00",
        "0400 02",
        "0400 00 00 0161 01 80 00",
        "0400 00 00 0161 02 80",
        "0400 00 00 0161 01 00",
        "0400 00 8000 0161 01 80",
        "0400 00 ffffffffffffffffff02 0161 01 80",
        "0400 00 ffffffffffffffffffff01 0161 01 80",
        "0400 00 00 01ff 01 80",
        "0400 01 0161 02",
        "0400 00 00 ffffffffffffffffff01 61",
    ],
)
def test_malformed_bare(text: str) -> None:
    """Unknown versions and tags, lengths beyond the end, trailing bytes and long forms are refused."""
    with pytest.raises(MalformedMessage):
        BARE.decode_to_server(bytes.fromhex(text))


@pytest.mark.parametrize("number", [0, 127, 128, 300, 2**32, 2**64 - 1])
def test_uint(number: int) -> None:
    """A uint goes through its varint, at most 64 bits."""
    data = bare.uint(number)
    assert bare.read_uint(b"\xff" + data + b"\xff", 1) == (number, 1 + len(data))
    for size in range(len(data)):
        with pytest.raises(MalformedMessage, match="ends inside"):
            bare.read_uint(data[:size], 0)
    with pytest.raises(InvalidRequest):
        bare.uint(2**64)
    with pytest.raises(InvalidRequest):
        bare.fixed(-1, 8)


@pytest.mark.parametrize("encoding", [JSON, CBOR], ids=lambda one: one.name)
@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        {},
        {"body": 1},
        {"body": {"tag": "Init", "val": {"actorId": "a", "connectionId": "b"}}},
        {"body": {"tag": ["ActionRequest"], "val": {}}},
        {"body": {"tag": "ActionRequest"}},
        {"body": {"tag": "ActionRequest", "val": {"id": 1, "name": "x"}}},
        {"body": {"tag": "ActionRequest", "val": {"id": 1, "name": 2, "args": []}}},
        {"body": {"tag": "ActionRequest", "val": {"id": 1, "name": "x", "args": {}}}},
        {"body": {"tag": "ActionRequest", "val": {"id": -1, "name": "x", "args": []}}},
        {"body": {"tag": "ActionRequest", "val": {"id": True, "name": "x", "args": []}}},
        {"body": {"tag": "ActionRequest", "val": {"id": ["$BigInt", str(2**64)], "name": "x", "args": []}}},
        {"body": {"tag": "SubscriptionRequest", "val": {"eventName": "e", "subscribe": 1}}},
    ],
)
def test_malformed_trees(encoding: Encoding, tree: Any) -> None:
    """A field that is missing or of a wrong type is refused."""
    frame = cbor.dump(tree) if encoding.binary else json.dumps(tree)
    with pytest.raises(MalformedMessage):
        encoding.decode_to_server(frame)


@pytest.mark.parametrize("encoding", ALL, ids=lambda one: one.name)
def test_id_of_a_bad_request(encoding: Encoding) -> None:
    """Where the id could be read, the error carries it, so that the action can be answered."""
    bad = {
        "json": '{"body":{"tag":"ActionRequest","val":{"id":["$BigInt","9"],"name":"x","args":7}}}',
        "cbor": cbor.dump({"body": {"tag": "ActionRequest", "val": {"id": 9, "name": "x", "args": 7}}}),
        "bare": bytes.fromhex("0400 00 09 0178 01 07"),
    }
    with pytest.raises(MalformedMessage) as caught:
        encoding.decode_to_server(bad[encoding.name])
    assert caught.value.action_id == 9


@pytest.mark.parametrize("encoding", ALL, ids=lambda one: one.name)
def test_absent_or_null(encoding: Encoding) -> None:
    """What is not there is left out, never null; only an error's id is null, as clients insist."""
    frame = encoding.encode_frame(Error("g", "c", "m"))
    assert encoding.decode_to_client(frame) == Error("g", "c", "m")
    if encoding is JSON:
        assert frame == (
            '{"body":{"tag":"Error","val":{"actionId":null,"code":"c","group":"g","message":"m"}}}'
        )
    body = encoding.encode_body(HttpResponseError("g", "c", "m", actor=ActorSpecifier("a")))
    assert b"null" not in body
    assert encoding.decode_body(HttpResponseError, body).actor == ActorSpecifier("a")


@pytest.mark.parametrize("encoding", [JSON, CBOR], ids=lambda one: one.name)
def test_output_is_mandatory(encoding: Encoding) -> None:
    """An answer without output is none; null and undefined are outputs."""
    with pytest.raises(MalformedMessage):
        encoding.decode_body(HttpActionResponse, b"{}" if encoding is JSON else b"\xa0")
    for output in (None, UNDEFINED):
        body = encoding.encode_body(HttpActionResponse(output))
        assert encoding.decode_body(HttpActionResponse, body).output is output


def test_queue_body_may_be_missing() -> None:
    """JavaScript leaves an undefined body out."""
    read = JSON.decode_body(HttpQueueSendRequest, b'{"wait":false,"name":"q"}')
    assert read == HttpQueueSendRequest(UNDEFINED, "q", False)


@pytest.mark.parametrize("encoding", [CBOR, BARE], ids=lambda one: one.name)
def test_text_frames_are_refused(encoding: Encoding) -> None:
    """cbor and bare are binary; json may come in either kind of frame."""
    with pytest.raises(MalformedMessage):
        encoding.decode_to_server("{}")
    with pytest.raises(MalformedMessage):
        encoding.decode_to_client("{}")


def test_ids_are_wide_in_cbor() -> None:
    """An id takes 8 bytes however small: in short form a JavaScript client never settles the call."""
    frame = CBOR.encode_frame(ActionResponse(7, None))
    assert isinstance(frame, bytes)
    assert bytes.fromhex("626964 1b0000000000000007") in frame


def test_names() -> None:
    """An encoding is found by its name, json where there is none."""
    assert encoding_named(None) is JSON
    assert encoding_named("bare") is BARE
    with pytest.raises(MalformedMessage):
        encoding_named("xml")


def test_errors_in_json_whatever_was_asked() -> None:
    """A server may always answer an error in JSON, which its content type tells."""
    error = HttpResponseError("g", "c", "m", {"x": b"\x01"})
    assert decode_http_error(BARE, "Application/JSON; charset=utf-8", JSON.encode_body(error)) == error
    assert decode_http_error(BARE, "application/octet-stream", BARE.encode_body(error)) == error


def test_input() -> None:
    """An actor's input is CBOR with pairs."""
    assert cbor.load(encode_value([b"\x01"]), FROM_SERVER) == [["$Uint8Array", "AQ=="]]
    assert cbor.load(encode_value(1), FROM_CLIENT) == 1


def test_bytes_as_bytes_for_a_client_that_takes_them() -> None:
    """In both directions and both binary encodings; for every other client the tagged pair, as ever."""
    data = bytes(range(256)) * 40
    event = Event("processOutput", ({"pid": 1, "data": data, "pair": ["$HOME", 1]},))
    for plain, native in ((BARE, BARE_BYTES), (CBOR, CBOR_BYTES)):
        frame, tagged = native.encode_frame(event), plain.encode_frame(event)
        assert isinstance(frame, bytes)
        assert isinstance(tagged, bytes)
        assert data in frame
        assert data not in tagged
        assert b"$Uint8Array" in tagged
        assert len(frame) < len(data) + 100
        for reader in (plain, native):
            assert reader.decode_to_client(frame) == event
            assert reader.decode_to_client(tagged) == event
        request = ActionRequest(1, "writeFile", ("p", data))
        assert plain.decode_to_server(native.encode_frame(request)) == request
        body = native.encode_body(HttpActionResponse(data))
        assert data in body
        assert plain.decode_body(HttpActionResponse, body).output == data
    assert encoding_named("bare", native_bytes=True) is BARE_BYTES
    assert encoding_named("cbor", native_bytes=True) is CBOR_BYTES
    assert encoding_named(None, native_bytes=True) is JSON
    assert encoding_named("bare") is BARE
