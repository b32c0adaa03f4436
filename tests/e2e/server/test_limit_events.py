"""A VM that comes to a limit: an event to every connection, a number in the metrics, a line in the logs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from agentos.wire.messages import Event

sys.path.insert(0, str(Path(__file__).parent))
from test_events import connected, post

_FILL = """
import os, time
try:
    while True: os.fork() or time.sleep(1000)
except OSError: os.write(1, b"full")
time.sleep(1000)
"""


async def _reached(server: Any) -> dict[str, Any]:
    async with connected(server, "limits") as caller:
        await caller.subscribe("limitReached")
        pid = (await caller.call("spawn", "python3", ["-c", _FILL]))["pid"]
        cursor = 0
        while True:
            page = await caller.call("readProcessOutput", pid, {"cursor": cursor, "wait": 20_000})
            if page["events"]:
                break
        # Every process that the VM may have is there. A command starts all the same, and meets the limit.
        await caller.send("exec", "echo ok")
        while not isinstance(message := await caller.receive(), Event):
            pass  # the command's own result, which may come first
        await post(server, "limits", "killProcess", pid)
        assert message.name == "limitReached"
        payload: dict[str, Any] = message.args[0]
        return payload


def test_a_limit_that_is_reached(server: Any) -> None:
    """Which, how much it is, and how to raise it."""
    payload = asyncio.run(_reached(server))
    assert payload["limit"] == "processes"
    assert payload["value"] == 512
    assert "Limits(processes=...)" in payload["message"]
    assert 'agentos_limits_reached_total{limit="processes"}' in server.http.get("/metrics").text
    assert any(one["message"] == "limit reached" and one["limit"] == "processes" for one in server.logs)
    assert server.call("limits", "exec", "echo ok")["stdout"] == "ok\n"
