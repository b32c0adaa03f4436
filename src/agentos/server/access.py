"""Who may use the server: tokens, the names it is addressed by, and the web pages that may call it.

A web page that any browser of this machine shows can send requests to a loopback port, under the server's
own name too where the page's owner points a DNS name of theirs at 127.0.0.1. So, without a token, a request
counts only if it was addressed to a known name, and was not made by a page of another origin. And, however the
server came to listen where others reach it, only if it was sent by this machine.
"""

from __future__ import annotations

import hmac
import re
from typing import Final

from agentos.errors import Unauthorized
from agentos.server.http import Headers, Request
from agentos.server.settings import Settings, is_loopback

_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:@/\\\[\]\s]+)(?::[0-9]{1,5})?")
_SHOW_TOKEN: Final = "--token, or AGENTOS_TOKEN; over HTTP the header `Authorization: Bearer TOKEN`"


class Access:
    """The decision, for one server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._token = settings.token.encode() if settings.token is not None else None

    def check(self, request: Request, *tokens: str | None) -> None:
        """Raise Unauthorized unless the request may be served. `tokens` are those it shows, any of which will do."""
        if self._token is not None:
            if not self._shows(tokens):
                raise Unauthorized("a valid token is needed", remedy=_SHOW_TOKEN)
            return
        if not self._is_local(request.peer):
            raise Unauthorized("from another machine, this server is used with a token")
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
        return "*" in hosts or _name_of(host) in hosts

    def _is_local(self, peer: str | None) -> bool:
        """Whether the caller is on this machine, or reaches a Unix socket, which file modes guard."""
        return peer is None or is_loopback(peer) or "*" in self._settings.hosts

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
        scheme, _, authority = origin.partition("://")
        return scheme in ("http", "https") and bool(authority) and authority == request.header(b"host")

    def _is_own(self, request: Request) -> bool:
        return self._is_known(request.header(b"host") or "") and self.trusts_origin(request)

    def cors(self, request: Request) -> Headers:
        """The headers that let the page which made the request read the answer; none where it may not."""
        origin = request.header(b"origin")
        if origin is None or not (self._token is not None or self._is_own(request)):
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


def _name_of(host: str) -> str | None:
    """The name or address in a Host header, in lower case and without the port; None where it is neither."""
    found = _HOST.fullmatch(host)
    return found[1].lower() if found else None
