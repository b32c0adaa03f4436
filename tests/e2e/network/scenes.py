"""What the tests of a VM's network do, each a scene in the small internet of `internet`. Run by `test_network`."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "src")]

from internet import DNS, HOST, HOST6, METADATA, OTHER, PRIVATE, WEB, WEB6  # noqa: E402

from agentos import VM, Host, Limits, Network  # noqa: E402
from agentos.linux import netlink  # noqa: E402
from agentos.network import egress, gate  # noqa: E402

SOURCE = str(HERE.parents[2] / "src")
SCENES: dict[str, Callable[[], Awaitable[None]]] = {}
PROXY = "http://127.0.0.53:3128"
NAMES = Network.allow("web.example.com:80", "*.example.org:80", f"{PRIVATE}:7", "text.example.com")


def scene(body: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Enter a scene under its name."""
    SCENES[body.__name__] = body
    return body


def on_network(network: Any, **options: Any) -> Callable[..., Any]:
    """A scene with a VM of this network, and a host of its own: `body(vm, host)`."""

    def enter(body: Callable[[VM, Host], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        @functools.wraps(body)
        async def with_vm() -> None:
            async with Host() as host, VM(network=network, host=host, **options) as vm:
                await body(vm, host)

        return scene(with_vm)

    return enter


async def out(vm: VM, command: str, **options: Any) -> str:
    """The output of a command that succeeds."""
    return (await vm.exec(command, timeout=20, **options)).check().stdout


async def fails(vm: VM, command: str, *words: str) -> None:
    """A command fails by itself, without waiting for anything that does not come, and says one of `words`."""
    result = await vm.exec(command, timeout=30)
    said = result.stdout + result.stderr
    assert result.exit_code != 0, f"{command}: {result}"
    assert result.reason == "exited", f"{command}: {result}"
    assert not words or any(word in said for word in words), f"{command}: {said}"


def python(code: str) -> str:
    """A command that runs `code` with python in the VM."""
    return f"python3 - <<'END'\n{textwrap.dedent(code)}\nEND"


# -- what works


@on_network("host-egress")
async def programs_just_work(vm: VM, host: Host) -> None:
    """Programs that know of no proxy reach what is public: by name, by address, over IPv6."""
    assert "env" not in await out(vm, "env | grep -i proxy || true")
    assert f"here={WEB} host=web.example.com" in await out(vm, "curl -sSf4 http://web.example.com/")
    assert f"here={WEB6}" in await out(vm, "curl -sSf6 http://web.example.com/")
    assert f"here={WEB6}" in await out(vm, "curl -sSf http://v6.example.com/")
    assert f"here={WEB} " in await out(vm, f"curl -sSf http://{WEB}/")
    assert f"here={WEB} " in await out(vm, f"curl -sSf 'http://[::ffff:{WEB}]/'")
    assert f"here={WEB6} " in await out(vm, f"curl -sSf 'http://[{WEB6}]/'")
    assert f"here={WEB} " in await out(vm, "curl -sSf4 http://alias.example.com/")
    fetched = """
        import hashlib, urllib.request
        body = bytes(range(256)) * 8192
        said = urllib.request.urlopen("http://web.example.com/", data=body, timeout=10).read().decode()
        assert said == hashlib.sha256(body).hexdigest(), said
        print("same")
    """
    assert await out(vm, python(fetched)) == "same\n"
    js = "fetch('http://web.example.com/n').then(r => r.text()).then(t => process.stdout.write(t))"
    assert "path=/n" in await out(vm, f'node -e "{js}"')
    assert await out(vm, "git clone -q http://web.example.com/git/repo.git && cat repo/README") == "cloned\n"
    raw = "exec 3<>/dev/tcp/other.example.org/7; echo raw >&3; head -1 <&3"
    assert await out(vm, raw) == "raw\n"
    assert (
        await out(vm, "whoami; curl -sSf http://web.example.com/ >/dev/null && echo ok", user="root")
        == "root\nok\n"
    )
    traffic = host.traffic
    assert traffic.connections >= 10
    assert traffic.received_bytes > 1000
    assert traffic.sent_bytes > 2**21
    assert not traffic.refused, traffic.refused


@on_network("host-egress")
async def names(vm: VM, host: Host) -> None:
    """The name server in the VM: both kinds of address, other records, long answers, what is not there."""
    resolve = """
        import socket, struct
        def ask(name, kind, tcp=False, number=7):
            labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
            query = struct.pack(">HHHHHH", number, 0x100, 1, 0, 0, 0) + labels + b"\\0" + struct.pack(">HH", kind, 1)
            if tcp:
                with socket.create_connection(("127.0.0.53", 53), 10) as sock:
                    sock.sendall(struct.pack(">H", len(query)) + query)
                    size = struct.unpack(">H", sock.recv(2, socket.MSG_WAITALL))[0]
                    return sock.recv(size, socket.MSG_WAITALL)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(10)
                sock.sendto(query, ("127.0.0.53", 53))
                return sock.recv(4096)
        code = lambda reply: reply[3] & 15
        count = lambda reply: struct.unpack_from(">H", reply, 6)[0]
        assert count(ask("WEB.Example.Com", 1)) == 1
        assert b"hello" in ask("text.example.com", 16)
        many = ask("many.example.com", 1)
        assert many[2] & 2 and len(many) <= 512 and 0 < count(many) < 60, many
        assert count(ask("many.example.com", 1, tcp=True)) == 60
        assert code(ask("nobody.example.com", 1)) == 3
        assert code(ask("nobody.example.com", 16)) == 3
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            looped = struct.pack(">HHHHHH", 9, 0x100, 1, 0, 0, 0) + b"\\xc0\\x0c"
            for rubbish in (b"\\0", b"\\0" * 11, b"\\7" * 12, looped):
                sock.sendto(rubbish, ("127.0.0.53", 53))
            assert sock.recv(512)[3] & 15 == 1  # format error, for those that have a header
        print("fine")
    """
    assert await out(vm, python(resolve)) == "fine\n"
    assert len((await out(vm, "getent ahostsv4 many.example.com")).splitlines()) >= 60
    assert host.traffic.lookups >= 8


@on_network(NAMES)
async def allow_list(vm: VM, host: Host) -> None:
    """What the list names, and nothing else: by name and port, wildcard, private address."""
    assert f"here={WEB} " in await out(vm, "curl -sSf4 http://web.example.com/")
    assert f"here={OTHER} " in await out(vm, "curl -sSf http://other.example.org/")
    assert await out(vm, f"exec 3<>/dev/tcp/{PRIVATE}/7; echo raw >&3; head -1 <&3") == "raw\n"
    await fails(vm, "curl -sS http://v6.example.com/", "resolve")
    await fails(vm, "curl -sS http://example.org/", "resolve")
    await fails(vm, "curl -sS http://evilweb.example.com.other/", "resolve")
    await fails(vm, "curl -sS4 http://web.example.com:7/", "reset", "refused", "connect")
    await fails(vm, f"curl -sS http://{PRIVATE}/", "reset", "refused", "connect")
    await fails(vm, "curl -sS http://10.1.2.4/", "connect")
    await fails(vm, f"curl -sS http://{DNS}/", "reset", "refused", "connect")
    assert host.traffic.refused["not-allowed"] >= 6, host.traffic


@on_network(["web.example.com:80", "web.example.com:443"])
async def https(vm: VM, host: Host) -> None:
    """TLS from end to end: curl, Python, pip, Node, npm and git verify the server itself; other servers are refused."""
    assert "BEGIN CERTIFICATE" in await out(vm, "curl -sSf http://web.example.com/ca.pem | tee /tmp/ca.pem")
    await fails(vm, "curl -sS https://web.example.com/", "certificate")
    trusted = dict.fromkeys(
        ("CURL_CA_BUNDLE", "SSL_CERT_FILE", "PIP_CERT", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO"),
        "/tmp/ca.pem",
    )

    async def says(command: str) -> str:
        return await out(vm, command, env=trusted)

    assert f"here={WEB} host=web.example.com" in await says("curl -sSf4 https://web.example.com/")
    fetched = "import urllib.request as u; print(u.urlopen('https://web.example.com/py', timeout=10).read().decode())"
    assert "path=/py" in await says(python(fetched))
    pip = "v/bin/pip install -q --isolated --disable-pip-version-check --cert /tmp/ca.pem"
    await says(f"python3 -m venv v && {pip} --index-url https://web.example.com/simple tiny")
    assert await says("v/bin/python -c 'import tiny; print(tiny.said)'") == "tiny from a wheel\n"
    js = "fetch('https://web.example.com/js').then(r => r.text()).then(t => process.stdout.write(t))"
    assert "path=/js" in await says(f'node -e "{js}"')
    npm = "npm install --registry https://web.example.com/npm --cafile /tmp/ca.pem --no-audit --no-fund"
    await says(f"mkdir js && cd js && {npm} --no-update-notifier tiny")
    assert await says("cd js && node -p 'require(\"tiny\")'") == "tiny from a tarball\n"
    assert await says("git clone -q https://web.example.com/git/repo.git && cat repo/README") == "cloned\n"
    assert f"here={WEB}" in await says(f"curl -sSf4 -x {PROXY} https://web.example.com/")
    assert not host.traffic.refused, host.traffic
    # What is allowed is the name's address, whatever name a program gives to the server there.
    borrowed = f"curl -sSk --resolve web.example.com:443:{OTHER}"
    await fails(vm, f"{borrowed} https://web.example.com/", "Permission denied", "connect")
    await fails(vm, "curl -sSk https://other.example.org/", "resolve")
    await fails(vm, f"curl -sSk -x {PROXY} https://other.example.org/", "403")
    for one in (METADATA, HOST, f"[{HOST6}]", PRIVATE, "[::ffff:169.254.169.254]"):
        await fails(vm, f"curl -sSk https://{one}/", "connect")
        await fails(vm, f"curl -sSk -x {PROXY} https://{one}/", "403")


@on_network(["*.example.com:80", "other.example.org:80", f"{PRIVATE}:7"])
async def refused_by_the_kernel(vm: VM, host: Host) -> None:
    """Where no name has led yet, connect(2) fails at once with EACCES; also where it is too long ago."""
    gate.MOST_REMEMBERED = 3
    code = f"""
        import errno, socket
        def reach(address, port=80):
            try:
                with socket.create_connection((address, port), 10):
                    return "connected"
            except OSError as error:
                return errno.errorcode[error.errno]
        places = ("{WEB}", "{WEB6}", "{OTHER}")
        print(*(reach(one) for one in (*places, "8.8.8.8", "10.9.9.9", "{METADATA}")))
        socket.getaddrinfo("web.example.com", 80)
        print(*(reach(one) for one in places))
        socket.getaddrinfo("other.example.org", 80)
        print(*(reach(one) for one in places))
        socket.getaddrinfo("many.example.com", 80)
        print(*(reach(one) for one in places))
        socket.getaddrinfo("web.example.com", 80)
        print(*(reach(one) for one in places))
        print(reach("{PRIVATE}", 7))
    """
    said = (await out(vm, python(code))).splitlines()
    assert said == [
        "EACCES EACCES EACCES EACCES EACCES EACCES",
        "connected connected EACCES",
        "connected connected connected",
        "EACCES EACCES EACCES",
        "connected connected EACCES",
        "connected",
    ], said


@on_network([])
async def an_empty_list(vm: VM, host: Host) -> None:
    """It allows nothing; like no network at all."""
    await fails(vm, f"curl -sS http://{WEB}/", "connect")
    await fails(vm, "curl -sS http://web.example.com/", "resolve")


@on_network("none")
async def nothing(vm: VM, host: Host) -> None:
    """No network: no name, no address, nothing to listen on was made."""
    await fails(vm, f"curl -sS http://{WEB}/", "connect")
    await fails(vm, f"curl -sS 'http://[{WEB6}]/'", "connect")
    await fails(vm, "curl -sS http://web.example.com/", "resolve")
    await fails(vm, f"curl -sS -x {PROXY} http://web.example.com/", "connect")
    assert host.traffic.lookups == host.traffic.connections == 0


# -- what never works

LITERALS = (
    METADATA, "127.0.0.1", HOST, "0.0.0.0", "255.255.255.255", "224.0.0.1", "192.168.77.255", PRIVATE, "100.64.7.7",
    "100.100.100.200", "168.63.129.16", f"[::ffff:{METADATA}]", f"[::ffff:{HOST}]", "[fd00:ec2::254]", f"[{HOST6}]",
    "[64:ff9b::a9fe:a9fe]", "[64:ff9b::a01:203]", "[2002:7f00:1::1]", "[::1]", "[fe80::1]", "[ff02::1]", "[::]",
)  # fmt: skip
TRICKS = (
    "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "0x7f.1", "2130706433", "0177.0.0.1",
    "0300.0250.0115.1", "3232255233", "localhost",
)  # fmt: skip
BAD_NAMES = (
    "metadata.google.internal", "loop.example.com", "host.example.com", "mapped.example.com", "amazon.example.com",
    "private.example.com", "sixtofour.example.com", "nat64.example.com",
)  # fmt: skip


async def secrets() -> list[asyncio.Server]:
    """Services of the host, on loopback and on its own addresses, port 80 (as root) and 8080."""

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readline()).strip():
            pass
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nthe secret of the host\n")
        await writer.drain()
        writer.close()

    ports = [8080, 80] if os.getuid() == 0 else [8080]
    return [
        await asyncio.start_server(tell, address, port)
        for address in ("127.0.0.1", "::1", HOST, HOST6)
        for port in ports
    ]


async def forbidden(network: Any) -> None:
    """Whatever way a program asks, neither the host's services nor metadata nor private addresses answer."""
    servers = await secrets()
    async with Host() as host, VM(network=network, host=host) as vm:
        urls = [f"http://{one}:{port}/" for one in (*LITERALS, *TRICKS, *BAD_NAMES) for port in (80, 8080)]
        for via in (
            "",
            f"-x {PROXY}",
            "-x socks5://127.0.0.53:3128",
            "-x socks5h://127.0.0.53:3128",
            f"-p -x {PROXY}",
        ):
            lines = "\n".join(f"curl -gsS -m 10 -o - {via} '{url}' 2>&1; echo \"= $?\"" for url in urls)
            result = await vm.exec(lines, timeout=120)
            # Through the proxy a 403 is an answer, of which curl is happy: what counts is what it says.
            assert "secret" not in result.stdout, (via, result.stdout)
            assert "here=" not in result.stdout, (via, result.stdout)
            assert result.stdout.count("= ") == len(urls), (via, result)
            assert result.reason == "exited", (via, result)
            if not via:
                assert "= 0" not in result.stdout, result.stdout
        assert host.traffic.refused["forbidden-address"] >= 20, host.traffic
        assert host.traffic.refused["host-address"] >= (2 if network != "host-egress" else 0), host.traffic
        assert host.traffic.connections == 0, host.traffic
    for server in servers:
        server.close()
        await server.wait_closed()


@scene
async def forbidden_to_all() -> None:
    """With every public address allowed."""
    await forbidden("host-egress")


@scene
async def forbidden_even_if_listed() -> None:
    """With a list that has the host's own network in it, and every name: its addresses are not reached."""
    await forbidden(["*", "192.168.0.0/16", "fd77::/64"])


@scene
async def without_the_checks() -> None:
    """The other scenes can fail: with the checks switched off, what must not be reached is."""
    servers = await secrets()
    async with Host() as host, VM(network=["10.0.0.0/8"], host=host) as vm:
        assert vm._egress is not None
        vm._egress.gate.check = lambda *anything: None  # type: ignore[method-assign]
        for one in ("127.0.0.1", HOST, f"[{HOST6}]", "[::1]"):
            assert "secret of the host" in await out(vm, f"curl -gsS -x {PROXY} http://{one}:8080/"), one
        for one in (METADATA, "10.1.2.3", "[fd00:ec2::254]", "[64:ff9b::a01:203]", "168.63.129.16"):
            assert "here=" in await out(vm, f"curl -gsS -x {PROXY} http://{one}/"), one
        assert "here=" in await out(vm, "curl -sS http://10.1.2.3/")
    for server in servers:
        server.close()
        await server.wait_closed()


@on_network("host-egress")
async def rebinding(vm: VM, host: Host) -> None:
    """A name that is public when asked first, and metadata when asked again, leads nowhere but to the public one."""
    code = f"""
        import socket, urllib.request
        proxy = urllib.request.build_opener(urllib.request.ProxyHandler({{"http": "{PROXY}"}}))
        plain = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))
        for opener in (proxy, plain) * 10:
            try:
                said = opener.open("http://rebind.example.com/", timeout=10).read().decode()
            except OSError as error:
                said = str(error)
            assert "here={METADATA}" not in said, said
        print("safe")
    """
    assert await out(vm, python(code)) == "safe\n"
    assert host.traffic.refused["forbidden-address"] >= 5, host.traffic
    assert f"here={WEB} " in await out(vm, "curl -sSf4 http://mixed.example.com/")
    for path in ("to-metadata", "to-private"):
        await fails(vm, f"curl -sSL4 http://web.example.com/{path}", "connect", "resolve")
        said = await out(vm, f"curl -sSL -x {PROXY} http://web.example.com/{path}")
        assert "agentos:" in said, said
        assert "here=" not in said, said


@on_network(NAMES)
async def proxy(vm: VM, host: Host) -> None:
    """The proxy by hand: absolute form, CONNECT, SOCKS5; a Host that says something else; readable refusals."""
    via = f"curl -sS -x {PROXY}"
    assert f"here={WEB} host=web.example.com" in await out(vm, f"{via} http://web.example.com/")
    assert "host=web.example.com " in await out(
        vm, f"{via} -H 'Host: secret.example.com' http://web.example.com/"
    )
    assert f"here={WEB} " in await out(vm, f"{via} -p http://web.example.com/")
    assert f"here={WEB} " in await out(vm, "curl -sSf -x socks5h://127.0.0.53:3128 http://web.example.com/")
    said = await out(vm, f"{via} -i http://v6.example.com/")
    assert said.startswith("HTTP/1.1 403 Forbidden")
    assert "v6.example.com: the network rules" in said
    await fails(vm, f"{via} -p http://v6.example.com/", "403")
    await fails(vm, "curl -sS -x socks5h://127.0.0.53:3128 http://v6.example.com/", "connection")
    assert "400" in await out(vm, f"{via} -i ftp://web.example.com/")
    talk = """
        import socket
        def say(data, half=False):
            with socket.create_connection(("127.0.0.53", 3128), 20) as sock:
                sock.sendall(data)
                if half:
                    sock.shutdown(socket.SHUT_WR)
                said = b""
                try:
                    while more := sock.recv(65536):
                        said += more
                except ConnectionResetError:
                    said += b"<reset>"
                return said
        long = b"a" * 300
        assert b" 403 " in say(b"CONNECT 127.0.0.1:22 HTTP/1.1\\r\\nHost: web.example.com:80\\r\\n\\r\\n")
        assert b" 403 " in say(b"GET http://" + long + b"/ HTTP/1.1\\r\\nHost: web.example.com\\r\\n\\r\\n")
        assert b" 400 " in say(b"GET / HTTP/1.1\\r\\nHost: web.example.com\\r\\n\\r\\n")
        assert b" 400 " in say(b"CONNECT web.example.com HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        assert b" 400 " in say(b"GET http://user:pw@web.example.com/ HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        assert b" 400 " in say(b"\\x16\\x03\\x01 rubbish\\r\\n\\r\\n")
        assert b" 431 " in say(b"GET http://web.example.com/ HTTP/1.1\\r\\nX: " + b"y" * 100_000 + b"\\r\\n\\r\\n")
        smuggled = b"GET http://web.example.com/one HTTP/1.1\\r\\nHost: web.example.com\\r\\n\\r\\n"
        smuggled += b"GET http://v6.example.com/two HTTP/1.1\\r\\nHost: v6.example.com\\r\\n\\r\\n"
        assert say(smuggled).count(b"here=") == 1, say(smuggled)
        assert say(b"\\x05\\x01\\x02") == b"\\x05\\xff"
        bind = b"\\x05\\x01\\x00" + b"\\x05\\x02\\x00\\x01" + bytes(6)
        assert say(bind)[2:4] == b"\\x05\\x07"
        say(b"\\x05\\x01\\x00\\x05\\x01\\x00\\x03\\xff" + long, half=True)
        say(b"", half=True)
        print("fine")
    """
    assert await out(vm, python(talk)) == "fine\n"


@on_network(["*.example.org:80"])
async def names_that_are_others_on_the_way(vm: VM, host: Host) -> None:
    """What ends in an allowed name here, and would be another in a message to the name server, is no name."""
    code = """
        import socket
        for name in (b"a.evil.com...\\0.x.example.org", b"a..example.org", b"." + b"b.example.org", b"a\\0.example.org",
                     b"l" * 200 + b".example.org", b"a b.example.org", b"a\\r\\n.example.org"):
            with socket.create_connection(("127.0.0.53", 3128), 20) as sock:
                sock.sendall(b"\\5\\1\\0\\5\\1\\0\\3" + bytes([len(name)]) + name + b"\\0\\x50")
                said = b""
                while more := sock.recv(64):
                    said += more
            assert said[2:4] == b"\\5\\2", (name, said)
        print("fine")
    """
    assert await out(vm, python(code)) == "fine\n"


@on_network(["*.example.org:80"])
async def questions_without_a_pause(vm: VM, host: Host) -> None:
    """A guest that asks over TCP as fast as it can, and reads the answers, does not have the event loop for itself."""
    code = """
        import socket, threading, time
        query = b"\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4evil\\3com\\0\\0\\1\\0\\1"
        many = (len(query).to_bytes(2, "big") + query) * 2000
        sock = socket.create_connection(("127.0.0.53", 53), 20)
        def read():
            while sock.recv(1 << 20):
                pass
        threading.Thread(target=read, daemon=True).start()
        sock.settimeout(3)
        try:
            while True:
                sock.sendall(many)
        except TimeoutError:
            pass
    """
    process = await vm.spawn("python3", ["-c", textwrap.dedent(code)])
    loop = asyncio.get_running_loop()
    longest, before = 0.0, host.traffic.lookups
    began = last = loop.time()
    while last - began < 2:
        await asyncio.sleep(0.01)
        longest, last = max(longest, loop.time() - last), loop.time()
    assert longest < 1, f"nothing else was done for {longest:.1f} s"
    assert 0 < host.traffic.lookups - before < 2000, "500 in a second are taken"
    await process.kill()


@on_network("host-egress")
async def udp_is_refused(vm: VM, host: Host) -> None:
    """Anything over UDP but DNS at the VM's own server is refused at once."""
    code = f"""
        import socket
        for address in ("{DNS}", "{WEB}"):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(10)
                sock.connect((address, 53))
                sock.send(b"hello")
                try:
                    sock.recv(10)
                except ConnectionRefusedError:
                    print("refused")
    """
    assert await out(vm, python(code)) == "refused\nrefused\n"


@on_network("host-egress")
async def the_guest_cannot_change_it(vm: VM, host: Host) -> None:
    """Neither user has the privilege: no route, no rule, no address, no raw packet, no transparent socket."""
    code = """
        import socket, struct
        for what in (
            lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
            lambda: socket.socket().setsockopt(0, 19, 1),
            lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12),
        ):
            try:
                what()
            except OSError as error:
                print(error.errno in (1, 13, 93, 97))
            else:
                print("possible")
    """
    for user in ("agentos", "root"):
        assert await out(vm, python(code), user=user) == "True\n" * 4
        for change in (
            "ip route add local 169.254.169.254/32 dev lo", "ip route flush table main",
            "ip address add 8.8.8.8/32 dev lo", "ip link set lo down",
        ):  # fmt: skip
            result = await vm.exec(f"PATH=$PATH:/sbin:/usr/sbin {change}", user=user)
            assert result.exit_code != 0, (user, result)
            assert "not permitted" in result.stderr, (user, result)


# -- how it behaves


@on_network("host-egress")
async def large_and_half_closed(vm: VM, host: Host) -> None:
    """A large answer arrives whole; an end of what is sent is passed on while the answer still comes."""
    assert await out(vm, "curl -sSf http://web.example.com/big/50000000 | wc -c") == "50000000\n"
    half = f"""
        import socket, threading, hashlib
        data = bytes(range(256)) * 40_000
        with socket.create_connection(("{OTHER}", 7)) as sock:
            def send():
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            threading.Thread(target=send).start()
            got = b""
            while more := sock.recv(65536):
                got += more
        print(got == data)
    """
    assert await out(vm, python(half)) == "True\n"
    await until(lambda: host.traffic.open == 0)


async def until(true: Callable[[], bool]) -> None:
    """Wait until it is true: there is no event for a number."""
    async with asyncio.timeout(40):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@on_network("host-egress")
async def slow_readers(vm: VM, host: Host) -> None:
    """Who sends to one that does not read is held up; the host keeps none of it in its own memory."""
    before = resident()
    code = f"""
        import socket
        sent = 0
        socks = []
        for _ in range(40):
            sock = socket.create_connection(("{OTHER}", 9))
            sock.settimeout(0.1)
            socks.append(sock)
            try:
                while sent < 2**32:
                    sent += sock.send(b"x" * 65536)
            except TimeoutError:
                pass
        print(sent < 2**31, flush=True)
        input()
    """
    process = await vm.spawn("python3", ["-c", textwrap.dedent(code)])
    page = await process.read_output(wait=30)
    assert page.events[0].data == b"True\n", page
    assert resident() - before < 8 * 2**20, (before, resident())
    assert host.traffic.open == 40
    await process.write_stdin("\n")
    await process.wait()


def resident() -> int:
    """This process's own memory in bytes."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


@on_network("host-egress", limits=Limits(network_connections=32))
async def floods(vm: VM, host: Host) -> None:
    """More connections than there may be wait, refused ones are paced; another VM and the loop are not held up."""
    hold = f"""
        import socket, time
        socks = []
        for _ in range(200):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("{OTHER}", 7))
            socks.append(sock)
        print("held", flush=True)
        input()
    """
    told: list[Any] = []
    vm.on_limit = told.append
    process = await vm.spawn("python3", ["-c", textwrap.dedent(hold)])
    await process.read_output(wait=30)
    await until(lambda: host.traffic.open == 32)
    await until(lambda: bool(told))
    assert [(one.limit, one.value) for one in told] == [("network_connections", 32)]
    assert host.traffic.descriptors == 64
    async with VM(network="host-egress", host=host) as neighbour:
        assert f"here={WEB} " in await out(neighbour, "curl -sSf4 http://web.example.com/")
    await process.kill()
    await until(lambda: host.traffic.open == 0)
    assert f"here={WEB} " in await out(vm, "curl -sSf4 http://web.example.com/")
    flood = """
        import socket, time
        end = time.monotonic() + 2
        tries = 0
        while time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.53", 1), 1) as sock:
                    sock.recv(1)
            except OSError:
                pass
            tries += 1
    """
    await out(vm, python(flood))
    refused = host.traffic.refused.total()
    assert 20 < refused < 4 * egress.CONNECTIONS_PER_SECOND, refused


@on_network("host-egress")
async def the_host_keeps_descriptors(vm: VM, host: Host) -> None:
    """All VMs together leave half of the host's descriptors to it: who comes too late waits until some are free."""
    host.traffic.most_descriptors = 20
    hold = f"""
        import socket
        socks = [socket.create_connection(("{OTHER}", 7)) for _ in range(15)]
        print("held", flush=True)
        input()
    """
    process = await vm.spawn("python3", ["-c", textwrap.dedent(hold)])
    await process.read_output(wait=30)
    await until(lambda: host.traffic.open == 10)
    async with VM(network="host-egress", host=host) as neighbour:
        waiting = asyncio.create_task(out(neighbour, f"curl -sSf http://{WEB}/"))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        assert host.traffic.open == 10
        await process.kill()
        assert f"here={WEB} " in await waiting
    await until(lambda: host.traffic.descriptors == 0)


@on_network("host-egress")
async def slow_names_and_silent_clients(vm: VM, host: Host) -> None:
    """A name server that does not answer, and clients of the proxy that say nothing, hold up nobody else."""
    code = """
        import socket
        udp = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(200)]
        query = b"\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4slow\\7example\\3com\\0\\0\\1\\0\\1"
        for sock in udp:
            sock.sendto(query, ("127.0.0.53", 53))
        silent = [socket.create_connection(("127.0.0.53", 3128)) for _ in range(100)]
        failed = 0
        for sock in udp:
            sock.settimeout(0.05)
            try:
                failed += sock.recv(512)[3] & 15 == 2
            except TimeoutError:
                pass
        print(failed, flush=True)
        input()
    """
    process = await vm.spawn("python3", ["-c", textwrap.dedent(code)])
    page = await process.read_output(wait=40)
    assert 100 <= int(page.events[0].data) <= 200, page
    assert f"here={WEB} " in await out(vm, f"curl -sSf http://{WEB}/")
    await process.kill()


@scene
async def nothing_is_left() -> None:
    """Descriptors and tasks of a VM's network end with it, also with connections open and questions asked."""
    async with Host() as host:
        await (await VM(network="host-egress", host=host).start()).close()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            vm = await VM(network="host-egress", host=host).start()
            code = f"exec 3<>/dev/tcp/{OTHER}/7 4<>/dev/tcp/127.0.0.53/3128; echo ready; getent hosts slow.example.com"
            process = await vm.spawn("bash", ["-c", code])
            await process.read_output(wait=20)
            await until(lambda: host.traffic.open == 2)
            await vm.close()
            await asyncio.sleep(0)
            await until(lambda: host.traffic.open == 0)
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(asyncio.all_tasks()) == 1, asyncio.all_tasks()


@scene
async def without_packet_rules() -> None:
    """Where connections cannot be diverted, programs find the proxy by their environment."""
    async with Host() as host:
        vm = VM(network=NAMES, host=host)
        begin = vm._begin_egress

        def without(of: Host) -> None:
            for name in ("tcp", "tcp6", "routes"):
                vm.link.outlets.pop(name).close()
            begin(of)

        vm._begin_egress = without  # type: ignore[method-assign]
        async with vm:
            assert f"http_proxy={PROXY}" in await out(vm, "env")
            assert f"here={WEB} " in await out(vm, "curl -sSf http://web.example.com/")
            assert "path=/u" in await out(
                vm,
                python(
                    "import urllib.request as u; print(u.urlopen('http://web.example.com/u').read().decode())"
                ),
            )
            assert (
                await out(vm, "git clone -q http://web.example.com/git/repo.git && cat repo/README")
                == "cloned\n"
            )
            said = await out(vm, "curl -sS http://v6.example.com/")
            assert "agentos: v6.example.com: the network rules of this VM do not allow it" in said
            server = await vm.spawn("python3", ["-u", "-m", "http.server", "8000"])
            await server.read_output(wait=20)
            assert "Directory listing" in await out(vm, "curl -sSf http://127.0.0.1:8000/")
            await server.kill()


@scene
async def through_the_server() -> None:
    """A server's VMs have the network of their kind, those of the pool too; its log and metrics tell of it."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["-m", "agentos", "serve", "--port", "0", "--data-dir", directory, "--pool", "1"]
        allowed = ["--network", "web.example.com:80", "--network", "*.example.org"]
        server = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            *allowed,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": SOURCE},
        )
        assert server.stderr is not None
        log = [json.loads(await server.stderr.readline())]
        while log[-1]["message"] != "listening":
            log.append(json.loads(await server.stderr.readline()))
        url = f"http://127.0.0.1:{log[-1]['port']}"

        def ask(path: str, body: Any = None) -> bytes:
            data = None if body is None else json.dumps(body).encode()
            with urllib.request.urlopen(url + path, data, timeout=30) as answer:
                said: bytes = answer.read()
                return said

        for key in ("pooled", "fresh", "another"):
            path = f"/gateway/vm/action/exec?rvt-method=getOrCreate&rvt-namespace=default&rvt-key={key}"
            urls = f"http://web.example.com/; curl -sS http://v6.example.com/; curl -sS -x {PROXY} {WEB}"
            command_line = f"curl -sSf4 {urls}"
            answer = json.loads(await asyncio.to_thread(ask, path, {"args": [command_line]}))["output"]
            assert f"here={WEB} " in answer["stdout"], answer
            assert "not resolve host: v6.example.com" in answer["stderr"], answer
        metrics = (await asyncio.to_thread(ask, "/metrics")).decode()
        assert "agentos_network_connections_total 6.0" in metrics, metrics
        assert 'agentos_network_refused_total{reason="not-allowed"}' in metrics
        server.terminate()
        log += [json.loads(line) for line in (await server.stderr.read()).splitlines()]
        assert await server.wait() == 0
        refused = [(*one["key"], one["target"]) for one in log if one["message"] == "network access refused"]
        assert refused == [(key, "v6.example.com") for key in ("pooled", "fresh", "another")], refused


@on_network("host-egress")
async def own_servers_stay_own(vm: VM, host: Host) -> None:
    """A server in the VM on every address and port 80 hears the VM's own loopback only, and none of what is outside."""
    code = """
        import http.server, threading, urllib.request
        class Own(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200); self.end_headers(); self.wfile.write(b"own")
            def log_message(self, *a): pass
        server = http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Own)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for host in ("127.0.0.1", "localhost", "192.0.2.1"):
            assert urllib.request.urlopen(f"http://{host}:8000/", timeout=10).read() == b"own"
        try:
            print(urllib.request.urlopen("http://web.example.com:8000/", timeout=10).read())
        except OSError:
            print("not there")
    """
    assert await out(vm, python(code)) == "not there\n"


@on_network("host-egress")
async def refusals_are_logged(vm: VM, host: Host) -> None:
    """Once each, with the labels of the VM."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("agentos.network")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    for _ in range(3):
        await out(vm, f"curl -sS -x {PROXY} http://{METADATA}/")
        await fails(vm, "curl -sS http://private.example.com/", "resolve")
        await fails(vm, "curl -sS http://metadata.google.internal/", "resolve")
    assert [one.getMessage() for one in records] == ["network access refused"] * 3
    assert [(one.__dict__["target"], one.__dict__["reason"]) for one in records] == [
        (f"{METADATA}:80", "forbidden-address"), (f"private.example.com ({PRIVATE})", "private-address"),
        ("metadata.google.internal", "forbidden-address"),
    ]  # fmt: skip
    assert host.traffic.refused == {"forbidden-address": 6, "private-address": 3}


def test_route_types() -> None:
    """The host's own routing table tells its own addresses from others."""
    with netlink.open_socket(netlink.NETLINK_ROUTE) as sock:
        kinds = {
            one: netlink.route_type(sock, one)
            for one in (HOST, HOST6, "127.0.0.9", WEB, WEB6, "192.168.77.255")
        }
    assert [kinds[one] for one in (HOST, HOST6, "127.0.0.9")] == [netlink.RTN_LOCAL] * 3
    assert [kinds[one] for one in (WEB, WEB6)] == [netlink.RTN_UNICAST] * 2
    assert kinds["192.168.77.255"] not in (netlink.RTN_UNICAST, 0)


@scene
async def route_types() -> None:
    """See test_route_types."""
    test_route_types()


if __name__ == "__main__":
    socket.setdefaulttimeout(20)
    asyncio.run(SCENES[sys.argv[1]]())
    print("done")
