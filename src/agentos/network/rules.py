"""What a VM may reach, as a value: nothing, the public internet, or what a list names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_network
from typing import Any, Final, Literal

from agentos.errors import InvalidRequest
from agentos.network.addresses import FORBIDDEN, PRIVATE, Address, AnyNetwork, is_forbidden, is_public

Mode = Literal["none", "host-egress", "allow-list"]

_MOST_RULES: Final = 1000
_LABEL: Final = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_NAME: Final = re.compile(rf"(?:\*\.)?(?:{_LABEL}\.)*{_LABEL}\Z")
_PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?\Z")
_WANTED: Final = (
    'a name, address or network with a port, such as "pypi.org:443", "*.example.com", "10.1.2.0/24:5432"'
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of an allow-list, such as `*.example.com:443`. Made from text by `parse`."""

    name: str | None
    """A DNS name in lower case; `*.` at its beginning is one label or more; `*` alone any name or public address."""
    network: AnyNetwork | None
    first_port: int
    last_port: int

    @classmethod
    def parse(cls, text: object) -> Rule:
        """`host`, `host:port` or `host:port-port`; the host a name, an address ([...] for IPv6) or a network.

        Without a port, all ports. Raises InvalidRequest for anything else, and for what can never be allowed.
        """
        if not isinstance(text, str) or len(text) > 300:
            raise InvalidRequest.argument("network", text, _WANTED)
        host, ports = _split(text)
        network = _network(host)
        if network is not None:
            for one in FORBIDDEN:
                if network.version == one.version and network.subnet_of(one):  # type: ignore[arg-type]
                    raise InvalidRequest.argument(
                        "network", text, f"an address that may be reached: {one} never may"
                    )
            return cls(None, network, *_ports(text, ports))
        name = host.lower() if host == "*." else host.lower().removesuffix(".")
        if name != "*" and (not _NAME.match(name) or name.split(".")[-1].isdigit() or len(name) > 253):
            raise InvalidRequest.argument("network", text, _WANTED)
        return cls(name, None, *_ports(text, ports))

    def __str__(self) -> str:
        host = self.name or str(self.network)
        if self.network is not None and self.network.num_addresses == 1:
            host = str(self.network.network_address)
        host = f"[{host}]" if ":" in host else host
        if (self.first_port, self.last_port) == (1, 65535):
            return host
        last = f"-{self.last_port}" if self.last_port != self.first_port else ""
        return f"{host}:{self.first_port}{last}"

    def names(self, name: str) -> bool:
        """Whether it allows this name, at some port."""
        if self.name is None:
            return False
        if self.name.startswith("*."):
            return name.endswith(self.name[1:])
        return self.name in ("*", name)

    def has_port(self, port: int) -> bool:
        """Whether it allows this port, at some host."""
        return self.first_port <= port <= self.last_port


def _split(text: str) -> tuple[str, str]:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in host:
            raise InvalidRequest.argument("network", text, _WANTED)
        return host, rest[1:] if rest else "*"
    if text.count(":") > 1:  # IPv6 without brackets has no port
        return text, "*"
    host, colon, ports = text.partition(":")
    return host, ports if colon else "*"


def _network(host: str) -> AnyNetwork | None:
    try:
        return ip_network(host)
    except ValueError as error:
        if "host bits" in str(error):
            raise InvalidRequest.argument("network", host, "a network without host bits") from None
        return None


def _ports(text: str, ports: str) -> tuple[int, int]:
    if ports == "*":
        return 1, 65535
    found = _PORTS.match(ports)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise InvalidRequest.argument("network", text, "ports from 1 to 65535")
    return first, last


@dataclass(frozen=True, slots=True)
class Network:
    """What a VM may reach beyond itself; never loopback, link-local, metadata or the host's own addresses.

    `Network.none()`: nothing. `Network.host_egress()`: every public address, at every port.
    `Network.allow("pypi.org:443", "*.example.com", "10.1.2.3:5432")`: only these. A name stands for the public
    addresses that it resolves to; a private one is reached only where the list names it as an address or network.
    Wherever a VM is described, "none", "host-egress" or a list of such texts stand for the same.
    """

    mode: Mode = "none"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("none", "host-egress", "allow-list"):
            raise InvalidRequest.argument(
                "network", self.mode, "none, host-egress, or a list of what is allowed"
            )
        if self.rules and self.mode != "allow-list":
            raise InvalidRequest.argument("network", self.mode, "rules only in an allow-list")
        if len(self.rules) > _MOST_RULES:
            raise InvalidRequest.argument("network", f"{len(self.rules)} rules", f"at most {_MOST_RULES}")

    @classmethod
    def none(cls) -> Network:
        """Nothing but the VM itself."""
        return cls()

    @classmethod
    def host_egress(cls) -> Network:
        """Every public address."""
        return cls("host-egress")

    @classmethod
    def allow(cls, *entries: str) -> Network:
        """Only what `entries` name. Raises InvalidRequest naming the one that is wrong."""
        return cls("allow-list", tuple(dict.fromkeys(Rule.parse(one) for one in entries)))

    @classmethod
    def of(cls, value: Network | str | Iterable[str]) -> Network:
        """The Network that a plain value stands for. Raises InvalidRequest for one that stands for none."""
        if isinstance(value, Network):
            return value
        if isinstance(value, str):
            mode: Any = value
            if mode in ("none", "host-egress"):
                return cls(mode)
        elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
            return cls.allow(*value)
        raise InvalidRequest.argument("network", value, "none, host-egress, or a list of what is allowed")

    def __str__(self) -> str:
        return ", ".join(map(str, self.rules)) or self.mode

    def __bool__(self) -> bool:
        """Whether anything can be reached."""
        return self.mode == "host-egress" or bool(self.rules)

    # -- decisions

    def may_resolve(self, name: str) -> bool:
        """Whether a VM may know the addresses of `name` (lower case, no dot at its end)."""
        return self.mode == "host-egress" or any(rule.names(name) for rule in self.rules)

    def may_connect(self, address: Address, port: int, names: Iterable[str] = ()) -> bool:
        """Whether a VM may connect to `address`, which `names` have resolved to.

        Says nothing of the host's own addresses, which depend on the host.
        """
        if is_forbidden(address):
            return False
        if self.mode == "host-egress":
            return is_public(address)
        public = is_public(address)
        for rule in self.rules:
            if not rule.has_port(port):
                continue
            if rule.network is not None:
                if address in rule.network:
                    return True
            elif public and (rule.name == "*" or any(rule.names(name) for name in names)):
                return True
        return False

    def may_show(self, address: Address) -> bool:
        """Whether a VM may know that a name resolves to `address`: at some port it may be reached."""
        if is_forbidden(address):
            return False
        return is_public(address) or self.names_address(address)

    @property
    def is_by_name(self) -> bool:
        """Whether an address is reached only when a name has led to it."""
        named = [rule.name for rule in self.rules if rule.name is not None]
        return bool(named) and "*" not in named

    def names_address(self, address: Address) -> bool:
        """Whether a rule has this address in it, at some port."""
        return any(rule.network is not None and address in rule.network for rule in self.rules)

    def routes(self) -> list[tuple[bool, str]]:
        """What a VM's routing table should accept (True) or refuse: a coarse form, for quick and clear refusals.

        What names lead to is not in it: see `is_by_name`.
        """
        if not self:
            return []
        named = [rule.network for rule in self.rules if rule.network is not None]
        found: dict[AnyNetwork, bool] = {}
        if self.mode == "host-egress" or any(rule.name == "*" for rule in self.rules):
            found = {ip_network(one): True for one in ("0.0.0.0/0", "2000::/3", "64:ff9b::/96")}
            for one in PRIVATE:
                found[one] = any(_within(one, wider) for wider in named)
        else:
            found = {ip_network(one): False for one in ("0.0.0.0/0", "::/0")}
        found |= dict.fromkeys(named, True)
        found |= dict.fromkeys(FORBIDDEN, False)
        return [(accept, str(one)) for one, accept in found.items()]


def _within(one: AnyNetwork, wider: AnyNetwork) -> bool:
    if isinstance(one, IPv4Network) != isinstance(wider, IPv4Network):
        return False
    return one.subnet_of(wider)  # type: ignore[arg-type]
