"""Tagged pairs, numbers and bounds, format by format."""

from __future__ import annotations

import base64
import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest

from agentos.errors import InvalidRequest
from agentos.wire import cbor, jsontext
from agentos.wire.encodings import BARE, CBOR, ENCODINGS, JSON
from agentos.wire.malformed import FROM_CLIENT, FROM_SERVER, Bounds, MalformedMessage, malformed
from agentos.wire.messages import ActionResponse, HttpActionRequest, HttpActionResponse
from agentos.wire.values import SAFE_INTEGER, UNDEFINED, clean, decode_base64, revive


def _json(text: str) -> Any:
    return revive(jsontext.load(text, FROM_CLIENT), 64)


def _cbor(text: str) -> Any:
    return revive(cbor.load(bytes.fromhex(text), FROM_CLIENT), 64)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"\x00\xff", '["$Uint8Array","AP8="]'),
        (UNDEFINED, '["$Undefined",0]'),
        (SAFE_INTEGER, "9007199254740991"),
        (SAFE_INTEGER + 1, '["$BigInt","9007199254740992"]'),
        (-SAFE_INTEGER - 1, '["$BigInt","-9007199254740992"]'),
        ({5}, '["$Set",[5]]'),
        (["$HOME", 1], '["$$HOME",1]'),
        (["$$HOME", 1], '["$$$HOME",1]'),
        (["$BigInt", "5"], '["$$BigInt","5"]'),
        (["$HOME"], '["$HOME"]'),
        (["$HOME", 1, 2], '["$HOME",1,2]'),
        ({"$Set": 1}, '{"$Set":1}'),
        ([[b"", None]], '[[["$Uint8Array",""],null]]'),
    ],
)
def test_pairs(value: Any, text: str) -> None:
    """What JSON has no words for becomes a pair, and what only looks like one stays what it is."""
    assert jsontext.dumps(value) == text
    assert _json(text) == value
    assert revive(cbor.load(cbor.dumps(value), FROM_CLIENT), 64) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('["$BigInt",5]', 5),
        ('["$ArrayBuffer","AA=="]', b"\x00"),
        ('["$Uint8Array","-_8"]', b"\xfb\xff"),
        ('["$Other",1]', ["$Other", 1]),
        ('["$Set",[[1],2]]', [[1], 2]),
        ('["$Set",["$BigInt","5"]]', {"$BigInt", "5"}),
        ("5.0", 5),
        ("1e3", 1000),
        ("1e300", 1e300),
        (r'"\ud83d\ude00"', "😀"),
        (r'{"\ud800":["\udc00"]}', {"\ufffd": ["\ufffd"]}),
    ],
)
def test_foreign_json(text: str, value: Any) -> None:
    """Forms that other writers use are understood; a pair of unknown name is left alone."""
    assert _json(text) == value
    assert type(_json(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("fb4278bcfe5687b000", 1700000000123),
        ("f93c00", 1),
        ("9f0102ff", [1, 2]),
        ("bf616101ff", {"a": 1}),
        ("7f61616162ff", "ab"),
        ("5f41014102ff", b"\x01\x02"),
        ("d9010282016178", {1, "x"}),
        ("d90103a10102", {1: 2}),
        ("d845440100ffff", [1, 65535]),
        ("d84144010000ff", [256, 255]),
        ("d855480000c03f00000040", [1.5, 2]),
        ("d84842ff02", [-1, 2]),
        ("d84043010203", b"\x01\x02\x03"),
        ("c249010000000000000000", 2**64),
        ("c349010000000000000000", -(2**64) - 1),
        ("c11a00000001", datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)),
        ("c074313937302d30312d30315430303a30303a30315a", datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)),
        ("f7", UNDEFINED),
    ],
)
def test_foreign_cbor(text: str, value: Any) -> None:
    """CBOR's own words for what the protocol writes as pairs are understood."""
    assert _cbor(text) == value
    assert type(_cbor(text)) is type(value)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (7, "07"),
        (2**32 - 1, "1affffffff"),
        (-(2**32), "3affffffff"),
        (2**32, "fb41f0000000000000"),
        (-(2**32) - 1, "fbc1f0000000100000"),
        (1700000000123, "fb4278bcfe5687b000"),
        (2**53, cbor.dump(["$BigInt", str(2**53)]).hex()),
        (0.5, "fb3fe0000000000000"),
    ],
)
def test_numbers_in_cbor(number: float, text: str) -> None:
    """A number that JavaScript would take for a bigint is written so that it does not."""
    assert cbor.dumps(number).hex() == text
    assert _cbor(text) == number


def test_cbor_of_a_client_is_lenient() -> None:
    """A client's arrays in cbor are not marked: only what is certainly a pair is one."""
    args = ["$HOME/bin/x", {"cwd": ["$HOME", 1], "data": ["$Uint8Array", "AA=="], "odd": ["$BigInt", "x"]}]
    body = cbor.dump({"args": args})
    read = CBOR.decode_body(HttpActionRequest, body).args
    assert read == ("$HOME/bin/x", {"cwd": ["$HOME", 1], "data": b"\x00", "odd": ["$BigInt", "x"]})
    undefined = CBOR.decode_body(HttpActionRequest, cbor.dump({"args": ["$Undefined", 0]}))
    assert undefined.args == ("$Undefined", 0)


def test_what_is_no_number() -> None:
    """JSON has no infinity: it becomes null there, as in JavaScript."""
    assert jsontext.dumps([math.inf, math.nan]) == "[null,null]"
    assert cbor.load(cbor.dumps(math.inf), FROM_CLIENT) == math.inf


def test_times() -> None:
    """A point in time is ISO text in JSON and tag 1 in CBOR."""
    moment = datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=UTC)
    assert jsontext.dumps(moment) == '"2023-11-14T22:13:20.123Z"'
    assert cbor.load(cbor.dumps(moment), FROM_CLIENT) == moment


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, datetime(2024, 1, 1), 10**1001, 1j],
    ids=["object", "key", "naive time", "huge number", "complex"],
)
def test_cannot_be_sent(name: str, value: Any) -> None:
    """A value that no client could read is refused by its sender."""
    with pytest.raises(InvalidRequest):
        ENCODINGS[name].encode_frame(ActionResponse(0, [value]))


@pytest.mark.parametrize("name", ENCODINGS)
def test_lone_surrogates(name: str) -> None:
    """Text that UTF-8 cannot hold, such as an undecodable file name, is sent with U+FFFD."""
    body = ENCODINGS[name].encode_body(HttpActionResponse({"a\udc80": ["\udcff€"]}))
    assert ENCODINGS[name].decode_body(HttpActionResponse, body).output == {"a\ufffd": ["\ufffd€"]}


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("json", b'{"args":["a\\ud83d"]}'),
        ("cbor", b"\xa1\x64args\x81\x64a\xed\xa0\xbd"),
        ("bare", b"\x04\x00\x06\x81\x64a\xed\xa0\xbd"),
    ],
)
def test_half_of_a_pair(name: str, frame: bytes) -> None:
    """Text that JavaScript has cut within a character arrives, as U+FFFD, however its client encodes it."""
    assert list(ENCODINGS[name].decode_body(HttpActionRequest, frame).args) == ["a\ufffd"]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", ENCODINGS)
def test_depth_is_bounded(name: str) -> None:
    """A server sends up to 256 deep, a client 64; deeper is refused on either side."""
    encoding = ENCODINGS[name]
    frame = encoding.encode_frame(ActionResponse(0, _nested(250)))
    decoded = encoding.decode_to_client(frame)
    assert isinstance(decoded, ActionResponse)
    assert decoded.output == _nested(250)
    with pytest.raises(InvalidRequest):
        encoding.encode_frame(ActionResponse(0, _nested(257)))
    with pytest.raises(MalformedMessage):
        encoding.decode_body(HttpActionRequest, encoding.encode_body(HttpActionRequest((_nested(70),))))


@pytest.mark.parametrize("opening", ["[", '{"a":', '[["$Set",['], ids=["array", "object", "set"])
@pytest.mark.parametrize("depth", [500, 100_000])
def test_deep_json(opening: str, depth: int) -> None:
    """Depth that would exhaust the stack is an error like any other."""
    with pytest.raises(MalformedMessage):
        JSON.decode_to_server(opening * depth)


@pytest.mark.parametrize("head", ["81", "9f", "a100", "d90103", "d840", "c2", "d90102"])
def test_deep_cbor(head: str) -> None:
    """So it is in CBOR, tags included."""
    for data in (bytes.fromhex(head) * 100_000, bytes.fromhex(head) * 100_000 + b"\x00"):
        with pytest.raises(MalformedMessage):
            cbor.load(data, FROM_SERVER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0000",
        "1c",
        "9bffffffffffffffff",
        "bb7fffffffffffffff",
        "5bffffffffffffffff",
        "7b000000ffffffffff61",
        "5f01ff",
        "5f5f4100ffff",
        "7f4161ff",
        "1fff",
        "ff",
        "81ff",
        "bf01ff",
        "a1ff00",
        "a1810001",
        "a1c2410100",
        "61ff",
        "e0",
        "f820",
        "d82301",
        "d8236161",
        "c48201c24101",
        "d81c80",
        "d9010280d9",
        "d9010201",
        "d9010301",
        "d8454101",
        "d84c4101",
        "d84501",
        "c16161",
        "c1f97e00",
        "c1fb7fefffffffffffff",
        "c1c259019f" + "ff" * 415,
        "c06161",
        "c06a323032342d30312d3031",
        "c25901a1" + "ff" * 417,
    ],
)
def test_malformed_cbor(text: str) -> None:
    """What is broken, hostile or no part of the protocol is one kind of error."""
    with pytest.raises(MalformedMessage) as caught:
        cbor.load(bytes.fromhex(text), FROM_CLIENT)
    assert len(str(caught.value)) <= 240


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[Infinity]",
        "\ufeff1",
        "9" * 5000,
        '["$BigInt","x"]',
        '["$BigInt","٣"]',
        '["$BigInt","' + "9" * 1001 + '"]',
        '["$BigInt",1.5]',
        '["$Uint8Array","?"]',
        '["$Uint8Array","é"]',
        '["$Uint8Array",1]',
        '["$Undefined",{}]',
        '["$Set",1]',
    ],
)
def test_malformed_json(text: str) -> None:
    """The same for JSON and its tagged pairs."""
    with pytest.raises(MalformedMessage) as caught:
        _json(text)
    assert len(str(caught.value)) <= 240


def test_items_are_bounded() -> None:
    """A small message cannot stand for a great many values."""
    bounds = Bounds(bytes=10_000, items=100, depth=10)
    for data in ("[" + "[]," * 100 + "1]", "{" + '"a":1,' * 60 + '"a":1}'):
        with pytest.raises(MalformedMessage):
            jsontext.load(data, bounds)
    assert jsontext.load('["' + ",[{:" * 200 + '"]', bounds) == [",[{:" * 200]
    array, numbers = "98c8" + "80" * 200, "d84558ca" + "00" * 202
    for head in (array, numbers, "9f" + "00" * 200 + "ff", "5f" + "40" * 200 + "ff"):
        with pytest.raises(MalformedMessage):
            cbor.load(bytes.fromhex(head), bounds)
    for load in (jsontext.load, cbor.load):
        with pytest.raises(MalformedMessage):
            load(b"1" * 10_001, bounds)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[0,0]", 1 + 4 + 1), ('{"a":0}', 1 + 4 + 7), ('["a,b:[{","\\",[",0]', 1 + 4 + 2), ("[[],{}]", 1 + 12 + 1),
        ('"' + ",\\\\" * 700_000 + '"', 1), ('"' + ",\\n" * 700_000 + '"', 1), ('"' + ",é" * 700_000 + '"', 1),
        ('["' + "x" * (2**20 - 3) + '\\",,","' + "," * 2**20 + '"]', 1 + 4 + 1),
        ("[" + " " * 2**20 + "0," + " " * 2**20 + "0]", 1 + 4 + 1),
    ],
    ids=range(9),
)  # fmt: skip
def test_items_of_json_are_counted(text: str, items: int) -> None:
    """What is in strings does not count, wherever the text is cut to be looked at piece by piece."""
    json.loads(text)
    jsontext.load(text, Bounds(bytes=10**8, items=items, depth=9))
    with pytest.raises(MalformedMessage, match="values"):
        jsontext.load(text, Bounds(bytes=10**8, items=items - 1, depth=9))


@pytest.mark.parametrize("text", ['"abc', '"abc\\', '["a", "' + "\\" * 11, '"' * 11, '",' * 11, '"\\'])
def test_strings_without_an_end_are_counted_to_the_end(text: str) -> None:
    """However the text ends, that is malformed, and found in no more time than it takes to look at it once."""
    for items in (1, 3, 100):
        with pytest.raises(MalformedMessage):
            jsontext.load(text + "," * 5, Bounds(bytes=10**8, items=items, depth=9))


def test_long_base64_and_long_text() -> None:
    """Converted piece by piece, they are what they are when they are short."""
    data = bytes(range(256)) * 8192
    for size in (2**20 * 3 // 4, 2**20 * 3 // 4 + 1, 2**20, len(data)):
        text = base64.b64encode(data[:size]).decode()
        assert decode_base64(text, "x") == data[:size]
        assert decode_base64(text.rstrip("="), "x") == data[:size]
    for broken in ("A" * 2**20 + "=AAA", "AA==" + "A" * 2**20, "A" * 2**20 + "A", "A" * 2**20 + "é==="):
        with pytest.raises(MalformedMessage):
            decode_base64(broken, "x")
    long = "\ud800x" * (2**20 + 1)
    assert clean(long) == "\ufffdx" * (2**20 + 1)


def test_hashes_cannot_be_chosen() -> None:
    """Integers whose hashes are equal make no set: building it would take quadratic time."""
    equal = [n * (2**61 - 1) for n in range(10**6, 10**6 + 50_000)]
    assert jsontext.load(jsontext.dumps([0]), FROM_CLIENT) == [0]
    pairs = ",".join(f'["$BigInt","{n}"]' for n in equal)
    assert _json(f'["$Set",[{pairs}]]') == equal


def test_long_text_takes_linear_time() -> None:
    """Text of many megabytes is read in one piece."""
    text = "a" * (32 * 1024 * 1024)
    assert cbor.load(cbor.dump(text), FROM_CLIENT) == text


def test_message_is_bounded() -> None:
    """An error says little, however much was wrong."""
    assert len(malformed("x" * 10_000).message) == 240
    with pytest.raises(MalformedMessage) as caught:
        BARE.decode_to_server(b"\x09\x00" + b"x" * 1000)
    assert caught.value.code == "request.invalid"
