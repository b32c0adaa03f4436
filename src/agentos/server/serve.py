"""Run a registry as a server of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from agentos.errors import InvalidRequest
from agentos.server.app import Application
from agentos.server.logs import log_to_stderr
from agentos.server.protocol import BoundedHttp, Sockets
from agentos.server.settings import Settings, is_loopback

if TYPE_CHECKING:
    from agentos.registry import Registry

log = logging.getLogger("agentos.server")

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 6420
_PING_SECONDS = 20.0
_FIRST_INHERITED = 3
_KEEP_ALIVE_SECONDS = 75


def default_data_dir() -> Path:
    """Where records and files are kept unless said otherwise."""
    given = os.environ.get("AGENTOS_DATA_DIR")
    if given:
        return Path(given)
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(home) / "agentos"


class Server(uvicorn.Server):
    """The ASGI server, which tells WebSocket clients to come back before it goes."""

    def __init__(self, config: uvicorn.Config, application: Application) -> None:
        super().__init__(config)
        self.application = application

    @property
    def port(self) -> int:
        """The port it listens on, once it does."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end it in order, with exit code 0; the second one at once."""
        loop = asyncio.get_running_loop()
        handled = (
            (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        )
        for one in handled:
            loop.add_signal_handler(one, self.handle_exit, one, None)
        try:
            yield
        finally:
            for one in handled:
                loop.remove_signal_handler(one)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.info("listening", extra={"host": self.config.host, "port": self.port, "pid": os.getpid()})

    async def shutdown(self, sockets: Any = None) -> None:
        for one in list(self.server_state.connections):
            if isinstance(one, BoundedHttp):
                one.answer_and_close()
        # The listener stays until the VMs sleep, so that clients which come back at once are told to wait.
        await self.application.close()
        for server in self.servers:
            server.close()
        await asyncio.sleep(0)  # what was accepted before is made known to the protocols a round later
        await super().shutdown(sockets)


def make_server(
    registry: Registry,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    data_dir: str | Path | None = None,
    token: str | None = None,
    pool: int | None = None,
) -> Server:
    """A server that is ready to `serve()`, for tests and for who runs the event loop. Arguments as for `serve`."""
    settings = registry.settings(token=token, host=host, pool=pool)
    _check_reach(host, settings)
    directory = Path(data_dir) if data_dir is not None else registry.data_dir or default_data_dir()
    application = registry.application(directory.absolute(), settings)
    protocol = type("Protocol", (BoundedHttp,), {"settings": settings})
    sockets = type("Sockets", (Sockets,), {"arriving": application.arriving})
    config = uvicorn.Config(
        application, host=host, port=port, loop="uvloop", http=protocol, ws=sockets, lifespan="on",
        access_log=False, log_config=None, server_header=False, date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=int(settings.drain_seconds),
        ws_max_size=settings.max_body_bytes, ws_ping_interval=_PING_SECONDS, ws_ping_timeout=2 * _PING_SECONDS,
        ws_per_message_deflate=False, backlog=4096,
    )  # fmt: skip
    return Server(config, application)


def serve(
    registry: Registry,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    data_dir: str | Path | None = None,
    token: str | None = None,
    pool: int | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. Raises InvalidRequest for an address that needs a token and has none.

    This process's soft limit of open files becomes the hard one.

    `pool` VMs of each kind are booted before they are asked for (None: as many as `setup` was told, or two).
    Connections are told to come back, calls in flight get a few seconds to end, VMs are put to sleep with
    their files.
    """
    if not logging.getLogger("agentos").handlers:
        log_to_stderr(os.environ.get("AGENTOS_LOG", "info"))
    _allow_many_files()
    server = make_server(registry, host, port, data_dir, token, pool)
    sockets = inherited_sockets()
    for one in sockets or ():
        if one.family != socket.AF_UNIX:
            _check_reach(one.getsockname()[0], server.application.settings)
    # What is there stays: looking through it again and again is half of what collecting garbage takes.
    gc.collect()
    gc.freeze()
    server.run(sockets)
    if not server.started:
        raise SystemExit(3)


def _allow_many_files() -> None:
    """Every VM and connection takes descriptors: as many as the host allows, and not the few that are customary."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def inherited_sockets() -> list[socket.socket] | None:
    """The listening sockets that a service manager handed over, as sd_listen_fds(3) has it; None where it did not.

    They outlive this process: clients that come while it restarts wait, instead of being refused.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=_FIRST_INHERITED + number) for number in range(count)] or None


def _check_reach(host: str, settings: Settings) -> None:
    if settings.token is None and not is_loopback(host):
        raise InvalidRequest(
            f"{host} can be reached from other machines: a token is needed (--token, or AGENTOS_TOKEN)",
            argument="token",
        )
