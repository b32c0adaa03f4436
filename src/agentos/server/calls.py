"""An action of an actor, from its wire name and arguments to its wire result; the same for HTTP and WebSockets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from agentos import actions
from agentos.actor import Actor
from agentos.errors import AgentOSError, InvalidRequest, ProcessNotFound, ShellNotFound
from agentos.server.fetch import fetch
from agentos.server.metrics import Metrics
from agentos.server.previews import Previews

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


class Calls:
    """Runs the actions of one server."""

    def __init__(self, metrics: Metrics, previews: Previews) -> None:
        self._metrics = metrics
        self._previews = previews

    async def perform(self, actor: Actor, name: str, args: Sequence[Any], origin: str) -> Any:
        """Run action `name`; `origin` is where the client reaches the server.

        Raises AgentOSError as the action does; anything else is a defect of ours, and logged.
        """
        began = time.perf_counter()
        label, failure = "unknown", None
        self._metrics.began()
        try:
            action = actions.find(name)
            label = action.name
            return await self._run(actor, action, action.read_arguments(args), origin)
        except InvalidRequest as error:
            failure = error.code
            raise action.on_the_wire(error) from None
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
            self._metrics.ended(label, time.perf_counter() - began, failure)

    async def _run(self, actor: Actor, action: actions.Action, arguments: dict[str, Any], origin: str) -> Any:
        if action.target == "actor":
            return action.result.write(await self._of_actor(actor, action.method, arguments, origin))
        vm = await actor.vm()
        boot = arguments.pop(actions.BOOT.name, vm.boot_id)
        if boot != vm.boot_id:
            if "pid" in arguments:
                raise ProcessNotFound.of(arguments["pid"])
            raise ShellNotFound.of(arguments["shell_id"])
        method = getattr(vm if action.target == "vm" else vm.files, action.method)
        return action.result.write(await method(**arguments))

    async def _of_actor(self, actor: Actor, method: str, arguments: dict[str, Any], origin: str) -> Any:
        if method == "destroy":
            # Half a destruction helps nobody: it goes on when the client has gone.
            await asyncio.shield(asyncio.ensure_future(actor.destroy()))
            return None
        if method == "create_preview":
            return self._previews.create(actor.actor_id, origin, **arguments)
        return await fetch(await actor.vm(), **arguments)
