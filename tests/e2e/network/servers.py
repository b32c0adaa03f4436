"""The servers of the small internet: names, web pages, a git repository, an echo, and one that never reads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import socket
import ssl
import struct
import subprocess
import tarfile
import tempfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from internet import DNS, HOST, METADATA, OTHER, PRIVATE, WEB, WEB6

A, AAAA, CNAME, TXT = 1, 28, 5, 16
RECORDS: dict[str, list[str]] = {
    "web.example.com": [WEB, WEB6],
    "other.example.org": [OTHER],
    "v6.example.com": [WEB6],
    "private.example.com": [PRIVATE],
    "metadata.google.internal": [METADATA],
    "loop.example.com": ["127.0.0.1", "::1"],
    "host.example.com": [HOST],
    "mixed.example.com": ["127.0.0.1", WEB],
    "mapped.example.com": ["::ffff:169.254.169.254"],
    "amazon.example.com": ["fd00:ec2::254"],
    "nat64.example.com": ["64:ff9b::a01:203"],
    "sixtofour.example.com": ["2002:7f00:1::1"],
    "many.example.com": [f"93.184.216.{number}" for number in range(34, 94)],
}
"""Name -> addresses. `rebind.example.com` changes with each question, `slow.example.com` has no answer."""
_turns = itertools.count()


def answer(data: bytes, *, udp: bool) -> bytes | None:
    """A name server's answer."""
    at, labels = 12, []
    while data[at]:
        labels.append(data[at + 1 : at + 1 + data[at]].decode().lower())
        at += data[at] + 1
    question = data[12 : at + 5]
    kind = struct.unpack_from(">H", data, at + 1)[0]
    name = ".".join(labels)
    if name == "slow.example.com":
        return None
    records, owner, code = b"", b"\xc0\x0c", 0
    addresses = RECORDS.get(name)
    if name == "rebind.example.com":
        addresses = [WEB if kind != A or next(_turns) % 2 == 0 else METADATA]
    count = 0
    if name == "alias.example.com":
        target = b"\x03web\x07example\x03com\0"
        records += owner + struct.pack(">HHIH", CNAME, 1, 60, len(target)) + target
        owner, addresses, count = target, RECORDS["web.example.com"], 1
    if kind == TXT and name == "text.example.com":
        records, count = owner + struct.pack(">HHIH", TXT, 1, 60, 6) + b"\x05hello", 1
    elif addresses is None and name != "text.example.com":
        code = 3
    for text in addresses or ():
        packed = ip_address(text).packed
        if kind == (A if len(packed) == 4 else AAAA):
            records += owner + struct.pack(">HHIH", kind, 1, 60, len(packed)) + packed
            count += 1
    flags = 0x8180 | code
    if udp and len(records) > 450:
        records, count, flags = b"", 0, flags | 0x0200
    return data[:2] + struct.pack(">HHHHH", flags, 1, count, 0, 0) + question + records


def serve_names() -> None:
    """Over UDP and TCP."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((DNS, 53))
    tcp = socket.create_server((DNS, 53))

    def datagrams() -> None:
        while True:
            data, sender = udp.recvfrom(4096)
            reply = answer(data, udp=True)
            if reply:
                udp.sendto(reply, sender)

    def streams() -> None:
        while True:
            sock, _ = tcp.accept()
            with sock:
                data = sock.recv(4096)
                reply = answer(data[2:], udp=False) or b""
                sock.sendall(struct.pack(">H", len(reply)) + reply)

    for serve in (datagrams, streams):
        threading.Thread(target=serve, daemon=True).start()


class Pages(SimpleHTTPRequestHandler):
    """Web pages: below /git a repository, elsewhere what the path says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.path.startswith("/git/"):
            super().do_GET()
        elif self.path in PACKAGES:
            self._say(200, PACKAGES[self.path], ("content-type", "text/html"))
        elif self.path == "/to-metadata":
            self._say(302, b"", ("location", f"http://{METADATA}/"))
        elif self.path == "/to-private":
            self._say(302, b"", ("location", "http://private.example.com/"))
        elif self.path.startswith("/big/"):
            self._say(200, b"x" * int(self.path[5:]))
        else:
            here = self.connection.getsockname()[0].removeprefix("::ffff:")
            self._say(200, f"here={here} host={self.headers['host']} path={self.path}\n".encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self._say(200, hashlib.sha256(body).hexdigest().encode())

    def _say(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server6(ThreadingHTTPServer):
    """On every address of both families."""

    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 512

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def serve_pages(directory: str) -> None:
    """The web, on port 80 of every address."""
    server = Server6(("::", 80), functools.partial(Pages, directory=directory))
    threading.Thread(target=server.serve_forever, daemon=True).start()


PACKAGES: dict[str, bytes] = {}
"""Path -> content of a registry for pip below /simple, one for npm below /npm, and the authority of its certificate."""


def make_packages(directory: str) -> None:
    """A wheel, a tarball, and the pages by which pip and npm find them."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr("tiny.py", "said = 'tiny from a wheel'\n")
            about = "tiny-1.0.dist-info/"
            wheel.writestr(f"{about}METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
            wheel.writestr(f"{about}WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}RECORD", "tiny.py,,\n")
        PACKAGES["/files/tiny-1.0-py3-none-any.whl"] = file.getvalue()
    PACKAGES["/simple/tiny/"] = b'<a href="/files/tiny-1.0-py3-none-any.whl">tiny-1.0-py3-none-any.whl</a>'
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w:gz") as tarball:
            for name, content in (
                ("package.json", b'{"name": "tiny", "version": "1.0.0"}'),
                ("index.js", b"module.exports = 'tiny from a tarball'"),
            ):
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(content)
                tarball.addfile(entry, io.BytesIO(content))
        PACKAGES["/files/tiny-1.0.0.tgz"] = file.getvalue()
    dist = {"tarball": "https://web.example.com/files/tiny-1.0.0.tgz"}
    versions = {"1.0.0": {"name": "tiny", "version": "1.0.0", "dist": dist}}
    PACKAGES["/npm/tiny"] = json.dumps(
        {"name": "tiny", "dist-tags": {"latest": "1.0.0"}, "versions": versions}
    ).encode()
    PACKAGES["/ca.pem"] = Path(directory, "cert.pem").read_bytes()


def serve_tls(directory: str) -> None:
    """The same pages on port 443, with a certificate for web.example.com alone."""
    key, cert = f"{directory}/key.pem", f"{directory}/cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=agentos tests", "-addext", "subjectAltName=DNS:web.example.com", "-keyout", key, "-out", cert],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = TlsServer(("::", 443), functools.partial(Pages, directory=directory))
    server.context = context
    threading.Thread(target=server.serve_forever, daemon=True).start()


class TlsServer(Server6):
    """Each connection's handshake is in its own thread."""

    context: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        with contextlib.suppress(OSError), self.context.wrap_socket(request, server_side=True) as sock:
            super().finish_request(sock, client_address)


def make_repository(directory: str) -> None:
    """A repository that can be cloned over plain HTTP."""
    where = f"{directory}/work"
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.com", "-C", where]
    subprocess.run(["git", "init", "-q", where], check=True)
    with open(f"{where}/README", "w", encoding="utf-8") as file:
        file.write("cloned\n")
    subprocess.run([*git, "add", "README"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", where, f"{directory}/git/repo.git"], check=True)
    subprocess.run(["git", "-C", f"{directory}/git/repo.git", "update-server-info"], check=True)


def serve_echo() -> None:
    """Port 7 sends back what it gets, half-closed connections too; port 9 reads nothing; port 19 sends without end."""
    echo = socket.create_server(("::", 7), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    deaf = socket.create_server(("::", 9), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    held = []

    def one(sock: socket.socket) -> None:
        with sock, contextlib.suppress(ConnectionError):
            while data := sock.recv(65536):
                sock.sendall(data)

    def echoes() -> None:
        while True:
            sock, _ = echo.accept()
            threading.Thread(target=one, args=(sock,), daemon=True).start()

    def hold() -> None:
        while True:
            held.append(deaf.accept())

    source = socket.create_server(("::", 19), family=socket.AF_INET6, dualstack_ipv6=True)

    def pour(sock: socket.socket) -> None:
        block = bytes(1 << 20)
        with sock, contextlib.suppress(ConnectionError):
            while True:
                sock.sendall(block)

    def sources() -> None:
        while True:
            sock, _ = source.accept()
            threading.Thread(target=pour, args=(sock,), daemon=True).start()

    for serve in (echoes, hold, sources):
        threading.Thread(target=serve, daemon=True).start()


def serve(ready: socket.socket) -> None:
    """All of it, until the host's process ends."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        make_repository(directory)
        serve_names()
        serve_pages(directory)
        serve_tls(directory)
        make_packages(directory)
        serve_echo()
        ready.send(b"r")
        while ready.recv(1):
            pass
