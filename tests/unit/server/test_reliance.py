"""What is relied on of other packages without being public: whoever takes a new version learns here what changed."""

from __future__ import annotations

import inspect
import re

import aiohttp
import pytest
import uvicorn.protocols.http.httptools_impl as http
import uvicorn.protocols.websockets.websockets_sansio_impl as websockets
from aiohttp.client_proto import ResponseHandler

from agentos.client.tunnel import Tunnels
from agentos.server import protocol


def _uses(kind: type, attribute: str) -> set[str]:
    """What `kind` does with one of its attributes."""
    return set(re.findall(rf"self\.{attribute}\.(\w+)", inspect.getsource(kind)))


def test_a_protocol_that_changed_is_told_at_the_start() -> None:
    """By name, as an ImportError: no method of ours is passed over in silence."""

    class Changed:
        def __init__(self) -> None:
            self.inbox: list[int] = []

    with pytest.raises(
        ImportError, match=r"^uvicorn .* Changed has no queue, receive; install another version"
    ):
        protocol.check_reliance(((Changed, ("inbox", "queue", "receive")),))


@pytest.mark.parametrize("kind", [protocol.BoundedHttp, protocol.Sockets])
def test_all_that_is_relied_on_is_checked(kind: type) -> None:
    """What stands in a class of ours and in the one below it, or is used of it, is in the list."""
    [(below, listed)] = [one for one in protocol.RELIED_ON if one[0] in kind.__mro__]
    replaced = {name for name in vars(kind) if name in dir(below) and not name.startswith("__")}
    there = {*dir(below), *below.__init__.__code__.co_names}  # type: ignore[misc]
    used = set(re.findall(r"self\.(\w+)", inspect.getsource(kind))) & there
    assert replaced | used == set(listed)


def test_what_a_websocket_does_with_its_queue() -> None:
    """The inbox in its place has just that."""
    assert _uses(websockets.WebSocketsSansIOProtocol, "queue") == {"put_nowait", "get", "empty"}


def test_what_a_websocket_does_with_its_frames() -> None:
    """They are put together as they come: nobody counts them."""
    source = inspect.getsource(websockets.WebSocketsSansIOProtocol)
    assert _uses(websockets.WebSocketsSansIOProtocol, "frames") == {"append"}
    assert 'self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)' in source


def test_what_requests_behind_one_another_are() -> None:
    """Pairs of a cycle and an application; a cycle is told by these two that its client has gone."""
    assert "self.pipeline.appendleft((self.cycle, app))" in inspect.getsource(http.HttpToolsProtocol)
    cycle = http.RequestResponseCycle.__init__.__code__.co_names
    assert {"disconnected", "message_event", "response_complete", "keep_alive"} <= set(cycle)
    assert _uses(http.HttpToolsProtocol, "flow") <= {
        "pause_reading",
        "resume_reading",
        "pause_writing",
        "resume_writing",
    }


def test_how_aiohttp_makes_a_connection() -> None:
    """There is no public way to hand it one that is open, as a tunnel is."""
    made = inspect.signature(aiohttp.BaseConnector._create_connection)
    assert (
        list(made.parameters)
        == ["self", "req", "traces", "timeout"]
        == list(inspect.signature(Tunnels._create_connection).parameters)
    )
    source = inspect.getsource(aiohttp.BaseConnector)
    assert "await self._create_connection(req, traces, timeout)" in source
    assert "self._factory = functools.partial(ResponseHandler, loop=loop)" in source
    assert issubclass(ResponseHandler, aiohttp.base_protocol.BaseProtocol)
