"""Who may use the server: tokens, the names it is addressed by, and the web pages that may call it.

A web page that any browser of this machine shows can send requests to a loopback port, under the server's
own name too where the page's owner points a DNS name of theirs at 127.0.0.1. So, without a token, a request
counts only if it was addressed to a known name, and was not made by a page of another origin.
"""

from __future__ import annotations

import hmac

from agentos.errors import Unauthorized
from agentos.server.http import Headers, Request
from agentos.server.settings import Settings


class Access:
    """The decision, for one server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._token = settings.token.encode() if settings.token is not None else None

    def check(self, request: Request, *tokens: str | None) -> None:
        """Raise Unauthorized unless the request may be served. `tokens` are those it shows, any of which will do."""
        if self._token is not None:
            if not self._shows(tokens):
                raise Unauthorized("a valid token is needed")
            return
        host = request.header(b"host") or ""
        if not self._is_known(host):
            raise Unauthorized(
                f"this server does not answer to the name {host[:200]!r}; call it localhost, or allow the name"
            )
        if not self.trusts_origin(request):
            origin = request.header(b"origin")
            raise Unauthorized(
                f"pages of {(origin or 'another site')[:200]} may not use this server without a token"
            )

    def _shows(self, tokens: tuple[str | None, ...]) -> bool:
        assert self._token is not None
        found = False
        for one in tokens:
            if one is not None:
                found |= hmac.compare_digest(one.encode("utf-8", "surrogatepass"), self._token)
        return found

    def _is_known(self, host: str) -> bool:
        hosts = self._settings.hosts
        return "*" in hosts or _without_port(host).lower() in hosts

    def trusts_origin(self, request: Request) -> bool:
        """Whether the page that makes the request, if one does, may use the server without a token."""
        origins = self._settings.origins
        origin = request.header(b"origin")
        if "*" in origins:
            return True
        if origin is None:
            # Images, forms and navigation of another site carry no Origin in every browser.
            return request.header(b"sec-fetch-site") in (None, "none", "same-origin")
        if origin in origins:
            return True
        _, _, authority = origin.partition("://")
        return bool(authority) and authority == request.header(b"host")

    def cors(self, request: Request) -> Headers:
        """The headers that let the page which made the request read the answer; none where it may not."""
        origin = request.header(b"origin")
        if origin is None or not (self._token is not None or self.trusts_origin(request)):
            return [(b"vary", b"Origin")]
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-credentials", b"true"),
            (b"access-control-expose-headers", b"*"),
            (b"vary", b"Origin"),
        ]

    def preflight(self, request: Request) -> Headers:
        """The headers that answer a browser's question whether a page may make a request."""
        headers = self.cors(request)
        if len(headers) > 1:
            wanted = request.header(b"access-control-request-headers") or "*"
            headers += [
                (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS, PATCH"),
                (b"access-control-allow-headers", wanted.encode("latin-1")),
                (b"access-control-max-age", b"86400"),
            ]
        return headers


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
