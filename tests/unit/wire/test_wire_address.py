"""Keys, paths, queries, headers and subprotocols."""

from __future__ import annotations

import pytest

from agentos.errors import InvalidRequest
from agentos.wire import keys
from agentos.wire.address import (
    Action,
    Address,
    ById,
    ByKey,
    Connect,
    Health,
    Metadata,
    Queue,
    Request,
    Unknown,
    WebSocket,
    gateway_path,
    parse_address,
)
from agentos.wire.encodings import BARE, BARE_BYTES, CBOR, JSON
from agentos.wire.malformed import MalformedMessage
from agentos.wire.terms import (
    SUBPROTOCOL,
    Terms,
    bearer_token,
    headers_of_terms,
    select_subprotocol,
    subprotocols_of_terms,
    terms_of_headers,
    terms_of_subprotocols,
)
from agentos.wire.values import UNDEFINED

KEYS = [
    ((), "/", None),
    (("",), "\\0", ""),
    (("a", "b/c"), "a/b\\/c", "a,b/c"),
    (("a,b",), "a,b", "a,b"),
    (("a\\b",), "a\\\\b", "a\\b"),
    (("/",), "\\/", "/"),
    (("", ""), "\\0/\\0", ","),
    (("0",), "0", "0"),
]


@pytest.mark.parametrize(("key", "text", "query"), KEYS)
def test_keys(key: keys.Key, text: str, query: str | None) -> None:
    """A key as text is unambiguous in the management API; in a query, commas are lost."""
    assert keys.serialize_key(key) == text
    assert keys.deserialize_key(text) == key
    assert keys.query_key(key) == query
    assert (keys.read_query_key(query) == key) is keys.survives_query(key)


@pytest.mark.parametrize(
    ("text", "key"), [("", ()), ("a/", ("a", "")), ("a\\", ("a\\",)), ("\\", ("\\",)), ("\\x", ("x",))]
)
def test_any_text_is_a_key(text: str, key: keys.Key) -> None:
    """Every text stands for some key, as with given servers."""
    assert keys.deserialize_key(text) == key


def test_as_key() -> None:
    """Text is a key of one element, nothing is the empty key."""
    assert keys.as_key("a") == ("a",)
    assert keys.as_key(None) == ()
    assert keys.as_key(["a", "b"]) == ("a", "b")
    with pytest.raises(InvalidRequest):
        keys.as_key(["a", 1])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest):
        keys.as_key(5)  # type: ignore[arg-type]


GET = "rvt-namespace=default&rvt-method=get"
CREATE = "rvt-namespace=default&rvt-method=getOrCreate&rvt-runner=default"


def _parse(url: str, direct: ById | None = None) -> Address | None:
    path, _, query = url.partition("?")
    return parse_address(path.encode(), query.encode(), direct)


def test_captured_query_form() -> None:
    """The request of a given client is understood, and made the same way."""
    url = f"/gateway/vm/action/exec?{CREATE}&rvt-key=probe%2Cbare&rvt-crash-policy=sleep"
    target = ByKey("vm", ("probe", "bare"), True, pool="default", crash_policy="sleep")
    assert _parse(url) == Address(target, Action("exec"))
    assert gateway_path(target, Action("exec")) == url


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/action/fs.readdir", Action("fs.readdir")),
        ("/action/a%2Fb", Action("a/b")),
        ("/action/", Unknown("/action/")),
        ("/action/a/b", Unknown("/action/a/b")),
        ("/connect", Connect()),
        ("/connect/x", Unknown("/connect/x")),
        ("/request/a%2Fb/c", Request("/a%2Fb/c")),
        ("/request", Request("/")),
        ("/websocket/x", WebSocket("/x")),
        ("/queue/my%20queue", Queue("my queue")),
        ("/health", Health()),
        ("/metadata", Metadata()),
        ("/dynamic/reload", Unknown("/dynamic/reload")),
        ("", Unknown("/")),
    ],
)
def test_what_is_asked(path: str, asked: object) -> None:
    """The rest of the path says what is wanted, in either form of the address."""
    assert _parse(f"/gateway/abc{path}") == Address(ById("abc"), asked)  # type: ignore[arg-type]
    assert _parse(f"/gateway/vm{path}?{GET}") == Address(ByKey("vm"), asked)  # type: ignore[arg-type]


def test_names_are_decoded_after_splitting() -> None:
    """A name, an id and a token may hold slashes and at signs, encoded."""
    named = _parse(f"/gateway/we%20ird%2Fn%C3%A4me/connect?{GET}")
    assert named == Address(ByKey("we ird/näme"), Connect())
    by_id = _parse("/gateway/id%401@to%2Fk%40en/connect?x=1&x=2")
    assert by_id == Address(ById("id@1", "to/k@en"), Connect(), "x=1&x=2")


@pytest.mark.parametrize(
    ("query", "own"),
    [
        (f"a=1&b=%20+&{GET}", "a=1&b=%20+"),
        (f"{GET}&a", "a"),
        (f"a=%zz%ff&&{GET}&=&b=ä", "a=%zz%ff&&=&b=ä"),
        (GET, ""),
    ],
)
def test_own_query_is_kept(query: str, own: str) -> None:
    """The caller's query goes on byte for byte, without the reserved parameters."""
    parsed = parse_address(b"/gateway/vm/request/", query.encode())
    assert parsed is not None
    assert parsed.query.encode("latin-1") == own.encode()


@pytest.mark.parametrize(
    ("query", "key"), [("&rvt-key=", ("",)), ("", ()), ("&rvt-key=a+b%2Cc", ("a b", "c"))]
)
def test_query_key(query: str, key: keys.Key) -> None:
    """A key that is present but empty is one empty element."""
    parsed = _parse(f"/gateway/vm/connect?{GET}{query}")
    assert parsed == Address(ByKey("vm", key), Connect())


@pytest.mark.parametrize(
    "url",
    [
        f"/gateway/vm/connect?{GET}&rvt-key=a&rvt-key=a",
        f"/gateway/vm/connect?{GET}&rvt-what=1",
        f"/gateway/vm/connect?{GET}&%72vt-key=a&rvt-key=a",
        "/gateway/vm/connect?rvt-namespace=default",
        "/gateway/vm/connect?rvt-method=delete",
        f"/gateway/vm/connect?{GET}&rvt-input=oA",
        f"/gateway/vm/connect?{CREATE}&rvt-pool=x",
        f"/gateway/vm/connect?{CREATE}&rvt-input=_",
        f"/gateway/vm/connect?{CREATE}&rvt-input=!!!!",
        f"/gateway/vm/connect?{GET}&rvt-key=%ff",
        f"/gateway/vm/connect?{GET}&rvt-skip-ready-wait=maybe",
        f"/gateway//connect?{GET}",
        f"/gateway/%ff/connect?{GET}",
        "/gateway//connect",
        "/gateway/@token/connect",
        "/gateway/a@%ff/connect",
        "/gateway/a/action/%ff",
    ],
)
def test_malformed_addresses(url: str) -> None:
    """Doubled, unknown, missing or undecodable parts are refused."""
    with pytest.raises(MalformedMessage):
        _parse(url)


def test_all_parameters() -> None:
    """Everything that a query says about the actor to make goes there and back."""
    target = ByKey(
        "vm", ("a b", "ü"), True, "ns", "pool", "eu", "restart", {"data": b"\x01", "n": [2**60]}, "t/k", True
    )
    path = gateway_path(target, Request("/x"), "q=1")
    assert _parse(path) == Address(target, Request("/x"), "q=1")
    assert path.startswith(
        "/gateway/vm/request/x?q=1&rvt-namespace=ns&rvt-method=getOrCreate&rvt-runner=pool"
    )
    with pytest.raises(InvalidRequest):
        gateway_path(ByKey("vm", ("a,b",)), Connect())


def test_not_an_address() -> None:
    """Any other path is none of the gateway's, unless headers name the actor."""
    assert _parse("/metadata") is None
    assert _parse("/gateway") is None
    direct = ById("abc", None, True)
    assert _parse("/connect?x=1", direct) == Address(direct, Connect(), "x=1")
    assert _parse("/gateway/xyz/action/exec", direct) == Address(ById("xyz", None, True), Action("exec"))


def test_headers() -> None:
    """An HTTP request says in headers what its address does not."""
    terms = terms_of_headers(
        [
            (b"X-Rivet-Encoding", b"cbor"),
            (b"x-rivet-conn-params", '{"name":"ü"}'.encode("latin-1")),
            (b"x-rivet-token", b"secret"),
            (b"x-rivet-target", b"actor"),
            (b"x-rivet-actor", b"abc"),
            (b"x-rivet-skip-ready-wait", b"1"),
        ]
    )
    assert terms == Terms(CBOR, {"name": "ü"}, "secret", "abc", True)
    assert terms.direct == ById("abc", "secret", True)
    assert terms_of_headers([(b"x-rivet-actor", b"abc")]) == Terms(JSON)
    assert terms_of_headers([(b"authorization", b"Bearer tok")]).token == "tok"
    raw = [(name.encode(), value.encode("ascii")) for name, value in headers_of_terms(terms)]
    assert terms_of_headers(raw) == terms


@pytest.mark.parametrize(
    ("header", "token"),
    [(None, None), ("Bearer  x ", "x"), ("bearer x", "x"), ("Basic x", None), ("Bearer", None)],
)
def test_bearer_token(header: str | None, token: str | None) -> None:
    """Only the Bearer scheme carries a token."""
    assert bearer_token(header) == token


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-rivet-encoding", b"xml")],
        [(b"x-rivet-conn-params", b"{")],
        [(b"x-rivet-conn-params", b"[" * 70_000)],
        [(b"x-rivet-target", b"actor")],
        [(b"x-rivet-target", b"runner"), (b"x-rivet-actor", b"a")],
    ],
)
def test_malformed_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """What a header says has to make sense."""
    with pytest.raises(MalformedMessage):
        terms_of_headers(headers)


def test_subprotocols() -> None:
    """A handshake says it in the subprotocols that it offers."""
    terms = Terms(BARE, {"name": "ü (1)"}, "tok", "abc", True)
    offered = subprotocols_of_terms(terms)
    assert offered[:6] == [
        "rivet",
        "rivet_encoding.bare",
        "rivet_target.actor",
        "rivet_actor.abc",
        "rivet_token.tok",
        "rivet_skip_ready_wait",
    ]
    assert not set("".join(offered)) & set('(){}[]<>@,;:\\"/?= ')
    assert terms_of_subprotocols(offered) == terms
    assert terms_of_subprotocols([]) == Terms(JSON, UNDEFINED)
    assert select_subprotocol([" rivet", "x"]) == SUBPROTOCOL
    assert select_subprotocol(["x"]) is None
    native = subprotocols_of_terms(Terms(BARE_BYTES))
    assert native == ["rivet", "rivet_encoding.bare", "agentos_bytes.native"]
    assert terms_of_subprotocols(native) == Terms(BARE_BYTES)
    assert terms_of_subprotocols(["rivet", "rivet_encoding.bare", "agentos_bytes.other"]) == Terms(BARE)
    raw = [(name.encode(), value.encode()) for name, value in headers_of_terms(Terms(BARE_BYTES))]
    assert terms_of_headers(raw) == Terms(BARE_BYTES)
    for bad in ("rivet_encoding.xml", "rivet_conn_params.%ff", "rivet_conn_params.{", "rivet_target.actor"):
        with pytest.raises(MalformedMessage):
            terms_of_subprotocols([bad])
