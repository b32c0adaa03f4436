"""An action of an actor, from its wire name and arguments to its wire result; the same for HTTP and WebSockets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from agentos import actions
from agentos.actor import Actor
from agentos.errors import AgentOSError
from agentos.server.fetch import fetch
from agentos.server.metrics import Metrics

log = logging.getLogger("agentos.server")

_BIG_BYTES: Final = 256 * 1024
"""Messages beyond this are decoded and encoded in a thread, so that nobody else waits for it."""

T = TypeVar("T")


async def off_loop(size: int, work: Callable[..., T], *args: Any) -> T:
    """What `work` returns: done at once for a message of a small `size`, in a thread for a big one."""
    if size > _BIG_BYTES:
        return await asyncio.to_thread(work, *args)
    return work(*args)


def weight(output: Any) -> int:
    """About how many bytes there are to encode, without looking into everything."""
    if isinstance(output, str | bytes):
        return len(output)
    if isinstance(output, dict):
        return sum(weight(one) if isinstance(one, str | bytes) else 64 for one in output.values())
    return 64 * len(output) if isinstance(output, list) else 0


async def perform(actor: Actor, name: str, args: Sequence[Any], metrics: Metrics) -> Any:
    """Run action `name`. Raises AgentOSError as the action does; anything else is a defect of ours, and logged."""
    began = time.perf_counter()
    label, failure = "unknown", None
    metrics.began()
    try:
        action = actions.find(name)
        label = action.name
        return await _run(actor, action, action.read_arguments(args))
    except AgentOSError as error:
        failure = error.code
        raise
    except asyncio.CancelledError:
        failure = "cancelled"
        raise
    except Exception:
        failure = "internal.error"
        log.exception("action failed", extra={**actor.labels(), "action": label})
        raise
    finally:
        metrics.ended(label, time.perf_counter() - began, failure)


async def _run(actor: Actor, action: actions.Action, arguments: dict[str, Any]) -> Any:
    if action.target == "actor":
        if action.method == "destroy":
            # Half a destruction helps nobody: it goes on when the client has gone.
            await asyncio.shield(asyncio.ensure_future(actor.destroy()))
            return None
        return action.result.write(await fetch(await actor.vm(), **arguments))
    vm = await actor.vm()
    method = getattr(vm if action.target == "vm" else vm.files, action.method)
    return action.result.write(await method(**arguments))
