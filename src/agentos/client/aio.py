"""The client of a server, for programs with an event loop: the verbs of the embedded VM on remote ones.

async with create_client("http://localhost:6420") as client:
    agent = client.vm.get_or_create("my-agent")
    print((await agent.exec("echo hello")).stdout)
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentos.client.agent import Agent
from agentos.client.connection import Connection
from agentos.client.files import RemoteFiles
from agentos.client.handles import RemoteProcess, RemoteShell
from agentos.client.transport import Transport
from agentos.errors import InvalidRequest
from agentos.wire.address import ById, ByKey
from agentos.wire.encodings import encode_value
from agentos.wire.keys import as_key, deserialize_key, serialize_key

__all__ = [
    "Agent", "Client", "Connection", "Kind", "RemoteFiles", "RemoteProcess", "RemoteShell", "VmRecord", "create_client",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class VmRecord:
    """A VM that the server knows. Times are seconds since the epoch."""

    id: str
    name: str
    key: tuple[str, ...]
    running: bool
    create_time: float


class Kind:
    """The VMs of one registered name."""

    def __init__(self, transport: Transport, name: str) -> None:
        self.name: str = name
        self._transport = transport

    def __repr__(self) -> str:
        return f"<Kind {self.name} of {self._transport.endpoint}>"

    def get_or_create(self, key: str | Sequence[str] | None = None) -> Agent:
        """The VM of this key, made when it is first asked something. Text is the key of that one element."""
        return Agent(self._transport, self._by_key(key, create=True))

    def get(self, key: str | Sequence[str] | None = None) -> Agent:
        """The VM of this key. VmNotFound, when it is first asked something, where there is none."""
        return Agent(self._transport, self._by_key(key, create=False))

    async def create(self, key: str | Sequence[str] | None = None, *, input: Any = None) -> Agent:
        """A new VM of this key, with `input` for the server's hooks. VmExists where there is one."""
        body = {"name": self.name, "key": serialize_key(as_key(key)), "crash_policy": "sleep"}
        if input is not None:
            body["input"] = base64.b64encode(encode_value(input)).decode("ascii")
        return Agent(self._transport, ById(await self._transport.make_actor("POST", body)))

    def _by_key(self, key: str | Sequence[str] | None, *, create: bool) -> ByKey:
        return ByKey(self.name, as_key(key), create=create, namespace=self._transport.namespace)


class Client:
    """A client of one server. `client.NAME` has the VMs of a registered name: `client.vm.get_or_create("my-agent")`."""

    def __init__(
        self,
        endpoint: str = "http://localhost:6420",
        token: str | None = None,
        namespace: str = "default",
    ) -> None:
        self._transport = Transport(endpoint, token, namespace)

    def __repr__(self) -> str:
        return f"<Client {self._transport.endpoint}>"

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __getattr__(self, name: str) -> Kind:
        """The VMs of a registered name."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.kind(name)

    def kind(self, name: str) -> Kind:
        """The VMs of a registered name, also of one that is no Python name."""
        if not isinstance(name, str) or not name:
            raise InvalidRequest.argument("name", name, "a registered name")
        return Kind(self._transport, name)

    async def list(self, name: str | None = None) -> list[VmRecord]:
        """The VMs that the server knows, of one name or of all."""
        query = {} if name is None else {"name": name}
        return [
            VmRecord(one["actor_id"], one["name"], deserialize_key(one["key"]), bool(one.get("running")),
                     one["create_ts"] / 1000)
            for one in await self._transport.actors(**query)
        ]  # fmt: skip

    async def close(self) -> None:
        """End its connections. Requests in flight fail."""
        await self._transport.close()


def create_client(
    endpoint: str = "http://localhost:6420", token: str | None = None, namespace: str = "default"
) -> Client:
    """A client of the server at `endpoint`, to be used in `async with`. `token`: what the server was started with."""
    return Client(endpoint, token, namespace)
