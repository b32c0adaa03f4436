"""Who may use a server: every way in which a browser, another machine or a wrong token asks for it."""

from __future__ import annotations

from typing import Any

import pytest

from agentos.errors import InvalidRequest, Unauthorized
from agentos.server.access import Access
from agentos.server.http import Request
from agentos.server.settings import Settings, is_loopback

LOCAL = ("127.0.0.1", 40_000)


def request(host: str | None = "localhost:6420", peer: Any = LOCAL, **headers: str) -> Request:
    """A request as the ASGI server hands it over."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if host is not None:
        given["host"] = host
    raw = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    return Request({"type": "http", "path": "/actors", "headers": raw, "client": peer})


def allowed(access: Access, one: Request, *tokens: str | None) -> bool:
    """Whether it may."""
    try:
        access.check(one, *tokens)
    except Unauthorized:
        return False
    return True


@pytest.mark.parametrize(
    "good",
    [
        request(),
        request("127.0.0.1"),
        request("127.0.0.1:80"),
        request("LOCALHOST:6420"),
        request("[::1]:6420", ("::1", 5, 0, 0)),
        request(peer=("::ffff:127.0.0.1", 5)),
        request(peer=None),
        request(origin="http://localhost:6420"),
        request("[::1]:6420", origin="http://[::1]:6420"),
        request(sec_fetch_site="none"),
        request(sec_fetch_site="same-origin"),
    ],
)
def test_programs_and_own_pages_of_this_machine_may(good: Request) -> None:
    """Without a token."""
    assert allowed(Access(Settings()), good)


@pytest.mark.parametrize(
    "bad",
    [
        # names that somebody pointed at 127.0.0.1
        request("evil.example"),
        request("evil.example:6420"),
        request("evil.example:6420", origin="http://evil.example:6420"),
        request("localhost.evil.example"),
        request("localhost.:6420"),
        request("127.0.0.1.nip.example"),
        request("0.0.0.0:6420"),
        request("[::1].evil.example"),
        request(""),
        request(None),
        # pages of other origins
        request(origin="http://evil.example"),
        request(origin="null"),
        request(origin=""),
        request(origin="http://localhost:3000"),
        request(origin="http://localhost"),
        request(origin="http://localhost:64200"),
        request(origin="http://127.0.0.1:6420"),
        request(origin="http://evil.example/http://localhost:6420"),
        request(origin="chrome-extension://localhost:6420"),
        request(origin="file://"),
        request(origin="//localhost:6420"),
        # what carries no Origin in every browser: images, forms, navigation
        request(sec_fetch_site="cross-site"),
        request(sec_fetch_site="same-site"),
        request(sec_fetch_site="anything-new"),
        # other machines, whatever they call it
        request(peer=("192.0.2.7", 40_000)),
        request(peer=("::ffff:192.0.2.7", 40_000)),
        request(peer=("testclient", 40_000)),
    ],
)
def test_nobody_else_may(bad: Request) -> None:
    """Nor read an answer."""
    access = Access(Settings())
    assert not allowed(access, bad)
    if bad.header(b"origin") is not None and bad.header(b"host") == "localhost:6420":
        assert access.cors(bad) == [(b"vary", b"Origin")]
        assert access.preflight(bad) == [(b"vary", b"Origin")]


def test_what_a_registry_allows() -> None:
    """Its names and origins, and no others."""
    access = Access(Settings(hosts=frozenset(["vms.internal"]), origins=frozenset(["http://localhost:3000"])))
    assert allowed(access, request("vms.internal:80", origin="http://localhost:3000"))
    assert not allowed(access, request("vms.internal", origin="http://localhost:3001"))
    assert not allowed(access, request("localhost"))
    assert allowed(Access(Settings(hosts=frozenset("*"))), request("any.example", ("192.0.2.7", 1)))


@pytest.mark.parametrize(
    "shown", [None, "", "wrong", "correct hors", "correct horse ", "CORRECT HORSE", "größe"]
)
def test_a_token_is_needed_from_everywhere(shown: str | None) -> None:
    """From this machine too; beside a good one, a wrong one does no harm."""
    access = Access(Settings(token="correct horse"))
    assert not allowed(access, request(), shown)
    assert not allowed(access, request(), None, shown)
    elsewhere = request("evil.example", ("192.0.2.7", 1), origin="null")
    assert not allowed(access, elsewhere, shown)
    assert allowed(access, elsewhere, shown, "correct horse")


@pytest.mark.parametrize(
    "token", ["short", " leading space", "trailing space ", "größe-größe", "with\nnewline", 12345678]
)
def test_tokens_that_cannot_be_shown_everywhere_are_refused(token: Any) -> None:
    """And are not told in the error."""
    with pytest.raises(InvalidRequest) as caught:
        Settings(token=token)
    assert str(token) not in str(caught.value)


def test_loopback() -> None:
    """Addresses that only this machine reaches."""
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]", "::ffff:127.0.0.1"]))
    others = ["0.0.0.0", "::", "", "*", "10.0.0.1", "example.com", "::ffff:10.0.0.1", "127.0.0.1.example"]
    assert not any(map(is_loopback, others))
