"""The ASGI application: every request comes in here.

It starts by itself with the first request, or with the ASGI lifespan where it is served alone; mounted in
another application, call `close` when that ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import agentos
from agentos.actor import VmKind
from agentos.actors import Actors
from agentos.errors import AgentOSError, Unauthorized
from agentos.host import Host
from agentos.server.access import Access
from agentos.server.calls import Calls
from agentos.server.gateway import Gateway, fail
from agentos.server.http import (
    JSON_TYPE,
    Arriving,
    Disconnected,
    MethodNotAllowed,
    Receive,
    Request,
    RouteNotFound,
    Scope,
    Send,
    ServerGoing,
    answer,
    as_json,
)
from agentos.server.management import Management
from agentos.server.metrics import CONTENT_TYPE, Metrics
from agentos.server.preview_proxy import PreviewProxy
from agentos.server.previews import PREFIX, Previews, load_key
from agentos.server.settings import Settings
from agentos.wire.terms import bearer_token

log = logging.getLogger("agentos.server")


class Application:
    """One server's worth of VMs, as an ASGI application. Belongs to the event loop that runs it first."""

    def __init__(
        self,
        kinds: Mapping[str, VmKind],
        *,
        data_dir: Path | None = None,
        settings: Settings | None = None,
        host: Host | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.metrics = Metrics()
        self.arriving = Arriving(self.settings.max_arriving_bytes)
        self._kinds = kinds
        self._data_dir = data_dir
        self._host = host
        self._own_host = host is None
        self._access = Access(self.settings)
        self._starting: asyncio.Task[None] | None = None
        self._closed = False
        self.actors: Actors
        self._gateway: Gateway
        self._previews: PreviewProxy
        self._management: Management

    async def start(self) -> None:
        """Take the data directory and be ready. No effect the second time."""
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        host = self._host = self._host or Host(
            exited_log_bytes=self.settings.exited_log_bytes, lossless_bytes=self.settings.lossless_bytes
        )
        await host.ready()
        self.actors = Actors(
            self._kinds,
            self._data_dir,
            host,
            most=self.settings.max_live_vms,
            reserve=self.settings.reserve_disk_bytes,
        )
        await self.actors.recover()
        await self.actors.get_ready(self.settings.pool)
        self.metrics.watch(self.actors)
        previews = Previews(await asyncio.to_thread(load_key, self._data_dir))
        calls = Calls(self.metrics, previews)
        self._gateway = Gateway(self.actors, self._access, calls, self.metrics, self.settings, self.arriving)
        self._previews = PreviewProxy(self.actors, previews, self.settings, self.metrics.counters)
        self._management = Management(self.actors, self.settings, self.arriving)

    async def close(self) -> None:
        """End connections, put every VM to sleep and let go of everything."""
        if self._starting is None or self._closed:
            return
        self._closed = True
        await asyncio.wait({self._starting})
        if self._starting.cancelled() or self._starting.exception() is not None:
            return
        await self._gateway.go_away()
        await self._previews.close()
        await self.actors.close()
        if self._own_host and self._host is not None:
            await self._host.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if self._starting is None or not self._starting.done():
            await self.start()
        if scope["type"] not in ("http", "websocket"):
            return
        request = Request(scope, receive)
        if request.path.startswith(PREFIX):
            # The link is the permission: who has it needs no other, and has nothing else by it.
            serve = self._previews.http if scope["type"] == "http" else self._previews.websocket
            await serve(request, scope, receive, send)
        elif scope["type"] == "websocket":
            await self._gateway.websocket(request, scope, receive, send)
        else:
            await self._http(request, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.start()
                except Exception as error:
                    await send({"type": "lifespan.startup.failed", "message": _told(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, request: Request, receive: Receive, send: Send) -> None:
        if request.method == "OPTIONS":
            await answer(send, 204, b"", self._access.preflight(request))
            return
        cors = self._access.cors(request)
        path = request.path
        if path.startswith(b"/gateway/") or request.header(b"x-rivet-target") is not None:
            await self._gateway.http(request, receive, send, cors)
            return
        try:
            self._check(request)
            body, kind = await self._own(request, path)
        except Disconnected:
            return
        except Exception as error:
            await fail(send, error, cors)
            return
        await answer(send, 200, body, [(b"content-type", kind), *cors])

    def _check(self, request: Request) -> None:
        try:
            self._access.check(
                request, bearer_token(request.header(b"authorization")), request.header(b"x-rivet-token")
            )
        except Unauthorized:
            # Clients that are refused here ask again for ever and say nothing; the next call tells them why.
            if request.path != b"/metadata":
                raise
            request.trusted = False

    async def _own(self, request: Request, path: bytes) -> tuple[bytes, bytes]:
        if path == b"/actors" or path.startswith(b"/actors/"):
            return as_json(await self._gateway.see_through(self._management.answer(request))), JSON_TYPE[1]
        about = self._about if request.trusted else self._greeting
        pages = {b"/": about, b"/metadata": about, b"/health": self._health}
        if path not in pages and path != b"/metrics":
            raise RouteNotFound("there is nothing under this path")
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"{request.method}: this path knows GET only", method=request.method)
        if path == b"/metrics":
            if self.actors.closed:
                raise ServerGoing
            return self.metrics.text(), CONTENT_TYPE
        return as_json(pages[path]()), JSON_TYPE[1]

    def _greeting(self) -> dict[str, Any]:
        return {"runtime": "agentos"}

    def _about(self) -> dict[str, Any]:
        # `clientEndpoint` is left out: with it, clients would talk to that instead of the address they were given.
        return {
            "runtime": "agentos",
            "version": agentos.__version__,
            "actorNames": {name: {} for name in self._kinds},
        }

    def _health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "runtime": "agentos",
            "version": agentos.__version__,
            "vms": len(self.actors.live),
        }


def _told(error: Exception) -> str:
    """Why there is no server, and what to do about it, in the one line that is logged of it."""
    remedy = error.details.get("remedy") if isinstance(error, AgentOSError) else None
    return f"{error}: {remedy}" if remedy else str(error)
