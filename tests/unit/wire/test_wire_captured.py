"""What was recorded from real clients and servers is understood, and written the same way."""

from __future__ import annotations

import pytest
import wire_captured as captured

from agentos.wire import cbor
from agentos.wire.encodings import CBOR, ENCODINGS
from agentos.wire.malformed import FROM_CLIENT
from agentos.wire.messages import TO_SERVER, ActionRequest, ActionResponse
from agentos.wire.values import revive


def _name(one: captured.Captured) -> str:
    return f"{one.encoding} {one.name}"


@pytest.mark.parametrize("one", captured.BODIES, ids=_name)
def test_body(one: captured.Captured) -> None:
    """An HTTP body reads as the message, and the message is written as that body."""
    encoding = ENCODINGS[one.encoding]
    assert encoding.decode_body(type(one.message), one.data) == one.message
    assert encoding.encode_body(one.message).hex() == (one.ours or one.data).hex()
    assert encoding.decode_body(type(one.message), one.ours or one.data) == one.message


@pytest.mark.parametrize("one", captured.FRAMES, ids=_name)
def test_frame(one: captured.Captured) -> None:
    """A WebSocket frame reads as the message, and the message is written as that frame."""
    encoding = ENCODINGS[one.encoding]
    decode = encoding.decode_to_server if isinstance(one.message, TO_SERVER) else encoding.decode_to_client
    assert decode(one.data) == one.message
    written = encoding.encode_frame(one.message)
    assert isinstance(written, bytes) is encoding.binary
    assert (written if isinstance(written, bytes) else written.encode()) == (one.ours or one.data)


def test_id_as_a_pair() -> None:
    """In cbor, an id may come as a tagged pair, or as a short integer."""
    data = captured.CBOR_ACTION_RESPONSE_WITH_PAIR_AS_ID
    assert CBOR.decode_to_client(data) == ActionResponse(1, {"pid": 4242})
    short = cbor.dump({"body": {"tag": "ActionRequest", "val": {"id": 3, "name": "ps", "args": []}}})
    assert CBOR.decode_to_server(short) == ActionRequest(3, "ps")


@pytest.mark.parametrize("data", [captured.NATIVE_ARGS, captured.PAIRED_ARGS], ids=["native", "pairs"])
def test_arguments(data: bytes) -> None:
    """Bytes, undefined and bigints mean the same in CBOR's own words and as tagged pairs."""
    assert revive(cbor.load(data, FROM_CLIENT), 64) == captured.ARGS


def test_arguments_written() -> None:
    """What the server sends are pairs; a small integer is a number."""
    assert cbor.dumps(captured.ARGS[:3]).hex() == captured.PAIRED_ARGS.hex().replace("84", "83", 1)[:-22]
