"""Frames and bodies of given clients and servers, recorded from real traffic: bytes, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentos.wire.messages import (
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

ACTOR_ID = "x0ekoxlgitdudmf2z5vcelegejcl00"
CONNECTION_ID = "9d711d9a-4d0f-4b3a-9e1e-7b1f5a3c2b0a"
ACTOR = ActorSpecifier(ACTOR_ID, 1, "probe/bare")
RAN = {"exitCode": 0, "stderr": "", "stdout": "ran echo hi"}
HI = {"pid": 4242, "stream": "stdout", "data": b"hi\n"}


@dataclass(frozen=True)
class Captured:
    """`ours` is what we write for it, where that is another form of the same (shorter map heads)."""

    name: str
    encoding: str
    data: bytes
    message: Any
    ours: bytes | None = None


def _hex(text: str) -> bytes:
    return bytes.fromhex(text)


def _text(text: str) -> str:
    return text.encode().hex()


_SPECIFIER = f"01 1e {_text(ACTOR_ID)} 01 01 0a 70726f62652f62617265"
_RAN = "66 7374646f7574 6b 72616e206563686f206869 66 737464657272 60 68 65786974436f6465 00"
_HI_ARGS = "63706964191092 6673747265616d 667374646f7574 6464617461 826b2455696e74384172726179 6461476b4b"

BARE_BODIES = [
    Captured("request", "bare", _hex("0400 09 81 67 6563686f206869"), HttpActionRequest(("echo hi",))),
    Captured(
        "response",
        "bare",
        _hex(f"0400 28 b90003 {_RAN}"),
        HttpActionResponse({"stdout": "ran echo hi", "stderr": "", "exitCode": 0}),
        _hex(f"0400 26 a3 {_RAN}"),
    ),
    Captured("null", "bare", _hex("0400 01 f6"), HttpActionResponse(None)),
    Captured(
        "undefined", "bare", _hex("0400 0d 82 6a 24556e646566696e6564 00"), HttpActionResponse(UNDEFINED)
    ),
    Captured(
        "error",
        "bare",
        _hex(f"0400 04 75736572 07 6d795f636f6465 04 6e6f7065 01 0a a26161016162a1613009 {_SPECIFIER}"),
        HttpResponseError("user", "my_code", "nope", {"a": 1, "b": {"0": 9}}, ACTOR),
    ),
    Captured(
        "queue request",
        "bare",
        _hex("0400 06 b90001616101 01 03 6d7971 01 01 01 6400000000000000"),
        HttpQueueSendRequest({"a": 1}, "myq", True, 100),
        _hex("0400 04 a1616101 01 03 6d7971 01 01 01 6400000000000000"),
    ),
    Captured(
        "queue response",
        "bare",
        _hex("0400 09 636f6d706c65746564 00"),
        HttpQueueSendResponse("completed"),
    ),
]

BARE_FRAMES = [
    Captured(
        "init",
        "bare",
        _hex(f"0400 00 1e {_text(ACTOR_ID)} 24 {_text(CONNECTION_ID)}"),
        Init(ACTOR_ID, CONNECTION_ID),
    ),
    Captured(
        "subscribe",
        "bare",
        _hex("0400 01 0d 70726f636573734f7574707574 01"),
        SubscriptionRequest("processOutput", True),
    ),
    Captured(
        "action",
        "bare",
        _hex("0400 00 00 05 737061776e 0c 82 64 6e6f6465 82 62 2d65 61 31"),
        ActionRequest(0, "spawn", ("node", ["-e", "1"])),
    ),
    Captured(
        "action response",
        "bare",
        _hex("0400 02 00 0a b90001 63 706964 191092"),
        ActionResponse(0, {"pid": 4242}),
        _hex("0400 02 00 08 a1 63 706964 191092"),
    ),
    Captured(
        "event",
        "bare",
        _hex(f"0400 03 0d 70726f636573734f7574707574 30 81 b90003 {_HI_ARGS}"),
        Event("processOutput", (HI,)),
        _hex(f"0400 03 0d 70726f636573734f7574707574 2e 81 a3 {_HI_ARGS}"),
    ),
    Captured(
        "action error",
        "bare",
        _hex(
            "0400 01 08 72697665746b6974 0e 696e7465726e616c5f6572726f72 1a"
            f"{_text('An internal error occurred')} 00 01 05 {_SPECIFIER}"
        ),
        Error("rivetkit", "internal_error", "An internal error occurred", None, 5, ACTOR),
    ),
]

CBOR_BODIES = [
    Captured(
        "request",
        "cbor",
        _hex("b90001 64 61726773 81 67 6563686f206869"),
        HttpActionRequest(("echo hi",)),
        _hex("a1 64 61726773 81 67 6563686f206869"),
    ),
    Captured(
        "response",
        "cbor",
        _hex(
            "a1 66 6f7574707574 a3 68 65786974436f6465 00 66 737464657272 60"
            "66 7374646f7574 6b 72616e206563686f206869"
        ),
        HttpActionResponse(RAN),
    ),
]

_CBOR_ACTION = "646e616d65 65737061776e 6461726773 82 646e6f6465 82 622d65 6131"
CBOR_FRAMES = [
    Captured(
        "action",
        "cbor",
        _hex(
            "b90001 64626f6479 b90002 63746167 6d416374696f6e52657175657374 6376616c b90003"
            f"626964 1b0000000000000000 {_CBOR_ACTION}"
        ),
        ActionRequest(0, "spawn", ("node", ["-e", "1"])),
        _hex(
            "a1 64626f6479 a2 63746167 6d416374696f6e52657175657374 6376616c a3"
            f"626964 1b0000000000000000 {_CBOR_ACTION}"
        ),
    ),
    Captured(
        "action response",
        "cbor",
        _hex(
            "a1 64626f6479 a2 63746167 6e416374696f6e526573706f6e7365 6376616c a2"
            "626964 1b0000000000000000 666f7574707574 b90001 63706964 191092"
        ),
        ActionResponse(0, {"pid": 4242}),
        _hex(
            "a1 64626f6479 a2 63746167 6e416374696f6e526573706f6e7365 6376616c a2"
            "626964 1b0000000000000000 666f7574707574 a1 63706964 191092"
        ),
    ),
]

CBOR_ACTION_RESPONSE_WITH_PAIR_AS_ID = _hex(
    "a1 64626f6479 a2 63746167 6e416374696f6e526573706f6e7365 6376616c a2"
    "626964 82 67 24426967496e74 61 31 666f7574707574 a1 63706964 191092"
)

NATIVE_ARGS = _hex("84 d840420708 4109 f7 1b0000000000000005")
PAIRED_ARGS = _hex(
    "84 82 6b2455696e74384172726179 644277673d 82 6b2455696e74384172726179 6443513d3d"
    "82 6a24556e646566696e6564 00 82 6724426967496e74 6135"
)
ARGS = [b"\x07\x08", b"\x09", UNDEFINED, 5]

JSON_BODIES = [
    Captured("request", "json", b'{"args":["echo hi"]}', HttpActionRequest(("echo hi",))),
    Captured(
        "response",
        "json",
        b'{"output":{"exitCode":0,"stderr":"","stdout":"ran echo hi"}}',
        HttpActionResponse(RAN),
    ),
    Captured("undefined", "json", b'{"output":["$Undefined",0]}', HttpActionResponse(UNDEFINED)),
    Captured(
        "bytes", "json", b'{"output":["$Uint8Array","AAEC+v8="]}', HttpActionResponse(b"\x00\x01\x02\xfa\xff")
    ),
    Captured(
        "big integer",
        "json",
        b'{"output":["$BigInt","12345678901234567890"]}',
        HttpActionResponse(12345678901234567890),
    ),
]

JSON_FRAMES = [
    Captured(
        "init",
        "json",
        b'{"body":{"tag":"Init","val":{"actorId":"5ncw","connectionId":"9db83d9a-"}}}',
        Init("5ncw", "9db83d9a-"),
    ),
    Captured(
        "subscribe",
        "json",
        b'{"body":{"tag":"SubscriptionRequest","val":{"eventName":"processOutput","subscribe":true}}}',
        SubscriptionRequest("processOutput", True),
    ),
    Captured(
        "action",
        "json",
        b'{"body":{"tag":"ActionRequest","val":'
        b'{"id":["$BigInt","0"],"name":"spawn","args":["node",["-e","1"]]}}}',
        ActionRequest(0, "spawn", ("node", ["-e", "1"])),
    ),
    Captured(
        "action response",
        "json",
        b'{"body":{"tag":"ActionResponse","val":{"id":["$BigInt","0"],"output":{"pid":4242}}}}',
        ActionResponse(0, {"pid": 4242}),
    ),
    Captured(
        "event",
        "json",
        b'{"body":{"tag":"Event","val":{"args":'
        b'[{"data":["$Uint8Array","aGkK"],"pid":4242,"stream":"stdout"}],"name":"processOutput"}}}',
        Event("processOutput", ({"data": b"hi\n", "pid": 4242, "stream": "stdout"},)),
    ),
    Captured(
        "action error",
        "json",
        b'{"body":{"tag":"Error","val":{"actionId":["$BigInt","4"],'
        b'"actor":{"actorId":"5ncw","generation":1,"key":"probe/json"},'
        b'"code":"my_code","group":"user","message":"nope","metadata":{"a":1}}}}',
        Error("user", "my_code", "nope", {"a": 1}, 4, ActorSpecifier("5ncw", 1, "probe/json")),
        b'{"body":{"tag":"Error","val":{"actionId":["$BigInt","4"],'
        b'"actor":{"actorId":"5ncw","generation":1,"key":"probe/json"},'
        b'"code":"my_code","group":"user","message":"nope","metadata":{"a":1}}}}',
    ),
]

BODIES = BARE_BODIES + CBOR_BODIES + JSON_BODIES
FRAMES = BARE_FRAMES + CBOR_FRAMES + JSON_FRAMES
