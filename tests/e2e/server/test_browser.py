"""A real browser: the given client in a page, what a hostile page can do (nothing), previews as they are seen."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chromium import PROGRAM, Browser, Page, ScriptFailed, browser
from e2e_support import absent

HERE = Path(__file__).parent
TOKEN = "correct-horse"
REGISTRY = """
from agentos import agent_os, setup
registry = setup(use={"vm": agent_os()}, allowed_origins=[%r])
"""
BUFFERED = """
const send = globalThis.fetch;
globalThis.fetch = async (url, init = {}) => send(url, init.body instanceof ReadableStream
  ? { ...init, body: await new Response(init.body).blob(), duplex: undefined } : init);
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser, for which evil.example is this machine: as a page's owner may have it."""
    if PROGRAM is None:
        if "\nID=debian\n" not in Path("/etc/os-release").read_text(encoding="utf-8"):
            pytest.skip("this distribution's chromium is a snap")
        absent("chromium is needed")
    names = "--host-resolver-rules=MAP evil.example 127.0.0.1"
    with browser(tmp_path_factory.mktemp("profile"), names) as running:
        yield running


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A tab of the test's own."""
    with chromium.page() as one:
        yield one


@pytest.fixture(scope="module")
def site(js: Path) -> Iterator[int]:
    """The port, on loopback, of a web site of somebody: an empty page, and one with the client in it."""
    root = js / "site"
    bundle = ["node", "node_modules/esbuild/bin/esbuild", "page.mjs", "--bundle", "--outfile=site/page.js"]
    subprocess.run([*bundle, "--log-level=warning"], cwd=js, check=True, timeout=60)
    (root / "index.html").write_text('<!doctype html><body><script src="page.js"></script>', encoding="utf-8")
    (root / "empty.html").write_text("<!doctype html><body>", encoding="utf-8")
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(root),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"port (\d+)", process.stdout.readline())
        assert found is not None
        yield int(found[1])
        process.terminate()


SEEN = {
    "exec": ["given\n", 3], "output": {"stdout": "out bytes\n", "stderr": "err\n"}, "exit": [True, 4],
    "shell": [True, 5], "file": [1, 0, 255],
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["json", "cbor", "bare"])
def test_the_client_in_a_page(page: Page, site: int, start_server: Callable[..., Any], encoding: str) -> None:
    """With the token, from a page of any origin: commands, processes, a terminal, events, bytes."""
    server = start_server("--token", TOKEN)
    page.open(f"http://localhost:{site}/")
    options = {"endpoint": server.url, "encoding": encoding, "token": TOKEN}
    assert page.function("return overSocket(...args)", options, "socket") == SEEN
    # A browser streams the body of a request over HTTP/2 only, and this client always does.
    with pytest.raises(ScriptFailed, match="Failed to fetch"):
        page.function("return overHttp(...args)", options, "http")
    page.function(BUFFERED)
    assert page.function("return overHttp(...args)", options, "http") == ["hello\n", [1, 0, 255]]
    wrong = {**options, "token": "wrong-token"}
    with pytest.raises(ScriptFailed, match="token"):
        page.function("return overHttp(...args)", wrong, "other")


def test_an_allowed_origin(page: Page, site: int, tmp_path: Path, start: Callable[..., Any]) -> None:
    """Without a token: the page whose origin is named may, the same page under another name may not."""
    (tmp_path / "allowing.py").write_text(REGISTRY % f"http://localhost:{site}", encoding="utf-8")
    with start("agentos", "serve", "allowing:registry", cwd=tmp_path) as url:
        options = {"endpoint": url, "encoding": "bare"}
        page.open(f"http://localhost:{site}/")
        assert page.function("return overSocket(...args)", options, "allowed") == SEEN
        page.open(f"http://127.0.0.1:{site}/")
        with pytest.raises(ScriptFailed, match="Failed to fetch"):
            page.function("await fetch(args[0])", f"{url}/metadata")
        denied = """
        const socket = new WebSocket(args[0].replace("http", "ws") + "/gateway/vm/connect?rvt-namespace=default"
          + "&rvt-method=getOrCreate&rvt-key=denied", ["rivet", "rivet_encoding.bare"]);
        const closed = await new Promise((go) => { socket.onclose = go; });
        return closed.reason;
        """
        assert page.function(denied, url) == "auth.denied"
        found = keys_of(url)
    assert found == {"allowed"}


def keys_of(url: str) -> set[str]:
    """Keys of the VMs that a server has."""
    return {one["key"] for one in httpx.get(f"{url}/actors?name=vm&limit=1000").json()["actors"]}


def attack(page: Page, server: Any, target: str) -> list[str]:
    """All that a page can send to a server, at this origin: makes nothing, runs nothing, ends nothing.

    Returns what the page could read.
    """
    victim, key = (f"{one}-{uuid.uuid4().hex[:8]}" for one in ("victim", "hostile"))
    assert server.call(victim, "exec", "true")["exitCode"] == 0
    listed = server.http.get("/actors?name=vm&limit=1000").json()["actors"]
    actor = next(one["actor_id"] for one in listed if one["key"] == victim)
    read: list[str] = page.function(
        (HERE / "hostile_page.js").read_text(encoding="utf-8"), target, key, actor
    )
    keys = keys_of(server.url)
    assert key not in keys
    assert victim in keys
    assert server.call(victim, "exec", "ls -A /tmp")["stdout"] == ""
    server.call(victim, "destroy")
    return read


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "evil.example"])
def test_a_hostile_page(page: Page, site: int, server: Any, host: str) -> None:
    """On another port of the same name, and on another site: it does nothing, and reads nothing."""
    page.open(f"http://{host}:{site}/empty.html")
    for name in ("127.0.0.1", "localhost"):
        assert attack(page, server, f"http://{name}:{server.port}") == []


def test_a_rebound_name(page: Page, server: Any) -> None:
    """A page whose own name leads to the server: what it asks is of its own origin, and it reads refusals."""
    own = f"http://evil.example:{server.port}"
    page.open(f"{own}/health")
    assert page.run("location.origin") == own
    read = attack(page, server, own)
    assert any("does not answer to the name" in one for one in read)
    for one in read:
        assert "does not answer to the name" in one or one.endswith('{"runtime":"agentos"}'), one


@pytest.fixture
def preview(server: Any) -> Iterator[str]:
    """The link to a site in a VM."""
    key = f"preview-{uuid.uuid4().hex[:8]}"
    server.call(key, "writeFile", "/tmp/site.py", (HERE / "guest_site.py").read_text(encoding="utf-8"))
    pid = server.call(key, "spawn", "python3", ["/tmp/site.py"])["pid"]
    assert server.call(key, "readProcessOutput", pid, {"wait": 30_000})["events"]
    yield server.call(key, "createPreview", 3000)["url"]
    server.call(key, "destroy")


def test_a_preview_works(page: Page, preview: str) -> None:
    """A page with its style, a module, what it fetches, streams and WebSockets, all by relative addresses."""
    page.open(f"{preview}app/")
    assert page.run("started") is True
    assert page.run("getComputedStyle(document.body).color") == "rgb(1, 2, 3)"
    assert page.function("return (await fetch('../style.css')).text()") == "this is /style.css"
    put = "return (await fetch('../x', {method: 'PUT', headers: {'x-own': '1'}, body: 'abc'})).text()"
    assert page.function(put).startswith("PUT 3 ")
    told = """
    const source = new EventSource("../events");
    const got = [];
    await new Promise((go) => { source.onmessage = ({ data }) => { if (got.push(data) === 3) go(); }; });
    source.close();
    return got;
    """
    assert page.function(told) == ["0", "1", "2"]
    streamed = """
    const reader = (await fetch("../events")).body.getReader();
    const first = await reader.read();
    await reader.cancel();
    return new TextDecoder().decode(first.value).startsWith("data: 0");
    """
    assert page.function(streamed) is True
    talked = """
    const socket = new WebSocket(location.href.replace("http", "ws"), ["one", "two"]);
    socket.binaryType = "arraybuffer";
    const next = () => new Promise((go) => { socket.onmessage = ({ data }) => go(data); });
    const hello = JSON.parse(await next());
    socket.send("text");
    const text = await next();
    socket.send(new Uint8Array([1, 0, 255]));
    const bytes = [...new Uint8Array(await next())];
    socket.send("close please");
    const closed = await new Promise((go) => { socket.onclose = go; });
    return [hello, socket.protocol, text, bytes, closed.code, closed.reason];
    """
    said = [
        {"origin": "http://localhost:3000", "cookie": None},
        "two",
        "text",
        [1, 0, 255],
        4321,
        "as you wish",
    ]
    assert page.function(talked) == said


def test_a_preview_is_a_stranger(page: Page, server: Any, preview: str) -> None:
    """Its page has nothing of the server's origin, and its scripts do no more than a hostile page's."""
    page.open(f"{preview}app/")
    assert page.run("origin") == "null"
    for script in (
        "document.cookie",
        "localStorage.length",
        "sessionStorage.length",
        "navigator.serviceWorker",
    ):
        with pytest.raises(ScriptFailed):
            page.run(script)
    assert attack(page, server, server.url) == []
    # Nor does what it opens: the sandbox goes with it.
    opened = """
    const frame = document.createElement("iframe");
    frame.src = new URL("/health", location.href).href;
    document.body.append(frame);
    await new Promise((go) => { frame.onload = go; });
    return frame.contentDocument === null;
    """
    assert page.function(opened) is True


def test_a_preview_within_a_page_of_the_server(page: Page, server: Any, preview: str) -> None:
    """Neither a frame nor a worker of the link has the rights of the page beside it, which has the server's origin."""
    page.open(f"{server.url}/health")
    framed = """
    const frame = document.createElement("iframe");
    frame.src = args[0] + "app/";
    document.documentElement.append(frame);
    await new Promise((go) => { frame.onload = go; });
    try { return frame.contentWindow.started } catch { return frame.contentDocument === null }
    """
    assert page.function(framed, preview) is True


def test_a_link_that_has_expired(page: Page, server: Any) -> None:
    """Says so, in words that a person can read."""
    link = server.call("expires", "createPreview", 3000, {"expiresIn": 1})["url"]
    page.function("await new Promise((go) => setTimeout(go, 5))")
    page.open(link)
    assert "this link has expired" in page.run("document.body.textContent")
    server.call("expires", "destroy")
