"""Preview links: HTTP and WebSockets to a port in a VM, and what neither the page nor a wrong link can do."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from websockets.asyncio.client import connect

import agentos.sync

SITE = (Path(__file__).parent / "guest_site.py").read_text(encoding="utf-8")


def start_site(server: Any, key: str) -> int:
    """Have the site listen in the VM of this key; its pid."""
    server.call(key, "writeFile", "/tmp/site.py", SITE)
    pid = int(server.call(key, "spawn", "python3", ["/tmp/site.py"])["pid"])
    page = server.call(key, "readProcessOutput", pid, {"wait": 30_000})
    assert page["events"], page
    return pid


@pytest.fixture
def site(server: Any) -> Iterator[str]:
    """The link to a site in a VM of the test's own."""
    key = f"preview-{time.monotonic_ns()}"
    start_site(server, key)
    yield server.call(key, "createPreview", 3000)["url"]
    server.call(key, "destroy")


@pytest.fixture
def browser() -> Iterator[httpx.Client]:
    """A client that is none of the server's."""
    with httpx.Client(timeout=30) as client:
        yield client


def test_pages(site: str, browser: httpx.Client) -> None:
    """A page and what it links to; without its slash the link leads to where it has one."""
    assert 'href="style.css"' in browser.get(site).text
    assert browser.get(f"{site}style.css").text == "this is /style.css"
    assert browser.get(f"{site}deep/page.html?a=%2F").text == "this is /deep/page.html"
    assert browser.get(f"{site}nothing").status_code == 404
    bare = browser.get(site.rstrip("/") + "?a=b")
    assert bare.status_code == 308
    assert str(httpx.URL(bare.request.url).join(bare.headers["location"])) == f"{site}?a=b"
    head = browser.head(site)
    assert head.status_code == 200
    assert head.content == b""
    assert int(head.headers["content-length"]) > 50


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_bodies(site: str, browser: httpx.Client, method: str) -> None:
    """Of any method, with a length and without, longer than an action's may be."""
    body = os.urandom(1_000_003)
    want = f"{method} {len(body)} {hashlib.sha256(body).hexdigest()}"
    assert browser.request(method, f"{site}x", content=body).text == want
    parts = (body[at : at + 99_991] for at in range(0, len(body), 99_991))
    assert browser.request(method, f"{site}x", content=parts).text == want
    assert browser.request(method, f"{site}x").text.startswith(f"{method} 0 ")


def test_a_link_is_no_proxy(site: str, browser: httpx.Client) -> None:
    """CONNECT is refused, though the VM's server would have it, and the server is there for others."""
    assert browser.request("CONNECT", site).status_code == 405
    assert browser.get(f"{site}style.css").status_code == 200


def test_a_large_upload(site: str, browser: httpx.Client) -> None:
    """100 MB, which is more than an action's body may have; one that is refused early ends early."""
    block, digest = os.urandom(1_000_000), hashlib.sha256()
    for _ in range(100):
        digest.update(block)
    sent = browser.post(f"{site}x", content=(block for _ in range(100)))
    assert sent.text == f"POST 100000000 {digest.hexdigest()}"
    with contextlib.suppress(httpx.WriteError):  # it may hear of the end before it has read the answer
        assert browser.post(f"{site}refuse", content=(block for _ in range(20))).status_code in (413, 502)


def rss(pid: int) -> int:
    """A process's greatest memory so far, in bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def test_a_large_download(server: Any, site: str, browser: httpx.Client) -> None:
    """100 MB pass through in bounded memory, to a reader that is slow at first."""
    browser.get(f"{site}large?1000000")
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    before, digest, count = rss(server.process.pid), hashlib.sha256(), 0
    with browser.stream("GET", f"{site}large?100000000") as answer:
        time.sleep(0.5)  # so that all that can be buffered is
        for block in answer.iter_bytes():
            digest.update(block)
            count += len(block)
    assert count == 100_000_000
    whole = hashlib.sha256((bytes(range(256)) * 390_625)[:100_000_000])
    assert digest.digest() == whole.digest()
    assert rss(server.process.pid) - before < 24 * 2**20


def test_events_come_as_they_are_sent(server: Any, site: str, browser: httpx.Client) -> None:
    """A stream without an end; when its reader goes, the VM's server is told."""
    with browser.stream("GET", f"{site}events") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        lines = (line for line in answer.iter_lines() if line)
        assert [next(lines) for _ in range(5)] == [f"data: {number}" for number in range(5)]
    vm = server.http.get("/actors", params={"name": "vm"}).json()["actors"]
    running = [one["actor_id"] for one in vm if one["running"] and str(one["key"]).startswith("preview-")]
    assert running
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        said = server.http.post(
            f"/gateway/{running[0]}/action/exists", json={"args": ["/tmp/events-ended"]}
        ).json()["output"]
        if said:
            return
        time.sleep(0.05)
    raise AssertionError("the VM's server was never told")


def test_nothing_of_the_client_goes_to_the_vm(site: str, browser: httpx.Client) -> None:
    """No cookie, no authorization, none of the server's tokens, nothing forged about the way."""
    sent = {
        "cookie": "session=1", "authorization": "Bearer server-token", "x-rivet-token": "server-token",
        "x-agentos-token": "t", "x-forwarded-for": "1.2.3.4", "forwarded": "for=1.2.3.4", "referer": site,
        "proxy-authorization": "Basic x", "connection": "x-mine", "x-mine": "1", "te": "trailers", "x-own": "kept",
        "origin": "null",
    }  # fmt: skip
    got = json.loads(browser.get(f"{site}headers", headers=sent).text)
    for name in sent:
        if name not in ("x-own", "connection", "origin"):
            assert name not in got, (name, got)
    assert got["x-own"] == "kept"
    assert got["host"] == "localhost:3000"
    assert got["origin"] == "http://localhost:3000"
    assert got["connection"] == "close"
    assert got["x-forwarded-proto"] == "http"
    assert httpx.URL(site).path == got["x-forwarded-prefix"] + "/"
    other = json.loads(browser.get(f"{site}headers", headers={"origin": "https://other.example"}).text)
    assert other["origin"] == "https://other.example"


def test_the_page_has_an_origin_of_its_own(site: str, browser: httpx.Client) -> None:
    """Sandboxed, without what belongs to the server's origin; readable with the link, without credentials."""
    answer = browser.get(f"{site}hostile", headers={"origin": "null"})
    policies = answer.headers.get_list("content-security-policy")
    sandbox = next(one for one in ", ".join(policies).split(", ") if one.startswith("sandbox"))
    assert "allow-same-origin" not in sandbox
    assert "allow-top-navigation" not in sandbox
    assert answer.headers.get_list("access-control-allow-origin") == ["*"]
    assert answer.headers.get_list("referrer-policy") == ["no-referrer"]
    assert answer.headers["x-own"] == "kept"
    for name in (
        "set-cookie", "clear-site-data", "access-control-allow-credentials", "strict-transport-security", "x-private",
        "service-worker-allowed", "www-authenticate", "cross-origin-opener-policy",
    ):  # fmt: skip
        assert name not in answer.headers, name
    asked = {
        "origin": "null",
        "access-control-request-method": "PUT",
        "access-control-request-headers": "x-a",
    }
    preflight = browser.options(f"{site}x", headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-headers"] == "x-a"
    assert "access-control-allow-credentials" not in preflight.headers


def test_the_page_cannot_use_the_server(server: Any, site: str, browser: httpx.Client) -> None:
    """Its origin is nobody's: what it asks of the server is refused, by forms and scripts alike."""
    for method, path in (("GET", "/actors"), ("POST", server.path("other", "action/exec"))):
        refused = browser.request(
            method, f"{server.url}{path}", headers={"origin": "null"}, json={"args": ["id"]}
        )
        assert refused.status_code == 401, refused.text
        assert "access-control-allow-origin" not in refused.headers
    for_images = {"sec-fetch-site": "cross-site"}
    assert browser.get(f"{server.url}/actors", headers=for_images).status_code == 401


@pytest.mark.parametrize(
    ("location", "leads"),
    [
        ("/login?next=/a", "ROOT/login?next=/a"), ("http://localhost:3000/b", "ROOT/b"), ("next", "next"),
        ("http://127.0.0.1:3000", "ROOT/"), ("http://localhost:3001/b", "http://localhost:3001/b"),
        ("https://other.example/", "https://other.example/"), ("//other.example/", "//other.example/"),
    ],
)  # fmt: skip
def test_redirects(site: str, browser: httpx.Client, location: str, leads: str) -> None:
    """Those of the VM's server to itself stay below the link, others are as they were."""
    answer = browser.get(f"{site}to?{location}")
    assert answer.status_code == 302
    assert answer.headers["location"] == leads.replace("ROOT", httpx.URL(site).path.rstrip("/"))


def test_wrong_links(server: Any, site: str, browser: httpx.Client) -> None:
    """Changed, cut off, of another key, or nothing at all: 403 with a text, never the VM."""
    token = httpx.URL(site).path.split("/")[2]
    data = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    forged = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]
    texts = [base64.urlsafe_b64encode(one).decode().rstrip("=") for one in forged]
    for wrong in (
        *texts,
        "",
        "x",
        token[:-1],
        token + "A",
        token + "=",
        token[:-1] + "~",
        "%00",
        token[:30],
        "é",
    ):
        answer = browser.get(f"{server.url}/preview/{wrong}/")
        assert answer.status_code == 403, (wrong, answer)
        assert "link" in answer.text
        assert "sandbox" in answer.headers["content-security-policy"]
    last = token[:-1] + chr(ord(token[-1]) + 1)  # may decode to the same bytes
    assert browser.get(f"{server.url}/preview/{last}/").status_code == 403


def test_ends(server: Any, browser: httpx.Client) -> None:
    """A link ends with its time, and with its VM; another VM's goes on."""
    pids = {key: start_site(server, key) for key in ("ends-a", "ends-b")}
    assert all(pids.values())
    before = time.time()
    short = server.call("ends-a", "createPreview", 3000, {"expiresIn": 300})
    long = server.call("ends-a", "network.preview", 3000, {"expiresIn": 60_000, "path": "/style.css?x=1"})
    other = server.call("ends-b", "createPreview", 3000)
    assert before + 60 <= long["expiresAt"] / 1000 <= time.time() + 60.1
    assert abs(other["expiresAt"] / 1000 - time.time() - 3600) < 60
    assert long["url"] == f"{server.url}/preview/{long['token']}/style.css?x=1"
    assert browser.get(long["url"]).text == "this is /style.css"
    time.sleep(max(0.0, short["expiresAt"] / 1000 - time.time()))
    gone = browser.get(short["url"])
    assert (gone.status_code, gone.text) == (410, "agentos: this link has expired; ask for a new one\n")
    with browser.stream("GET", f"{server.url}/preview/{long['token']}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines)
        server.call("ends-a", "destroy")
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    gone = browser.get(long["url"])
    assert (gone.status_code, gone.text) == (410, "agentos: the VM of this link was destroyed\n")
    assert browser.get(other["url"]).status_code == 200
    server.call("ends-b", "destroy")


def test_what_answers_is_no_server(server: Any, site: str, browser: httpx.Client) -> None:
    """Nobody there, rubbish, or half an answer: a status and a text, or an end that is none."""
    key = "no-server"
    url = server.call(key, "createPreview", 4000)["url"]
    answer = browser.get(url)
    assert (answer.status_code, answer.text) == (
        502,
        "agentos: nothing listens on port 4000 of the VM's loopback\n",
    )
    server.call(key, "destroy")
    assert browser.get(f"{site}rubbish").status_code == 502
    with pytest.raises(httpx.RemoteProtocolError):
        browser.get(f"{site}cut")


def test_python_clients(server: Any, browser: httpx.Client) -> None:
    """Both make links; the blocking one is the same."""
    with agentos.sync.create_client(server.url) as client:
        vm = client.vm.get_or_create("preview-by-client")
        vm.files.write_file("/tmp/site.py", SITE)
        process = vm.spawn("python3", ["/tmp/site.py"])
        assert next(iter(process.output())).data == b"listening\n"
        link = vm.create_preview(3000, expires_in=60, path="/style.css")
        assert browser.get(link.url).text == "this is /style.css"
        assert 50 < link.expires_at - time.time() <= 60
        vm.destroy()
        assert browser.get(link.url).status_code == 410


def test_wrong_arguments(server: Any) -> None:
    """Refused, each by its name."""
    for args, argument in (
        ([], "port"), ([0], "port"), ([65536], "port"), (["80"], "port"), ([80, {"expiresIn": 0}], "expiresIn"),
        ([80, {"expiresIn": 31 * 86_400_000}], "expiresIn"), ([80, {"path": "x"}], "path"),
        ([80, {"path": "/a b"}], "path"), ([80, {"path": "/\n"}], "path"), ([80, {"host": "x"}], "createPreview"),
    ):  # fmt: skip
        answer = server.post("wrong", "createPreview", *args)
        assert answer.status_code == 400, (args, answer.text)
        assert argument in answer.json()["message"]
    server.call("wrong", "destroy")


def test_no_token_is_needed_and_none_given(start_server: Callable[..., Any], browser: httpx.Client) -> None:
    """On a server with a token the link is enough, for its page and nothing else; it survives a restart, asleep."""
    server = start_server("--token", "secret-token-1")
    server.http.headers["authorization"] = "Bearer secret-token-1"
    start_site(server, "a")
    link = server.call("a", "createPreview", 3000)
    assert browser.get(link["url"], headers={"host": "vms.example.com"}).status_code == 200
    got = json.loads(browser.get(f"{link['url']}headers", headers={"x-rivet-token": "secret-token-1"}).text)
    assert "secret-token-1" not in json.dumps(got)
    bearer = {"authorization": f"Bearer {link['token']}"}
    assert browser.get(f"{server.url}/actors", headers=bearer).status_code == 401
    key = server.data_dir / "preview.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    assert server.close() == 0
    again = start_server("--token", "secret-token-1", port=server.port)
    answer = browser.get(link["url"])
    assert (answer.status_code, "nothing listens on port 3000" in answer.text) == (
        502,
        True,
    )  # it woke the VM
    again.http.headers["authorization"] = "Bearer secret-token-1"
    start_site(again, "a")
    assert browser.get(link["url"]).status_code == 200
    assert again.close() == 0
    key.chmod(0o644)
    with pytest.raises(AssertionError, match="did not start"):
        start_server()
    key.chmod(0o600)


def test_it_keeps_the_vm_awake(start_server: Callable[..., Any], browser: httpx.Client) -> None:
    """As long as something comes through the link, and wakes it when it sleeps."""
    server = start_server("--sleep-after", "0.3")
    server.call("a", "writeFile", "/tmp/site.py", SITE)
    assert (
        server.call("a", "exec", "setsid python3 /tmp/site.py >/dev/null 2>&1 & sleep 0.7")["exitCode"] == 0
    )
    url = server.call("a", "createPreview", 3000)["url"]
    with browser.stream("GET", f"{url}events") as stream:
        lines = (line for line in stream.iter_lines() if line)
        for _ in range(60):
            next(lines)
    patience = time.monotonic() + 10
    while "\nagentos_previews 0.0" not in server.http.get("/metrics").text:
        assert time.monotonic() < patience  # the server learns of the browser's end a moment later
        time.sleep(0.02)


# -- WebSockets


def over_websocket(url: str, body: Callable[[Any], Any], **options: Any) -> Any:
    """Run `body(socket)` with a connected WebSocket."""

    async def run() -> Any:
        async with (
            asyncio.timeout(30),
            connect(url.replace("http", "ws", 1), max_size=None, **options) as peer,
        ):
            return await body(peer)

    return asyncio.run(run())


def test_messages(site: str) -> None:
    """Text and bytes, small and large, both ways; the subprotocol that the VM's server chose; no credentials."""

    async def body(peer: Any) -> None:
        assert peer.subprotocol == "second"
        assert json.loads(await peer.recv()) == {"origin": "http://localhost:3000", "cookie": None}
        for message in ("héllo", b"\0\xff", "", b"", "x" * 70_000, os.urandom(5_000_000)):
            await peer.send(message)
            assert await peer.recv() == message
        await (await peer.ping())
        await peer.send("ping please")
        assert await peer.recv() == "pong: are you there"

    over_websocket(
        f"{site}socket",
        body,
        subprotocols=["first", "second"],
        origin="null",
        additional_headers={"Cookie": "a=b"},
    )


def test_closes(server: Any, site: str) -> None:
    """The code and reason of either side reach the other."""

    async def by_vm(peer: Any) -> None:
        await peer.recv()
        await peer.send("close please")
        with pytest.raises(websockets.ConnectionClosed):
            await peer.recv()
        assert (peer.close_code, peer.close_reason) == (4321, "as you wish")

    async def by_client(peer: Any) -> None:
        await peer.recv()
        await peer.close(4000, "enough")

    over_websocket(f"{site}socket", by_vm)
    over_websocket(f"{site}socket", by_client)
    deadline = time.monotonic() + 20
    actors = server.http.get("/actors", params={"name": "vm"}).json()["actors"]
    running = [one["actor_id"] for one in actors if one["running"] and str(one["key"]).startswith("preview-")]
    while time.monotonic() < deadline:
        said = server.http.post(
            f"/gateway/{running[0]}/action/exec", json={"args": ["cat /tmp/closed"]}
        ).json()
        if said["output"]["stdout"]:
            break
        time.sleep(0.05)
    assert said["output"]["stdout"] == "4000 enough"


def test_sockets_that_are_refused(server: Any, site: str) -> None:
    """By the VM's server, by nobody there, by a wrong link: the handshake fails with a status."""
    token = httpx.URL(site).path.split("/")[2]
    for url, status in (
        (f"{site}no-socket", 403),
        (site.replace(token, token[:-4] + "AAAA"), 403),
        (server.call("no-socket", "createPreview", 4000)["url"], 502),
    ):
        with pytest.raises(websockets.InvalidStatus) as error:
            over_websocket(url, lambda peer: peer.recv())
        assert error.value.response.status_code == status, url
    server.call("no-socket", "destroy")


def test_a_stopped_server_tells(start_server: Callable[..., Any]) -> None:
    """Sockets through links end with the server, and it ends in time."""
    server = start_server()
    start_site(server, "a")
    url = server.call("a", "createPreview", 3000)["url"]

    async def body(peer: Any) -> int | None:
        await peer.recv()
        assert await asyncio.to_thread(server.close) == 0
        with pytest.raises(websockets.ConnectionClosed):
            await peer.recv()
        code: int | None = peer.close_code
        return code

    assert over_websocket(f"{url}socket", body) in (1001, 1011, 1012)
