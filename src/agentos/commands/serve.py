"""`agentos serve`: VMs for whoever may call the port."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING

from agentos.errors import InvalidRequest

if TYPE_CHECKING:
    from agentos.registry import Registry


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("serve", help="serve VMs on a port, to clients, agents and web pages")
    parser.add_argument(
        "registry", metavar="MODULE:NAME", nargs="?",
        help="the registry that a Python module makes with setup(); otherwise VMs of the default kind, under `vm`",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=6420, help="port (default: 6420)")
    parser.add_argument(
        "--data-dir", help="where VMs keep their files (AGENTOS_DATA_DIR, ~/.local/share/agentos)"
    )
    parser.add_argument(
        "--token", default=os.environ.get("AGENTOS_TOKEN") or None,
        help="what every caller has to show; needed where other machines can reach the port (AGENTOS_TOKEN)",
    )  # fmt: skip
    parser.add_argument(
        "--pool", type=int, default=None,
        help="VMs of each kind that are booted before they are asked for; each weighs 2 to 4 MB (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--network", action="append", metavar="WHAT",
        help="what VMs of the default kind may reach: host-egress, or a name or address such as pypi.org:443 "
        "(repeatable; default: nothing)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    try:
        from agentos.registry import agent_os, setup
        from agentos.server.serve import serve
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"the package {error.name} is missing", remedy="install agentos with pip, with all it depends on"
        ) from None
    if not 0 <= arguments.port <= 65_535:
        raise InvalidRequest.argument("--port", arguments.port, "a port, 0 to 65535")
    if arguments.registry and arguments.network:
        raise InvalidRequest.argument("--network", arguments.network, "not to be given: the registry says it")
    if arguments.registry:
        registry = find_registry(arguments.registry)
    else:
        registry = setup(use={"vm": agent_os(network=_network(arguments.network))})
    serve(registry, arguments.host, arguments.port, arguments.data_dir, arguments.token, arguments.pool)
    return 0


def _network(given: list[str] | None) -> str | list[str]:
    if given in (None, ["none"], ["host-egress"]):
        return given[0] if given else "none"
    return given


def find_registry(named: str) -> Registry:
    """The registry that MODULE:NAME names; the module may lie in the current directory."""
    from agentos.registry import Registry

    module_name, _, attribute = named.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), attribute or "registry")
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that it imports
        wanted = "a module that can be imported, as server:registry names the one in server.py"
        raise InvalidRequest.argument("MODULE:NAME", named, wanted) from None
    except (AttributeError, ValueError):
        raise InvalidRequest.argument("MODULE:NAME", named, "the name of a registry in the module") from None
    if not isinstance(found, Registry):
        raise InvalidRequest.argument("MODULE:NAME", named, "a registry, as setup() makes it")
    return found
