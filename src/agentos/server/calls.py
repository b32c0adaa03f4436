"""An action of an actor, from its wire name and arguments to its wire result; the same for HTTP and WebSockets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias, TypeVar

from agentos import actions
from agentos.actor import Actor
from agentos.errors import AgentOSError, InvalidRequest, ProcessNotFound, ShellNotFound
from agentos.machine.vm import VM
from agentos.server.fetch import fetch
from agentos.server.metrics import Metrics
from agentos.server.previews import Previews
from agentos.wire.malformed import AT_ONCE

log = logging.getLogger("agentos.server")

_T = TypeVar("_T")

BIG_BYTES: Final = AT_ONCE.bytes
"""Messages beyond this, or of more values than may be decoded at once, are decoded and encoded aside."""

_ASIDE: Final = ThreadPoolExecutor(2, "agentos-coding")
"""More would only take turns with the event loop: it waits longer for its own, the more there are."""


async def aside(work: Callable[..., _T], *args: Any) -> _T:
    """What `work` returns, which takes long; nobody waits for it but who asks."""
    return await asyncio.get_running_loop().run_in_executor(_ASIDE, work, *args)


ReadArguments: TypeAlias = dict[str, Any] | AgentOSError
"""Those of an action, or what is wrong with them."""


def read_arguments(name: str, args: Sequence[Any]) -> ReadArguments:
    """The arguments of an action that were decoded aside: reading them takes as long."""
    try:
        return actions.find(name).read_arguments(args)
    except AgentOSError as error:
        return error


def weight(output: Any) -> int:
    """About how many bytes there are to encode, without looking into everything."""
    if isinstance(output, str | bytes):
        return len(output)
    if isinstance(output, dict):
        total = 64 * len(output)
        for one in output.values():
            if isinstance(one, str | bytes):
                total += len(one)
        return total
    return 64 * len(output) if isinstance(output, list) else 0


class Calls:
    """Runs the actions of one server."""

    def __init__(self, metrics: Metrics, previews: Previews) -> None:
        self._metrics = metrics
        self._previews = previews

    async def perform(
        self, actor: Actor, name: str, args: Sequence[Any], origin: str, read: ReadArguments | None = None
    ) -> Any:
        """Run action `name`; `origin` is where the client reaches the server, `read` its arguments, if they were read.

        Raises AgentOSError as the action does; anything else is a defect of ours, and logged.
        """
        began = time.perf_counter()
        label, failure = "unknown", None
        self._metrics.in_flight += 1
        try:
            action = actions.find(name)
            label = action.name
            if isinstance(read, AgentOSError):
                raise read
            arguments = action.read_arguments(args) if read is None else read
            if action.target == "actor":
                output = await self._of_actor(actor, action.method, arguments, origin)
            else:
                vm = await actor.vm()
                if actions.BOOT.name in arguments:
                    _check_boot(vm, arguments)
                output = await getattr(vm if action.target == "vm" else vm.files, action.method)(**arguments)
            return action.result.write(output)
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
            self._metrics.in_flight -= 1
            self._metrics.ended(label, time.perf_counter() - began, failure)

    async def _of_actor(self, actor: Actor, method: str, arguments: dict[str, Any], origin: str) -> Any:
        if method == "destroy":
            # Half a destruction helps nobody: it goes on when the client has gone.
            await asyncio.shield(asyncio.ensure_future(actor.destroy()))
            return None
        if method == "create_preview":
            return self._previews.create(actor.actor_id, origin, **arguments)
        return await fetch(await actor.vm(), **arguments)


def _check_boot(vm: VM, arguments: dict[str, Any]) -> None:
    """Take the boot that is asked for out of `arguments`: of another one, what they name is not there."""
    if arguments.pop(actions.BOOT.name) != vm.boot_id:
        if "pid" in arguments:
            raise ProcessNotFound.of(arguments["pid"])
        raise ShellNotFound.of(arguments["shell_id"])
