"""What all commands that talk to a server have in common: how to find it, and how to name a VM."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, Final

from agentos.errors import AgentOSError, InvalidRequest
from agentos.printing import printable
from agentos.wire.keys import deserialize_key

if TYPE_CHECKING:
    from agentos.client.aio import Agent, Client

DEFAULT_ENDPOINT: Final = "http://localhost:6420"


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say which server."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--endpoint",
        default=os.environ.get("AGENTOS_ENDPOINT") or DEFAULT_ENDPOINT,
        help=f"where it is (AGENTOS_ENDPOINT, or {DEFAULT_ENDPOINT})",
    )
    group.add_argument(
        "--token",
        default=os.environ.get("AGENTOS_TOKEN") or None,
        help="what it was started with (AGENTOS_TOKEN)",
    )
    group.add_argument("--namespace", default="default", help=argparse.SUPPRESS)


def add_vm_options(parser: argparse.ArgumentParser) -> None:
    """Declare the server, and the name under which its VMs are registered."""
    add_server_options(parser)
    parser.add_argument(
        "--name", default="vm", help="the name under which the kind of VM is registered (default: vm)"
    )


def add_key(parser: argparse.ArgumentParser) -> None:
    """Declare which VM."""
    parser.add_argument(
        "key", metavar="KEY", type=vm_key, help="the VM's key; one of several parts is written a/b"
    )


def vm_key(text: str) -> str:
    """`text`, which names a VM: an empty one names nobody's, but comes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("wanted a VM's key, got ''")
    return text


def import_client(which: str) -> Any:
    """The client's module: imported when it is needed, as it needs more than the standard library."""
    try:
        return importlib.import_module(f"agentos.client.{which}")
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"the package {error.name} is missing", remedy="install agentos with pip, with all it depends on"
        ) from None


def with_client(arguments: argparse.Namespace, work: Callable[[Client], Awaitable[int]]) -> int:
    """Run `work` with a client of the server. Returns what it returns."""
    create_client = import_client("aio").create_client

    async def main() -> int:
        async with create_client(arguments.endpoint, arguments.token, arguments.namespace) as client:
            return await work(client)

    return asyncio.run(main())


def with_agent(
    arguments: argparse.Namespace, work: Callable[[Agent], Awaitable[int]], *, create: bool = False
) -> int:
    """Run `work` with the VM that was named, which is made first where `create` says so."""

    async def found(client: Client) -> int:
        return await work(agent(client, arguments.name, arguments.key, create=create))

    return with_client(arguments, found)


def agent(client: Client, name: str, key: str, *, create: bool = False) -> Agent:
    """The VM of this key."""
    kind = client.kind(name)
    parts = deserialize_key(key)
    return kind.get_or_create(parts) if create else kind.get(parts)


def say(message: str) -> None:
    """Tell the person, beside whatever the command prints."""
    print(f"agentos: {chr(10).join(map(printable, message.splitlines()))}", file=sys.stderr)


def tell(error: AgentOSError, *, as_json: bool) -> None:
    """Tell of an error, beside whatever the command prints: in words and what to do, or as one JSON object."""
    if as_json:
        told = {"code": error.code, "message": error.message, "details": error.details}
        print(json.dumps(told, default=repr), file=sys.stderr)
        return
    say(error.message)
    remedy = error.details.get("remedy")
    if remedy:
        say(str(remedy))


def table(heads: list[str], rows: list[list[str]], *, right: Collection[str] = ()) -> str:
    """Columns for a person, with nothing in them but what can be printed; the last one is as long as it is.

    Those whose heads are in `right` end at the same place, as numbers do.
    """
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads) - 1)]
    lines = [
        "  ".join(
            [
                *(
                    cell.rjust(width) if head in right else cell.ljust(width)
                    for cell, width, head in zip(row, widths, heads, strict=False)
                ),
                row[-1],
            ]
        ).rstrip()
        for row in [heads, *rows]
    ]
    return "\n".join(lines)
