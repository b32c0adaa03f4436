"""Throws random and mutated input at every decoder of the wire, and says what came of it.

    python tests/property/wire/fuzz.py --inputs 1000000

The same seed makes the same inputs. Every input must give a value or MalformedMessage; anything else is
a failure, printed with the input, and the exit code is 1. So is an input that takes over a second.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

from agentos.wire import cbor, jsontext, keys
from agentos.wire.address import Action, ById, ByKey, Connect, Request, gateway_path, parse_address
from agentos.wire.client_connection import ClientConnection
from agentos.wire.connection import ServerConnection
from agentos.wire.encodings import BARE_BYTES, CBOR_BYTES, ENCODINGS, Encoding
from agentos.wire.malformed import FROM_CLIENT, MalformedMessage
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
from agentos.wire.terms import (
    Terms,
    headers_of_terms,
    subprotocols_of_terms,
    terms_of_headers,
    terms_of_subprotocols,
)
from agentos.wire.values import UNDEFINED, revive

SAMPLE: Any = {
    "text": "ü😀",
    "bytes": b"\x00\xff" * 9,
    "numbers": [0, -1, 300, 2**32, 2**53, 2**70, 0.5, 1e300],
    "pair": ["$HOME", ["$Set", 1]],
    "odd": [UNDEFINED, None, True, {1, "a"}, datetime(2024, 1, 1, tzinfo=UTC)],
}
ACTOR = ActorSpecifier("x0ekoxlgitdudmf2z5vcelegejcl00", 1, "probe/bare")
TO_SERVER = [ActionRequest(7, "exec", ("$HOME/x", SAMPLE)), SubscriptionRequest("processOutput", True)]
TO_CLIENT = [
    Init(ACTOR.actor_id, "9d711d9a"),
    Error("user", "my_code", "nope", {"a": SAMPLE}, 7, ACTOR),
    ActionResponse(7, SAMPLE),
    Event("processOutput", (SAMPLE,)),
]
BODIES = [
    HttpActionRequest(("echo", SAMPLE)),
    HttpActionResponse(SAMPLE),
    HttpResponseError("user", "my_code", "nope", SAMPLE, ACTOR),
    HttpQueueSendRequest(SAMPLE, "q", True, 100),
    HttpQueueSendResponse("completed", SAMPLE),
]
NATIVE = (
    "d840420708 d845440100ffff d855480000c03f00000040 d9010282016178 d90103a10102 c249010000000000000000 "
    "c11a00000001 f93c00 9f0102ff bf616101ff 7f61616162ff 5f41014102ff fb4278bcfe5687b000"
)

Decoder = Callable[[bytes], object]


def frames_to_server(encoding: Encoding) -> Decoder:
    """Decodes what a client sends, through the state of a connection."""
    return lambda data: ServerConnection(encoding, ACTOR, "c").receive(data)


def frames_to_client(encoding: Encoding) -> Decoder:
    """Decodes what a server sends, through the state of a connection."""

    def decode(data: bytes) -> object:
        client = ClientConnection(encoding)
        client.subscribe("processOutput")
        client.receive(encoding.encode_frame(Init("a", "b")))
        client.call("exec", ())
        return client.receive(data)

    return decode


def targets() -> Iterator[tuple[str, Decoder, list[bytes]]]:
    """Every decoder by its name, with valid inputs to start from."""
    every = {**ENCODINGS, "bare with bytes": BARE_BYTES, "cbor with bytes": CBOR_BYTES}
    for name, encoding in every.items():
        yield f"{name} to server", frames_to_server(encoding), [_bytes(encoding, one) for one in TO_SERVER]
        yield f"{name} to client", frames_to_client(encoding), [_bytes(encoding, one) for one in TO_CLIENT]
        for body in BODIES:
            kind: Any = type(body)
            decoder = _body_decoder(encoding, kind)
            yield f"{name} {kind.__name__}", decoder, [encoding.encode_body(body)]
    native = [bytes.fromhex(one) for one in NATIVE.split()] + [bytes.fromhex("8d" + NATIVE.replace(" ", ""))]
    yield "cbor value", lambda data: revive(cbor.load(data, FROM_CLIENT), 64), [cbor.dumps(SAMPLE), *native]
    yield "json value", lambda data: revive(jsontext.load(data, FROM_CLIENT), 64), [_json()]
    yield "address", _address, [_path(True), _path(False), b"/connect?x=1"]
    yield "headers", _headers, [_header_lines()]
    yield "subprotocols", _subprotocols, [",".join(subprotocols_of_terms(_terms())).encode()]
    yield "key", lambda data: keys.deserialize_key(data.decode("latin-1")), [b"a/b\\/c/\\0/\\\\"]


def _bytes(encoding: Encoding, message: Any) -> bytes:
    frame = encoding.encode_frame(message)
    return frame.encode() if isinstance(frame, str) else frame


def _json() -> bytes:
    return jsontext.dumps(SAMPLE).encode() + rb"  "


def _body_decoder(encoding: Encoding, kind: Any) -> Decoder:
    return lambda data: encoding.decode_body(kind, data)


def _path(create: bool) -> bytes:
    target = ByKey("vm", ("a", "b"), create, input={"a": 1} if create else UNDEFINED, token="t")
    return gateway_path(target, Action("fs.read") if create else Request("/a%20b"), "x=1&y=%20").encode()


def _address(data: bytes) -> object:
    path, _, query = data.partition(b"?")
    return parse_address(path, query), parse_address(path, query, ById("x")), Connect()


def _terms() -> Terms:
    return Terms(ENCODINGS["bare"], {"a": ["ü", 1]}, "token", "abc", True)


def _header_lines() -> bytes:
    return "\n".join(f"{name}:{value}" for name, value in headers_of_terms(_terms())).encode()


def _headers(data: bytes) -> object:
    lines = [line.partition(b":") for line in data.split(b"\n")]
    return terms_of_headers([(name, value) for name, _, value in lines])


def _subprotocols(data: bytes) -> object:
    return terms_of_subprotocols(data.decode("latin-1").split(","))


def random_input(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One input: now and then random bytes, mostly a valid one with a few changes."""
    if rng.random() < 0.15:
        return rng.randbytes(rng.randrange(80))
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        MUTATIONS[rng.randrange(len(MUTATIONS))](rng, data, seeds)
    return bytes(data)


def _flip(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice(_INTERESTING)


def _insert(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(_CHUNKS) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 9))


def _delete(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 1, 2, 9))]


def _cut(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _repeat(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    at, size = rng.randrange(len(data) + 1), rng.randrange(1, 20)
    data[at:at] = data[at : at + size] * rng.choice((1, 2, 70, 300))


def _splice(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    other = rng.choice(seeds)
    at, start = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
    data[at : at + rng.randrange(20)] = other[start : start + rng.randrange(40)]


MUTATIONS = (_flip, _set, _insert, _delete, _cut, _repeat, _splice)
_INTERESTING = bytes.fromhex(
    "00 01 04 17 18 1b 1c 1f 20 3b 40 5f 60 7f 80 9f a0 bf c0 c2 d8 d9 f7 f9 fb ff 22 5b 7b 25"
)
_CHUNKS = [
    *(
        bytes.fromhex(one)
        for one in ("9bffffffffffffffff", "bb00000000ffffffff", "5b7fffffffffffffff", "d81c")
    ),
    *(
        bytes.fromhex(one)
        for one in ("d8238161", "c4821b7fffffffffffffff01", "d90100", "ffffffffffffffff7f", "f97e00")
    ),
    *(
        b'["$BigInt","9"]',
        b'["$Set",[',
        b'["$Undefined",0]',
        b'["$$x",',
        b"1e999",
        b"\\ud800",
        b'"$Uint8Array"',
        b"NaN",
    ),
    *(
        b"%ff",
        b"&rvt-key=",
        b"rvt-",
        b"//",
        b"?",
        b"@",
        b"\\0",
        b"[" * 90,
        b'{"a":' * 90,
        b"\x81" * 90,
        b"9" * 4400,
    ),
]


def run(inputs: int, seed: int) -> int:
    """Feed `inputs` inputs to the decoders in turn; the number of failures."""
    rng = random.Random(seed)
    chosen = list(targets())
    for _, decode, seeds in chosen:
        for data in seeds:
            decode(data)  # what is valid has to be accepted, or the mutations would start from nothing
    accepted, refused, failures, slowest = Counter[str](), Counter[str](), 0, 0.0
    for number in range(inputs):
        name, decode, seeds = chosen[number % len(chosen)]
        data = random_input(rng, seeds)
        began = time.perf_counter()
        try:
            decode(data)
            accepted[name] += 1
        except MalformedMessage as problem:
            refused[name] += 1
            failures += _complain(name, data, "a long message") if len(str(problem)) > 240 else 0
        except Exception as problem:
            failures += _complain(name, data, f"{type(problem).__name__}: {problem}")
        took = time.perf_counter() - began
        slowest = max(slowest, took)
        failures += _complain(name, data, f"{took:.1f} s") if took > 1 else 0
    for name, _, _ in chosen:
        print(f"{name:32} accepted {accepted[name]:8} refused {refused[name]:8}")
    print(
        f"inputs {inputs}, seed {seed}: accepted {accepted.total()}, refused {refused.total()}, "
        f"failures {failures}, slowest {slowest * 1000:.1f} ms"
    )
    return failures


def _complain(name: str, data: bytes, what: str) -> int:
    print(f"FAILURE in {name}: {what}\n  input {data[:400].hex()}", file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    return 1 if run(options.inputs, options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
