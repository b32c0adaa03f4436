"""Links to a port inside a VM: signed, with an end, good for whoever has them.

A token names the actor, the port and the time until which it holds, and is signed with the server's key. It is
looked up nowhere: it ends with its time, with the VM that it names, or with the key.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import os
import re
import secrets
import struct
import time
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from agentos.conversions import Preview
from agentos.errors import AgentOSError, BootFailed, InvalidRequest
from agentos.model import check_count, check_seconds, check_text

PREFIX: Final = b"/preview/"
DEFAULT_SECONDS: Final = 3600.0
MOST_SECONDS: Final = 30 * 86400.0
_KEY_BYTES: Final = 32
_KEY_FILE: Final = "preview.key"
_VERSION: Final = 1
_BODY: Final = struct.Struct(">B16sHQ")
_LENGTH: Final = _BODY.size + sha256().digest_size
_AUTHORITY: Final = re.compile(r"[A-Za-z0-9.:\[\]_-]{1,300}\Z")


class PreviewDenied(AgentOSError, PermissionError):
    """The link is not one of this server's: cut off, changed, or signed with another key."""

    code = "preview.denied"


class PreviewExpired(AgentOSError):
    """The link was good, and is not any more: its time is over, or its VM was destroyed."""

    code = "preview.expired"


class Opened(NamedTuple):
    """What a good link leads to."""

    actor_id: str
    port: int


class Previews:
    """Makes links and opens them."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def create(
        self,
        actor_id: str,
        origin: str,
        port: int,
        *,
        expires_in: float | None = None,
        path: str | None = None,
    ) -> Preview:
        """A link to `path` on `port` that holds for `expires_in` seconds: an hour, and at most 30 days."""
        check_count("port", port, least=1, most=65535)
        seconds = check_seconds("expires_in", expires_in)
        seconds = DEFAULT_SECONDS if seconds is None else seconds
        if not 0 < seconds <= MOST_SECONDS:
            raise InvalidRequest.argument("expires_in", expires_in, f"above 0, at most {MOST_SECONDS:.0f} s")
        where = "/" if path is None else check_text("path", path)
        if not where.startswith("/") or not where.isascii() or not where.isprintable() or " " in where:
            raise InvalidRequest.argument("path", path, "a path as in a URL, beginning with /")
        expires_at = int(time.time() * 1000) + int(seconds * 1000)
        token = self._sign(_BODY.pack(_VERSION, bytes.fromhex(actor_id), port, expires_at))
        return Preview(f"{origin}{PREFIX.decode()}{token}{where}", token, expires_at / 1000)

    def open(self, token: bytes) -> Opened:
        """What a token leads to. Raises PreviewDenied, or PreviewExpired."""
        try:
            data = base64.urlsafe_b64decode(token + b"=" * (-len(token) % 4))
        except (ValueError, binascii.Error):
            data = b""
        body, signature = data[: _BODY.size], data[_BODY.size :]
        # Of many texts that decode to the same bytes only the one that was given out is good.
        good = len(data) == _LENGTH and base64.urlsafe_b64encode(data).rstrip(b"=") == token
        if not hmac.compare_digest(self._signature(body), signature) or not good:
            raise PreviewDenied("this link was not made by this server, or was changed on its way")
        version, actor, port, expires_at = _BODY.unpack(body)
        if version != _VERSION:
            raise PreviewDenied("this link is of another version of the server")
        if time.time() * 1000 >= expires_at:
            raise PreviewExpired("this link has expired; ask for a new one")
        return Opened(actor.hex(), port)

    def _signature(self, body: bytes) -> bytes:
        return hmac.digest(self._key, b"agentos preview\0" + body, "sha256")

    def _sign(self, body: bytes) -> str:
        return base64.urlsafe_b64encode(body + self._signature(body)).rstrip(b"=").decode()


def load_key(data_dir: Path | None) -> bytes:
    """The key of this data directory, made at first use; without a directory, one that ends with the process.

    Blocks for a file's time. Raises BootFailed where others can read it.
    """
    if data_dir is None:
        return secrets.token_bytes(_KEY_BYTES)
    path = data_dir / _KEY_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _make_key(path)
    with open(fd, "rb") as file:
        mode, key = os.fstat(fd).st_mode, file.read(_KEY_BYTES + 1)
    if mode & 0o077 or len(key) != _KEY_BYTES:
        raise BootFailed(
            f"{path} is not a key that only this user can read", step="preview key", errno=0,
            remedy="delete it: links that were given out end, and a new one is made",
        )  # fmt: skip
    return key


def _make_key(path: Path) -> bytes:
    """Written aside and renamed, so that a crash leaves no half of it."""
    key = secrets.token_bytes(_KEY_BYTES)
    aside = path.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(fd)
    aside.rename(path)
    return key


def origin_of(scheme: str, host: str | None) -> str:
    """The origin that a request was sent to, nothing where its Host is no host: the link is then a path."""
    if host is None or not _AUTHORITY.match(host):
        return ""
    return f"{'https' if scheme in ('https', 'wss') else 'http'}://{host}"
