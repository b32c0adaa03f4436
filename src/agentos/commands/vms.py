"""`agentos ls` and `rm`: the VMs of a server."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

from agentos.commands.remote import add_server_options, add_vm_options, agent, say, table, vm_key, with_client
from agentos.errors import VmNotFound
from agentos.wire.keys import serialize_key

if TYPE_CHECKING:
    from agentos.client.aio import Client


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    ls = subparsers.add_parser("ls", help="the VMs of the server")
    add_server_options(ls)
    ls.add_argument("--name", help="only those registered under this name")
    ls.add_argument("--json", action="store_true", help="for programs")
    ls.set_defaults(run=lambda arguments: with_client(
        arguments, lambda client: _ls(client, arguments.name, as_json=arguments.json)))  # fmt: skip
    rm = subparsers.add_parser("rm", help="end VMs and delete their files, for good")
    add_vm_options(rm)
    rm.add_argument("keys", metavar="KEY", type=vm_key, nargs="+")
    rm.set_defaults(run=lambda arguments: with_client(
        arguments, lambda client: _rm(client, arguments.name, arguments.keys)))  # fmt: skip


async def _ls(client: Client, name: str | None, *, as_json: bool) -> int:
    records = sorted(await client.list(name), key=lambda one: (one.name, one.key))
    if as_json:
        print(json.dumps([
            {"id": one.id, "name": one.name, "key": list(one.key), "running": one.running,
             "createTime": round(one.create_time * 1000)}
            for one in records
        ]))  # fmt: skip
        return 0
    rows = [
        [one.name, serialize_key(one.key), "running" if one.running else "asleep",
         time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.create_time))]
        for one in records
    ]  # fmt: skip
    print(table(["NAME", "KEY", "STATE", "CREATED"], rows))
    return 0


async def _rm(client: Client, name: str, keys: list[str]) -> int:
    code = 0
    for key in keys:
        try:
            await agent(client, name, key).destroy()
        except VmNotFound as error:
            say(error.message)
            code = 1
    return code
