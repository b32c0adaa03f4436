"""One remote VM over HTTP."""

from __future__ import annotations

from dataclasses import replace

from agentos.client.connection import Connection
from agentos.client.transport import Transport, Way
from agentos.client.verbs import Verbs
from agentos.wire.address import ByKey, Target


class Agent(Verbs):
    """A remote VM, which boots when it is first asked something. Belongs to its client."""

    def __init__(self, transport: Transport, target: Target) -> None:
        self._way = Way(transport, target)
        self._found: Agent | None = None
        super().__init__(self._way)

    def __repr__(self) -> str:
        return f"<Agent {self._way}>"

    def _existing(self) -> Agent:
        target = self._way.target
        if not (isinstance(target, ByKey) and target.create):
            return self
        if self._found is None:
            self._found = Agent(self._way.transport, replace(target, create=False))
        return self._found

    async def resolve(self) -> str:
        """Its id on the server; made there if it is to be. VmNotFound where it is not."""
        return await self._way.actor_id()

    def connect(self) -> Connection:
        """A connection for its events, and for actions over one WebSocket.

        `async with agent.connect() as connection: connection.on("processOutput", handler)`
        """
        return Connection(self._way)
