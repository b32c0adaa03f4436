"""What a VM's network rules mean: how they are written, and which names and addresses they let through."""

from __future__ import annotations

import pickle
from ipaddress import ip_address, ip_network

import pytest

from agentos import VmSpec
from agentos.errors import InvalidRequest
from agentos.network.addresses import FORBIDDEN, is_forbidden, is_public, parse
from agentos.network.rules import Network, Rule

PUBLIC = (
    "1.1.1.1",
    "8.8.8.8",
    "93.184.216.34",
    "172.32.0.1",
    "2606:2800:220:1::1",
    "2a00:1450::1",
    "64:ff9b::808:808",
)
NEVER = (
    "0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254", "169.254.169.254", "169.254.0.1", "168.63.129.16",
    "100.100.100.200", "192.0.0.192", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1",
    "::7f00:1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1", "fec0::1", "ff02::1", "fd00:ec2::254",
    "fd20:ce::254", "2002:7f00:1::1", "2002:a9fe:a9fe::", "2001:0:1::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
)  # fmt: skip
PRIVATE = (
    "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1", "198.18.0.1",
    "192.0.2.7", "198.51.100.1", "203.0.113.1", "192.88.99.1", "fd12::1", "fc00::1", "2001:db8::1", "64:ff9b::a00:1",
    "4000::1", "3fff::1", "100::1",
)  # fmt: skip


@pytest.mark.parametrize("text", PUBLIC)
def test_public(text: str) -> None:
    """Reached with host-egress and with *, and by no other rule that does not name it."""
    address = ip_address(text)
    assert is_public(address)
    assert not is_forbidden(address)
    assert Network.host_egress().may_connect(address, 443)
    assert Network.allow("*").may_connect(address, 443)
    assert Network.allow("*:443").may_connect(address, 443)
    assert not Network.allow("*:443").may_connect(address, 80)
    assert not Network.allow("example.com").may_connect(address, 443)
    assert not Network.none().may_connect(address, 443)


@pytest.mark.parametrize("text", NEVER)
def test_never(text: str) -> None:
    """Nothing that can be written allows it."""
    address = ip_address(text)
    everything = Network.allow("*", "0.0.0.0/0", "::/0", "evil.example.com")
    assert is_forbidden(address)
    assert not is_public(address)
    assert not everything.may_connect(address, 80, ["evil.example.com"])
    assert not everything.may_show(address)
    assert not Network.host_egress().may_connect(address, 80)


@pytest.mark.parametrize("text", PRIVATE)
def test_private(text: str) -> None:
    """Only where a rule names the address: a name that leads there is not enough."""
    address = ip_address(text)
    assert not is_public(address)
    assert not Network.host_egress().may_connect(address, 80)
    assert not Network.allow("*", "db.example.com").may_connect(address, 80, ["db.example.com"])
    assert not Network.allow("db.example.com").may_show(address)
    named = Network.allow(f"[{text}]:80" if ":" in text else f"{text}:80", "db.example.com")
    if not is_forbidden(address):
        assert named.may_connect(address, 80)
        assert named.may_show(address)
        assert not named.may_connect(address, 81, ["db.example.com"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("PyPI.org:443", "pypi.org:443"), ("pypi.org", "pypi.org"), ("pypi.org:*", "pypi.org"),
        ("pypi.org.:443", "pypi.org:443"), ("*.example.com", "*.example.com"), ("*", "*"), ("*:443", "*:443"),
        ("10.1.2.3:5432", "10.1.2.3:5432"), ("10.0.0.0/8", "10.0.0.0/8"), ("10.0.0.0/8:1-1024", "10.0.0.0/8:1-1024"),
        ("[fd12::1]:443", "[fd12::1]:443"), ("fd12::1", "[fd12::1]"), ("[fd12::/16]:80", "[fd12::/16]:80"),
        ("a_b.example.com", "a_b.example.com"), ("intranet:80", "intranet:80"),
    ],
)  # fmt: skip
def test_written(text: str, shown: str) -> None:
    """One meaning, one form; the form means the same again."""
    rule = Rule.parse(text)
    assert str(rule) == shown
    assert Rule.parse(shown) == rule


@pytest.mark.parametrize(
    "entry",
    [
        "", ":80", "*.", "*.*", "a.*.com", "-a.com", "a-.com", "a..b", "http://example.com", "example.com/path",
        "example.com:0", "example.com:65536", "example.com:80-79", "example.com:http", "example.com:", "exa mple.com",
        "bücher.example", "user@example.com", "10.1.2.3/8", "127.0.0.1:80", "127.0.0.0/8", "169.254.169.254",
        "[::1]:80",
        "224.0.0.0/4", "1.2.3", "0177.0.0.1", "2130706433", "a" * 64 + ".com", "[example.com]:80", "[fd12::1", 7, None,
        "\0", "example.com:\uff18\uff10",
    ],
)  # fmt: skip
def test_wrong(entry: object) -> None:
    """Each with an error that names the argument and shows the entry."""
    with pytest.raises(InvalidRequest) as error:
        Network.allow("pypi.org", entry)  # type: ignore[arg-type]
    assert error.value.details["argument"] == "network"


@pytest.mark.parametrize(
    "value", ["loopback", "bridge", "", b"none", 7, None, ["pypi.org", 7], {"pypi.org": 1}]
)
def test_wrong_values(value: object) -> None:
    """Wherever a VM is described."""
    with pytest.raises(InvalidRequest):
        VmSpec(network=value)  # type: ignore[arg-type]


def test_values() -> None:
    """Plain values stand for a Network; equal ones are equal, and so are the specs that hold them."""
    assert VmSpec().network == Network() == Network.none()
    assert VmSpec(network="host-egress").network == Network.host_egress()  # type: ignore[arg-type]
    spec = VmSpec(network=["pypi.org:443", "PYPI.org:443"])  # type: ignore[arg-type]
    assert spec.network == Network.allow("pypi.org:443")
    assert spec == VmSpec(network=Network.allow("pypi.org:443"))
    assert spec != VmSpec()
    assert hash(spec.network)
    assert pickle.loads(pickle.dumps(spec.network)) == spec.network
    assert [bool(one) for one in (Network.none(), Network.allow(), Network.host_egress(), spec.network)] == [
        False, False, True, True,
    ]  # fmt: skip
    with pytest.raises(InvalidRequest):
        Network.allow(*(f"n{number}.example.com" for number in range(1001)))
    with pytest.raises(InvalidRequest):
        Network("host-egress", (Rule.parse("a.example"),))


def test_names() -> None:
    """A wildcard is one label or more, never the name itself, and never the end of another label."""
    network = Network.allow("*.example.com:443", "pypi.org")
    for name, may in {
        "a.example.com": True, "a.b.example.com": True, "example.com": False, "evilexample.com": False,
        "example.com.evil.org": False, "pypi.org": True, "www.pypi.org": False, "": False,
    }.items():  # fmt: skip
        assert network.may_resolve(name) is may, name
    address = ip_address("8.8.8.8")
    assert network.may_connect(address, 443, ["a.example.com"])
    assert not network.may_connect(address, 80, ["a.example.com"])
    assert network.may_connect(address, 80, ["a.example.com", "pypi.org"])
    assert Network.host_egress().may_resolve("anything.at.all")
    assert not Network.none().may_resolve("anything.at.all")


@pytest.mark.parametrize(
    "text",
    [
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "1.2.3.4.5",
        "fe80::1%lo",
        "",
        "[::1]",
        "1.2.3.4 ",
        "localhost",
    ],
)
def test_only_the_usual_forms_are_addresses(text: str) -> None:
    """The others are names, which no server knows."""
    assert parse(text) is None


def test_routes() -> None:
    """What the VM's own routing table refuses is refused anyhow; what the rules allow, it accepts."""
    assert Network.none().routes() == Network.allow().routes() == []
    for network in (
        Network.host_egress(), Network.allow("*"), Network.allow("a.example", "10.0.0.0/7", "fd12::/16"),
        Network.allow("10.1.2.3:80"), Network.allow("0.0.0.0/0"),
    ):  # fmt: skip
        table = [(ip_network(text), accept) for accept, text in network.routes()]
        for text in (*PUBLIC, *PRIVATE, *NEVER):
            address = ip_address(text)
            fitting = [(one.prefixlen, accept) for one, accept in table if address in one]
            accepted = max(fitting)[1] if fitting else False
            allowed = network.may_connect(address, 80)
            assert accepted or not allowed, (network, text)
            if any(address in one for one in FORBIDDEN):
                assert not accepted, (network, text)
