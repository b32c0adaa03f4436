"""Decides, for one VM, about names and addresses, and remembers which names have led to which address."""

from __future__ import annotations

import contextlib
import logging
import resource
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from agentos.linux import netlink
from agentos.network.addresses import Address, is_forbidden
from agentos.network.rules import Network

log = logging.getLogger("agentos.network")

MOST_REMEMBERED: Final = 4096
"""Addresses of a VM whose names are remembered, oldest forgotten first; and names of one address: 64."""
_MOST_NAMES: Final = 64
MOST_LOGGED: Final = 100
"""Different refusals that are logged of one VM; all are counted."""


@dataclass(slots=True)
class Traffic:
    """What all VMs of a host have had of the network, in plain numbers."""

    open: int = 0
    """Connections at this moment."""
    descriptors: int = 0
    """Of this process, that connections and lookups hold."""
    most_descriptors: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    """Beyond which no VM begins more: the rest of the host goes on."""
    connections: int = 0
    failed: int = 0
    """Allowed, but the other end could not be reached."""
    sent_bytes: int = 0
    received_bytes: int = 0
    lookups: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By reason: see Refused."""


class Refused(Exception):
    """The VM may not have it.

    `reason` is `not-allowed`, `forbidden-address`, `private-address`, `host-address`, `name` or `method`.
    """

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(f"{target}: {_REASONS[reason]}")
        self.target = target
        self.reason = reason


_REASONS: Final = {
    "not-allowed": "the network rules of this VM do not allow it",
    "forbidden-address": "loopback, link-local, metadata and the like are reached from no VM",
    "private-address": "it is no public address, and reached only where a rule has the address in it",
    "host-address": "it is an address of the host itself",
    "name": "this is no host name",
    "method": "only CONNECT and http:// are served",
}


class Ways(Protocol):
    """The routes of a VM's own network namespace, one address at a time."""

    def open(self, address: str) -> None:
        """Let connections to it come as far as the host."""

    def shut(self, address: str) -> None:
        """Have the kernel refuse them again."""

    def close(self) -> None:
        """Let go of it."""


class Gate:
    """The decisions of one VM. `close` it in the end."""

    def __init__(
        self, network: Network, traffic: Traffic, labels: Mapping[str, Any], ways: Ways | None
    ) -> None:
        self.network = network
        self._ways = ways
        self.traffic = traffic
        self._labels = dict(labels)
        self._routes = netlink.open_socket(netlink.NETLINK_ROUTE)
        self._names: OrderedDict[Address, OrderedDict[str, None]] = OrderedDict()
        self._logged: set[tuple[str, str]] = set()

    def close(self) -> None:
        """Let go of what asks about routes, and of what sets the VM's."""
        self._routes.close()
        if self._ways is not None:
            self._ways.close()

    def check(self, address: Address, port: int, names: Iterable[str] = ()) -> None:
        """Raise Refused unless the VM may connect there now."""
        target = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
        if is_forbidden(address):
            raise Refused(target, "forbidden-address")
        if not self.network.may_connect(address, port, (*names, *self._names.get(address, ()))):
            raise Refused(target, "not-allowed")
        if self._way_to(address) not in (netlink.RTN_UNICAST, _NO_WAY):
            # Local, broadcast, multicast: what the host's own routing table says is its own.
            raise Refused(target, "host-address")

    def _way_to(self, address: Address) -> int:
        return netlink.route_type(self._routes, str(address))

    def shown(self, name: str, addresses: Iterable[Address]) -> list[Address]:
        """Those of a name's addresses that the VM may know and the host has a way to; they are remembered."""
        found = [
            one
            for one in addresses
            if self.network.may_show(one) and self._way_to(one) == netlink.RTN_UNICAST
        ]
        for one in found:
            if one not in self._names:
                self._open_way(one)
            names = self._names.setdefault(one, OrderedDict())
            self._names.move_to_end(one)
            names[name] = None
            names.move_to_end(name)
            while len(names) > _MOST_NAMES:
                names.popitem(last=False)
        while len(self._names) > MOST_REMEMBERED:
            self._shut_way(self._names.popitem(last=False)[0])
        return found

    def _has_way(self, address: Address) -> bool:
        return self._ways is not None and self.network.is_by_name and not self.network.names_address(address)

    def _open_way(self, address: Address) -> None:
        """Let the VM's kernel pass on what goes to an address that a name has led to."""
        if self._ways is not None and self._has_way(address):
            try:
                self._ways.open(str(address))
            except OSError as error:
                # The VM's kernel refuses the address then, which errs on the safe side.
                self.warn(f"a VM's routes cannot be set: {error}")

    def _shut_way(self, address: Address) -> None:
        if self._ways is not None and self._has_way(address):
            with contextlib.suppress(OSError):
                self._ways.shut(str(address))

    def note(self, refused: Refused) -> None:
        """Count a refusal; log it where it is a new one."""
        self.traffic.refused[refused.reason] += 1
        key = (refused.target, refused.reason)
        if key not in self._logged and len(self._logged) < MOST_LOGGED:
            self._logged.add(key)
            log.info(
                "network access refused",
                extra={**self._labels, "target": refused.target[:300], "reason": refused.reason},
            )

    def warn(self, message: str) -> None:
        """Log what whoever runs the host should know, once."""
        if (message, "") not in self._logged:
            self._logged.add((message, ""))
            log.warning(message, extra=self._labels)


_NO_WAY: Final = 0
"""connect(2) says so itself."""
