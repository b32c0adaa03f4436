"""Which headers of a preview are passed on, which are not, and which are added, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from agentos.server.http import Headers, Request

_SANDBOX: Final = b"sandbox allow-scripts allow-forms allow-modals allow-popups allow-downloads"
PAGE_HEADERS: Final[Headers] = [
    # No allow-same-origin: the page's origin is `null`, and not that of the server, whose API it could call.
    (b"content-security-policy", _SANDBOX),
    # Its own requests then count as another origin's. Whoever has the link may read, so any page may; no credentials.
    (b"access-control-allow-origin", b"*"),
    (b"access-control-expose-headers", b"*"),
    # The link is the key: it is not told to where the page leads.
    (b"referrer-policy", b"no-referrer"),
    (b"x-robots-tag", b"noindex"),
]
_HOP_BY_HOP: Final = {
    b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    b"proxy-authenticate", b"proxy-authorization", b"expect",
}  # fmt: skip
_NOT_TO_VM: Final = _HOP_BY_HOP | {
    b"host", b"cookie", b"authorization", b"referer", b"forwarded", b"x-real-ip",
    b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions", b"sec-websocket-protocol",
}  # fmt: skip
_NOT_TO_VM_PREFIXES: Final = (b"x-rivet-", b"x-agentos-", b"x-forwarded-", b"cf-", b"x-amz")
_NOT_TO_CLIENT: Final = _HOP_BY_HOP | {
    # Of the origin, which is the server's and not the page's.
    b"set-cookie", b"set-cookie2", b"clear-site-data", b"strict-transport-security", b"alt-svc", b"public-key-pins",
    b"service-worker-allowed", b"www-authenticate", b"authentication-info", b"nel", b"report-to",
    b"reporting-endpoints", b"origin-trial", b"accept-ch", b"speculation-rules",
    # A sandboxed page with one of these is not shown at all.
    b"cross-origin-opener-policy", b"cross-origin-opener-policy-report-only",
    # Replaced.
    b"referrer-policy", b"location",
}  # fmt: skip
_LOCAL: Final = (b"localhost", b"127.0.0.1", b"[::1]", b"0.0.0.0")


@dataclass(frozen=True, slots=True)
class View:
    """One request through a link."""

    port: int
    root: bytes
    """The path that all paths of the VM's server are below, for the client."""
    target: bytes
    """Path and query for the VM's server."""
    scheme: str
    missing_slash: bool = False


def to_vm(request: Request, view: View) -> Headers:
    """The headers for the VM's server, which believes that it is asked on its own loopback."""
    own = f"localhost:{view.port}".encode()
    named = _named_by_connection(request.headers)
    headers: Headers = [(b"host", own)]
    for name, value in request.headers:
        if name in _NOT_TO_VM or name in named or name.startswith(_NOT_TO_VM_PREFIXES):
            continue
        if name == b"origin" and _is_ours(request, value):
            value = b"http://" + own
        headers.append((name, value))
    host = request.header(b"host")
    if host is not None:
        headers.append((b"x-forwarded-host", host.encode("latin-1")))
    secure = view.scheme in ("https", "wss")
    return [
        *headers,
        (b"x-forwarded-proto", b"https" if secure else b"http"),
        (b"x-forwarded-prefix", view.root),
    ]


def _is_ours(request: Request, origin: bytes) -> bool:
    """Whether a request comes from a page of the preview (its origin is `null`), or from the server's own address."""
    host = (request.header(b"host") or "").encode("latin-1")
    return origin == b"null" or origin.partition(b"://")[2] == host


def to_client(headers: Headers, view: View) -> Headers:
    """The headers for the client: what the VM's server said, as far as it concerns the page alone."""
    named = _named_by_connection(headers)
    passed = [
        (name, value)
        for name, value in headers
        if name not in _NOT_TO_CLIENT and name not in named and not name.startswith(b"access-control-")
    ]
    passed += [(name, _moved(value, view)) for name, value in headers if name == b"location"]
    return [*passed, *PAGE_HEADERS]


def _named_by_connection(headers: Headers) -> set[bytes]:
    return {
        one.strip().lower() for name, value in headers if name == b"connection" for one in value.split(b",")
    }


def _moved(location: bytes, view: View) -> bytes:
    """Where a redirect of the VM's server leads, for the client: its own paths stay below the link."""
    if location.startswith(b"/") and not location.startswith((b"//", b"/\\")):
        return view.root + location
    for scheme in (b"http://", b"https://"):
        if location.lower().startswith(scheme):
            authority, _, rest = location[len(scheme) :].partition(b"/")
            for one in _LOCAL:
                if authority in (one + b":%d" % view.port, one if view.port == 80 else b""):
                    return view.root + b"/" + rest
    return location
