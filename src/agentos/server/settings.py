"""What a server allows, each bound by name."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from agentos.errors import InvalidRequest
from agentos.model import check_count

MIB = 1024 * 1024
LOOPBACK_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]", "::1"))


@dataclass(frozen=True, slots=True)
class Settings:
    """How an application guards itself.

    Without a `token`, requests must be addressed to one of `hosts`, and web pages only of the server's own
    origin or of `origins` may make them. With one, whoever shows it may come from anywhere.
    """

    token: str | None = None
    hosts: frozenset[str] = LOOPBACK_HOSTS
    """Names, without port, under which the server may be addressed; `*` for any."""
    origins: frozenset[str] = frozenset()
    """Origins, such as http://localhost:3000, whose pages may use the server without a token; `*` for any."""
    max_body_bytes: int = 64 * MIB
    """Bytes of one request's body, or of one WebSocket frame."""
    max_arriving_bytes: int = 1024 * MIB
    """Bytes of bodies and frames that are not whole yet, of all clients together; what begins counts from 64 KiB on."""
    max_header_bytes: int = 64 * 1024
    """Bytes of a request's first line and headers."""
    max_connections: int = 20_000
    """WebSocket connections at once."""
    max_unsent_bytes: int = 64 * MIB
    """Bytes of results that one connection has not taken yet, beyond which its calls wait."""
    header_seconds: float = 15.0
    """For a request's headers to arrive, from the connection's beginning."""
    body_idle_seconds: float = 20.0
    """Longest silence while a body arrives."""
    body_seconds: float = 300.0
    """For a whole body to arrive."""
    drain_seconds: float = 5.0
    """For calls in flight to end when the server shuts down."""
    max_previews: int = 1000
    """Requests and WebSockets through preview links at once."""
    public_url: str | None = None
    """Where clients reach the server, such as https://vms.example.com: what preview links begin with.

    None: the address that the link was asked for at.
    """
    max_live_vms: int = 10_000
    """VMs running at once, those of the pool not counted."""
    reserve_disk_bytes: int = 1024 * MIB
    """Bytes free on the disk of the data directory below which no new VM is made; those that there are go on."""
    exited_log_bytes: int = 512 * MIB
    """Output of exited processes that is kept for replay, of all VMs together: that of the oldest goes first."""
    lossless_bytes: int = 512 * MIB
    """Output of lossless processes that nobody has read, of all VMs together. Beyond it nothing is lost: each that runs
    waits for its reader once 64 KiB are unread."""
    pool: int = 2
    """VMs of each kind that are booted before they are asked for (0: none). One weighs what an idle VM weighs."""

    def __post_init__(self) -> None:
        if self.token is not None and not _can_be_shown(self.token):
            raise InvalidRequest.argument(
                "token", "(hidden)", "at least 8 characters of ASCII, without spaces around them"
            )
        check_count("pool", self.pool, most=1000)
        check_count("exited_log_bytes", self.exited_log_bytes, least=1)
        check_count("lossless_bytes", self.lossless_bytes, least=1)
        url = self.public_url
        if url is not None and (not isinstance(url, str) or not url.startswith(("http://", "https://"))):
            raise InvalidRequest.argument("public_url", url, "an http:// or https:// URL")


def _can_be_shown(token: object) -> bool:
    """Whether it means the same in every header, address and subprotocol."""
    return (
        isinstance(token, str) and len(token) >= 8 and token.isascii() and token.isprintable()
        and token == token.strip()
    )  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host in LOOPBACK_HOSTS:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


@dataclass(slots=True)
class Counters:
    """Plain numbers that change with every byte, read when metrics are asked for."""

    connections: int = 0
    previews: int = 0
    event_frames: int = 0
    event_bytes: int = 0
    gaps: int = 0
