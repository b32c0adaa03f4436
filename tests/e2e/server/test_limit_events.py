"""A VM that comes to a limit: an event to every connection, a number in the metrics, a line in the logs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from test_events import connected


async def _reached(server: Any) -> dict[str, Any]:
    async with connected(server, "limits") as caller:
        await caller.subscribe("limitReached")
        # Every process that the VM may have, and then one more.
        script = "import os, time\ntry:\n  while 1: os.fork() or time.sleep(1000)\nexcept OSError: time.sleep(1000)"
        pid = (await caller.call("spawn", "python3", ["-c", script]))["pid"]
        while True:
            wanted = await caller.send("exec", "echo ok")
            name, payload = await caller.event("limitReached")
            assert (name, wanted > 0) == ("limitReached", True)
            await caller.call("killProcess", pid)
            return payload


def test_a_limit_that_is_reached(server: Any) -> None:
    """Which, how much it is, and how to raise it."""
    payload = asyncio.run(_reached(server))
    assert payload["limit"] == "processes"
    assert payload["value"] == 512
    assert "Limits(processes=...)" in payload["message"]
    assert 'agentos_limits_reached_total{limit="processes"} 1.0' in server.http.get("/metrics").text
    assert any(one["message"] == "limit reached" and one["limit"] == "processes" for one in server.logs)
    assert server.call("limits", "exec", "echo ok")["stdout"] == "ok\n"
