"""Runs each behaviour on every surface: embedded, async client, blocking client, TypeScript client."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from surfaces import (
    Body,
    Driver,
    Way,
    blocking,
    embedded,
    over_a_websocket,
    over_http,
    typescript,
)

SECONDS = 30.0
"""Only ends a behaviour that hangs."""

REMOTE_SURFACES = (
    "async client", "async connection", "blocking client",
    "typescript json", "typescript cbor", "typescript bare", "typescript connection",
)  # fmt: skip
SURFACES = ("embedded", *REMOTE_SURFACES)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, running_server: Any) -> Iterator[str]:
    """`agentos serve` with the kinds of VMs that behaviours ask for."""
    directory = Path(__file__).parent
    command = ("agentos", "serve", "kinds:registry")
    with running_server(tmp_path_factory.mktemp("data"), *command, cwd=directory) as url:
        yield url


@pytest.fixture(scope="session")
def driver(server: str, js: Path) -> Iterator[Driver]:
    """The TypeScript client, in one Node process for all tests."""
    running = Driver("node", js, server)
    yield running
    assert running.close() == 0


def way_of(request: pytest.FixtureRequest) -> Way:
    """How the surface that a test is run on is opened; what it needs is started for the session."""
    name: str = request.param
    if name == "embedded":
        return embedded
    if name.startswith("typescript"):
        driver = request.getfixturevalue("driver")
        what = name.split()[1]
        return typescript(driver, "bare" if what == "connection" else what, connected=what == "connection")
    ways = {"async client": over_http, "async connection": over_a_websocket, "blocking client": blocking}
    return ways[name](request.getfixturevalue("server"))


every_way = pytest.fixture(scope="session", params=SURFACES, ids=lambda one: one.replace(" ", "-"))(way_of)
remote_way = pytest.fixture(scope="session", params=REMOTE_SURFACES, ids=lambda one: one.replace(" ", "-"))(
    way_of
)


def _runner(way: Way) -> Callable[..., None]:
    def run(body: Body, *, kind: str = "vm") -> None:
        async def main() -> None:
            async with asyncio.timeout(SECONDS), way(kind) as vm:
                await body(vm)

        asyncio.run(main())

    return run


@pytest.fixture
def on(every_way: Way) -> Callable[..., None]:
    """`on(body, kind=...)`: runs `body(vm)` with a fresh VM, on the surface that the test is run for."""
    return _runner(every_way)


@pytest.fixture
def on_remote(remote_way: Way) -> Callable[..., None]:
    """The same for what an embedded VM does not have: events, requests to its ports, destruction by its key."""
    return _runner(remote_way)
