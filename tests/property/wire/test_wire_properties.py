"""What holds for every value, every message and every sequence of bytes."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Any

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentos.wire import cbor, jsontext, keys
from agentos.wire.address import (
    Action,
    Address,
    ById,
    ByKey,
    Connect,
    Queue,
    Request,
    WebSocket,
    gateway_path,
    parse_address,
)
from agentos.wire.encodings import BARE_BYTES, CBOR, CBOR_BYTES, ENCODINGS, JSON, Encoding
from agentos.wire.malformed import FROM_CLIENT, MalformedMessage
from agentos.wire.messages import (
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
from agentos.wire.terms import (
    Terms,
    headers_of_terms,
    subprotocols_of_terms,
    terms_of_headers,
    terms_of_subprotocols,
)
from agentos.wire.values import UNDEFINED, encode_tree, revive

TAG_LIKE = st.sampled_from(["$", "$$", "$HOME", "$Set", "$$Set", "$BigInt", "$Undefined", "$Uint8Array"])
TEXT = st.text() | TAG_LIKE
INTEGERS = st.integers(-(10**40), 10**40) | st.integers(-(2**33), 2**33) | st.integers(2**53 - 3, 2**53 + 3)
FLOATS = st.floats(allow_nan=False, allow_infinity=False).filter(lambda one: not one.is_integer())
TIMES = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)).map(
    lambda moment: moment.replace(microsecond=0)
)
SCALARS = st.none() | st.booleans() | TEXT | st.binary() | INTEGERS | FLOATS | st.just(UNDEFINED)
MEMBERS = st.none() | TEXT | st.binary() | st.integers(2, 2**60)


def _nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.tuples(TAG_LIKE, inner).map(list)
            | st.dictionaries(TEXT, inner, max_size=4)
        ),
        max_leaves=12,
    )


VALUES = _nested(SCALARS | st.sets(MEMBERS, max_size=4))


class Named(StrEnum):
    """Text of a class of its own."""

    PLAIN = "plain"
    TAG = "$Set"


class Coloured(str):
    """Text whose `str` is another one."""

    def __str__(self) -> str:
        return "$Set"


class Counted(IntEnum):
    """A number of a class of its own."""

    FEW = 3
    MANY = 2**60


HALVES = st.sampled_from(["\ud800", "a\udc80", "a\udcff", "$\udc80", "\ufffd"])
ODD_SCALARS = (
    SCALARS
    | TIMES
    | HALVES
    | st.floats()
    | st.sampled_from([*Named, Coloured("red"), *Counted])
    | st.binary().map(bytearray)
)
ODD_VALUES = st.recursive(
    ODD_SCALARS | st.frozensets(MEMBERS | HALVES, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=30)
        | st.lists(inner, max_size=4).map(tuple)
        | st.tuples(TAG_LIKE | HALVES | st.sampled_from([*Named, Coloured("red")]), inner)
        | st.dictionaries(TEXT | HALVES, inner, max_size=30)
        | st.dictionaries(TEXT, inner, max_size=4).map(MappingProxyType)
    ),
    max_leaves=40,
)
"""What can be written besides what comes back as it was."""
PLAIN = st.recursive(
    st.none() | st.booleans() | st.text() | st.binary() | INTEGERS,
    lambda inner: st.lists(inner, min_size=3, max_size=5) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
"""Values that hold nothing that looks like a pair, for a client's cbor, which does not tell them apart."""
IDS = st.integers(0, 2**64 - 1)
ACTORS = st.none() | st.builds(ActorSpecifier, st.text(), st.integers(0, 2**53 - 1), st.none() | st.text())
ENCODING = st.sampled_from([*ENCODINGS.values(), BARE_BYTES, CBOR_BYTES])


def _messages(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    args = st.lists(values, max_size=4).map(tuple)
    metadata = values.filter(lambda one: one is not UNDEFINED)
    return st.one_of(
        st.builds(Init, st.text(), st.text()),
        st.builds(Error, st.text(), st.text(), st.text(), metadata, st.none() | IDS, ACTORS),
        st.builds(ActionResponse, IDS, values),
        st.builds(Event, st.text(), args),
        st.builds(ActionRequest, IDS, st.text(), args),
        st.builds(SubscriptionRequest, st.text(), st.booleans()),
    )


def _bodies(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    present = values.filter(lambda one: one is not UNDEFINED)
    return st.one_of(
        st.builds(HttpActionRequest, st.lists(values, max_size=4).map(tuple)),
        st.builds(HttpActionResponse, values),
        st.builds(HttpResponseError, st.text(), st.text(), st.text(), present, ACTORS),
        st.builds(
            HttpQueueSendRequest,
            values,
            st.none() | st.text(),
            st.none() | st.booleans(),
            st.none() | st.integers(0, 2**53 - 1),
        ),
        st.builds(HttpQueueSendResponse, st.text(), present),
    )


def _decoded(encoding: Encoding, message: Any, frame: Any) -> Any:
    decode = encoding.decode_to_server if isinstance(message, TO_SERVER) else encoding.decode_to_client
    return decode(frame)


@given(VALUES)
def test_values(value: Any) -> None:
    """Every value goes through JSON and through CBOR, pair-like arrays included."""
    assert revive(jsontext.load(jsontext.dumps(value), FROM_CLIENT), 64) == value
    assert revive(cbor.load(cbor.dumps(value), FROM_CLIENT), 64) == value


@given(_nested(SCALARS | TIMES))
def test_native_values(value: Any) -> None:
    """CBOR's own words carry every value, where arrays that look like pairs are left alone."""
    assert cbor.load(cbor.dumps(value, cbor.NATIVE), FROM_CLIENT) == value


@given(st.sampled_from([cbor.PAIRS, cbor.BYTES, cbor.NATIVE]), ODD_VALUES)
def test_values_are_written_as_their_trees(form: cbor.PairsForm, value: Any) -> None:
    """What is written in one pass over a value are the bytes of the tree that is made of it."""
    assert cbor.dumps(value, form) == cbor.dump(encode_tree(value, form))


@given(st.floats())
def test_floats(value: float) -> None:
    """A float arrives as a number of equal value, in JSON only where it is one."""
    back = cbor.load(cbor.dumps(value), FROM_CLIENT)
    assert back == value or (math.isnan(value) and math.isnan(back))
    in_json = jsontext.load(jsontext.dumps(value), FROM_CLIENT)
    assert in_json == value if math.isfinite(value) else in_json is None


@given(st.sampled_from([JSON, ENCODINGS["bare"], BARE_BYTES]), _messages(VALUES))
def test_frames(encoding: Encoding, message: Any) -> None:
    """Every message goes through a frame of json and of bare."""
    assert _decoded(encoding, message, encoding.encode_frame(message)) == message


@given(_messages(PLAIN))
def test_cbor_frames(message: Any) -> None:
    """And through cbor, as far as a client's arrays do not look like pairs."""
    assert _decoded(CBOR, message, CBOR.encode_frame(message)) == message


@given(st.sampled_from([JSON, ENCODINGS["bare"], BARE_BYTES]), _bodies(VALUES))
def test_bodies(encoding: Encoding, message: Any) -> None:
    """Every body goes through json and bare."""
    assert encoding.decode_body(type(message), encoding.encode_body(message)) == message


@given(_bodies(PLAIN))
def test_cbor_bodies(message: Any) -> None:
    """And through cbor."""
    assert CBOR.decode_body(type(message), CBOR.encode_body(message)) == message


@given(VALUES)
def test_server_values_in_cbor(value: Any) -> None:
    """What a server sends in cbor is unambiguous whatever it looks like."""
    assert CBOR.decode_to_client(CBOR.encode_frame(ActionResponse(1, value))) == ActionResponse(1, value)


TARGETS = {name: (decode, seeds) for name, decode, seeds in fuzz.targets()}


def _survives(name: str, data: bytes) -> None:
    decode, _ = TARGETS[name]
    said = ""
    try:
        decode(data)
    except MalformedMessage as problem:
        said = problem.message
    assert len(said) <= 240


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=200))
def test_any_bytes(name: str, data: bytes) -> None:
    """Whatever bytes come, a decoder answers a value or MalformedMessage."""
    _survives(name, data)


@pytest.mark.parametrize("name", TARGETS)
@given(random=st.randoms(use_true_random=False))
def test_any_mutation(name: str, random: Any) -> None:
    """So it does for what was valid before a few bytes of it were changed."""
    _survives(name, fuzz.random_input(random, TARGETS[name][1]))


@given(st.text())
def test_any_text(text: str) -> None:
    """Text frames are no exception."""
    for encoding in ENCODINGS.values():
        for decode in (encoding.decode_to_server, encoding.decode_to_client):
            with pytest.raises(MalformedMessage):
                decode(text)


@given(st.lists(st.text()))
def test_keys(key: list[str]) -> None:
    """Every key survives its text; a query's form loses only commas."""
    assert keys.deserialize_key(keys.serialize_key(key)) == tuple(key)
    assert (keys.read_query_key(keys.query_key(key)) == tuple(key)) is keys.survives_query(key)


@given(st.text())
def test_any_key_text(text: str) -> None:
    """Any text is a key, whose own text gives that key again."""
    key = keys.deserialize_key(text)
    assert keys.deserialize_key(keys.serialize_key(key)) == key


NAMES = st.text(min_size=1)
ASKED = st.one_of(
    st.builds(Action, NAMES),
    st.builds(Queue, NAMES),
    st.just(Connect()),
    st.sampled_from([Request("/"), Request("/a%2Fb/c"), WebSocket("/x//y")]),
)
TOKENS = st.none() | st.text()
KEYS = st.lists(st.text().filter(lambda one: "," not in one), max_size=3).map(tuple)
OWN_QUERIES = st.sampled_from(["", "a=1", "a=%20+&b", "&&x=rvt-key=1"])


@given(
    st.builds(
        ByKey,
        NAMES,
        KEYS,
        st.just(True),
        NAMES,
        NAMES,
        st.none() | st.text(),
        NAMES,
        VALUES,
        TOKENS,
        st.booleans(),
    )
    | st.builds(ByKey, NAMES, KEYS, namespace=NAMES, token=TOKENS, skip_ready_wait=st.booleans())
    | st.builds(ById, NAMES, TOKENS),
    ASKED,
    OWN_QUERIES,
)
def test_addresses(target: Any, asked: Any, query: str) -> None:
    """An address is read from its path and query as it was."""
    path, _, raw_query = gateway_path(target, asked, query).partition("?")
    assert path.isascii()
    assert parse_address(path.encode(), raw_query.encode()) == Address(target, asked, query)


@given(
    st.builds(
        Terms,
        ENCODING,
        st.just(UNDEFINED) | st.dictionaries(st.text(), st.text() | st.integers(-99, 99), max_size=3),
        st.just("token"),
        st.just("abc"),
        st.booleans(),
    )
)
def test_terms(terms: Terms) -> None:
    """What headers or subprotocols say is read as it was meant."""
    headers = [(name.encode(), value.encode("ascii")) for name, value in headers_of_terms(terms)]
    assert terms_of_headers(headers) == terms
    assert terms_of_subprotocols(subprotocols_of_terms(terms)) == terms
