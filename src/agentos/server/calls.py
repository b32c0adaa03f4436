"""An action of an actor, from its wire name and arguments to its wire result; the same for HTTP and WebSockets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from agentos import actions
from agentos.actor import Actor
from agentos.errors import AgentOSError
from agentos.server.fetch import fetch
from agentos.server.metrics import Metrics

log = logging.getLogger("agentos.server")


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
