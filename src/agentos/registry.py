"""What a server offers: named kinds of VMs. The Python form of a `server.ts`.

    registry = setup(use={"vm": agent_os()})
    registry.start()                              # http://localhost:6420

`registry.app` is the same as an ASGI application, to be mounted in another one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentos.actor import Booted, Connecting, ShutdownReason, VmKind
from agentos.errors import InvalidRequest
from agentos.model import Limits, VmSpec, check_seconds, check_text
from agentos.network.rules import Network

if TYPE_CHECKING:
    from agentos.server.app import Application
    from agentos.server.settings import Settings

IDLE_SECONDS = 15 * 60.0
"""How long a VM is left running when nothing happens in it."""


def agent_os(
    *,
    limits: Limits | None = None,
    env: Mapping[str, str] | None = None,
    user: str = "agentos",
    files: Mapping[str, str | bytes] | None = None,
    network: Network | str | Sequence[str] = "none",
    sleep_after: float | None = IDLE_SECONDS,
    on_before_connect: Callable[[Connecting], Awaitable[None] | None] | None = None,
    on_boot: Callable[[Booted], Awaitable[None] | None] | None = None,
    on_shutdown: Callable[[Booted, ShutdownReason], Awaitable[None] | None] | None = None,
    **spec: Any,
) -> VmKind:
    """A kind of VM: its limits, environment, user, and the files that a new one starts with.

    `network` is what its VMs may reach: "none", "host-egress" (every public address), or a list such as
    ["pypi.org:443", "*.example.com"]; see Network. A VM sleeps `sleep_after` seconds after the last action,
    connection and process in it (None: never). `on_before_connect` sees every connection and HTTP call before it
    reaches the VM and raises (Unauthorized, for one) to refuse it; `on_boot` runs each time the VM has booted,
    before the first action; `on_shutdown` before it ends. Hooks may be coroutines. Everything else that a VmSpec
    has, such as hostname or mounts, may be given too.
    """
    unknown = set(spec) - (set(VmSpec.__dataclass_fields__) - {"storage"})
    if unknown:
        raise InvalidRequest.argument("agent_os", sorted(unknown)[0], "an argument of agent_os or of VmSpec")
    idle = check_seconds("sleep_after", sleep_after)
    seeds = dict(files or {})
    for path, content in seeds.items():
        check_text("files", path, empty=False)
        if not isinstance(content, str | bytes):
            raise InvalidRequest.argument(f"files[{path!r}]", content, "text or bytes")
    reach = Network.of(network)
    made = VmSpec(limits=limits or Limits(), env=dict(env or {}), user=user, network=reach, **spec)
    return VmKind(made, seeds, idle, on_before_connect, on_boot, on_shutdown)


def setup(
    use: Mapping[str, VmKind],
    *,
    token: str | None = None,
    data_dir: str | Path | None = None,
    allowed_hosts: Iterable[str] = (),
    allowed_origins: Iterable[str] = (),
    **settings: Any,
) -> Registry:
    """A registry of kinds by name.

    `token` is what clients have to show (default: AGENTOS_TOKEN, or none). Without one, requests must come from this
    machine, addressed to localhost or one of `allowed_hosts` (`*`: any name, from anywhere), and only pages of
    `allowed_origins` may call. `data_dir` is where
    records and files are kept. Other arguments are those of `agentos.server.settings.Settings`.
    """
    if not isinstance(use, Mapping) or not use:
        raise InvalidRequest.argument("use", use, "a mapping of names to agent_os()")
    for name, kind in use.items():
        check_text("use", name, empty=False)
        if not isinstance(kind, VmKind):
            raise InvalidRequest.argument(f"use[{name!r}]", kind, "agent_os()")
    return Registry(use, token, data_dir, frozenset(allowed_hosts), frozenset(allowed_origins), settings)


class Registry:
    """Kinds of VMs, and how they are served. Made by `setup`."""

    def __init__(
        self,
        kinds: Mapping[str, VmKind],
        token: str | None,
        data_dir: str | Path | None,
        hosts: frozenset[str],
        origins: frozenset[str],
        more: Mapping[str, Any],
    ) -> None:
        self.kinds = dict(kinds)
        self.data_dir = Path(data_dir) if data_dir is not None else None
        self._token = token
        self._hosts = hosts
        self._origins = origins
        self._more = dict(more)

    def __repr__(self) -> str:
        return f"<Registry of {', '.join(self.kinds)}>"

    def settings(
        self, *, token: str | None = None, host: str | None = None, pool: int | None = None
    ) -> Settings:
        """What the server allows; `token`, `pool`, and `host`, where it listens, add to what `setup` was told."""
        from agentos.server.settings import LOOPBACK_HOSTS, Settings

        hosts = LOOPBACK_HOSTS | self._hosts | ({host} if host else frozenset())
        chosen = token or self._token or os.environ.get("AGENTOS_TOKEN") or None
        more = self._more if pool is None else {**self._more, "pool": pool}
        try:
            return Settings(token=chosen, hosts=frozenset(hosts), origins=self._origins, **more)
        except TypeError as error:
            raise InvalidRequest(f"setup: {error}", argument="setup") from None

    def application(self, data_dir: Path | None, settings: Settings) -> Application:
        """A new ASGI application of these kinds."""
        from agentos.server.app import Application

        return Application(self.kinds, data_dir=data_dir, settings=settings)

    @functools.cached_property
    def app(self) -> Application:
        """The ASGI application, to be mounted in another one or run by any ASGI server."""
        from agentos.server.serve import default_data_dir

        return self.application((self.data_dir or default_data_dir()).absolute(), self.settings())

    def start(
        self,
        host: str = "127.0.0.1",
        port: int = 6420,
        *,
        data_dir: str | Path | None = None,
        token: str | None = None,
    ) -> None:
        """Serve until SIGINT or SIGTERM."""
        from agentos.server.serve import serve

        serve(self, host, port, data_dir, token)
