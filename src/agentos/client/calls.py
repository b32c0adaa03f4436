"""One question to a VM: from Python arguments to the wire and back, asked again only where that does no harm."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Final, Protocol

from agentos.actions import BY_METHOD
from agentos.client.patience import Patience
from agentos.errors import AgentOSError, ConnectionLost, InvalidRequest
from agentos.wire.failures import COME_BACK

PAGE_BYTES: Final = 256 * 1024
"""Bytes of output in a page, unless said otherwise."""
STREAM_BYTES: Final = 1024 * 1024
"""The same, where a stream is followed."""
POLL_SECONDS: Final = 20.0
"""Longest time that one request waits on the server: a dead connection is noticed soon after."""

_READS: Final = frozenset((
    "wait_process", "list_processes", "get_process", "read_process_output", "all_processes", "process_tree",
    "wait_shell", "list_shells", "read_shell", "read_file", "read_files", "stat", "readdir", "readdir_entries",
    "readdir_recursive", "exists",
))  # fmt: skip
"""Methods that change nothing. What may have run once is never asked for a second time by itself."""
_PAGES: Final = frozenset(("read_process_output", "read_shell"))
_LEAST_PAGE_BYTES: Final = 64 * 1024
"""Where connections are cut again and again, a smaller page comes through sooner: each further try asks for half."""
_GOING_AWAY: Final = f"{COME_BACK.group}.{COME_BACK.code}"
"""The server refused before it did anything."""


class Caller(Protocol):
    """A way to a VM."""

    @property
    def reached(self) -> bool:
        """Whether there was ever a server. Where nobody has taken a connection yet, nobody is waited for."""

    @property
    def closed(self) -> bool:
        """Whether it leads nowhere any more, however often it is tried."""

    async def call(self, name: str, args: tuple[Any, ...], wait: float | None) -> Any:
        """The output of an action, once; `wait`: seconds that the server may take, where that is known.

        Raises ConnectionLost where no answer came, or the error that was the answer.
        """


async def ask(caller: Caller, method: str, /, *, patience: float | None = None, **values: Any) -> Any:
    """What the VM's `method` returns for arguments by name; None is for one that was not given.

    `patience`: seconds that the server may take before the connection counts as dead; None where nobody knows.
    """
    action = BY_METHOD[method]
    args = _arguments(method, values)
    wait = values.get("wait", patience)
    harmless = method in _READS or "idempotency_key" in values
    trying: Patience | None = None
    while True:
        try:
            return action.result.read(await caller.call(action.name, args, wait))
        except ConnectionLost as error:
            if not harmless or not caller.reached:
                raise
            trying = trying or Patience()
            delay = trying.delay(error)
            if delay is None or caller.closed:
                raise
            if method in _PAGES and values.get("max_bytes", 0) > _LEAST_PAGE_BYTES:
                values["max_bytes"] = max(values["max_bytes"] // 2, _LEAST_PAGE_BYTES)
                args = _arguments(method, values)
        except InvalidRequest as error:
            raise action.in_python(error) from None
        except AgentOSError as error:
            if error.code != _GOING_AWAY:
                raise
            trying = trying or Patience()
            delay = trying.delay(error)
            if delay is None:
                raise
        await asyncio.sleep(delay)


def key_or_new(key: str | None) -> str:
    """`key`, which the server looks at, or a new one where none is given."""
    return uuid.uuid4().hex if key is None else key


def _arguments(method: str, values: dict[str, Any]) -> tuple[Any, ...]:
    try:
        return tuple(BY_METHOD[method].write_arguments(values))
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{method}: {error}", argument=method) from None
