"""Plain HTTP and WebSockets against the server: addresses, refusals, bad input on every route."""

from __future__ import annotations

import base64
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

PROTOCOLS = ["rivet", "rivet_encoding.json"]
EXEC = "/gateway/vm/action/exec?rvt-method=getOrCreate&rvt-key=k"
GARBAGE = [b"\x00", b"\x04\x00", b"\x04\x00\xff\xff\xff\xff\x7f", b"\x09\x00\x01\x80", b"\xbf" * 1000]
NO_HTTP = [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n"]
ORIGIN = {"origin": "http://evil.example"}


def refusal(server: Any, url: str, protocols: list[str] | None = None, **more: Any) -> tuple[int, str]:
    """Code and reason of the close that ends a connection which was accepted before."""
    with connect(url, subprotocols=protocols or PROTOCOLS, proxy=None, **more) as websocket:
        assert websocket.subprotocol in ("rivet", None)
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=10)
        assert closed.value.rcvd is not None
        return closed.value.rcvd.code, closed.value.rcvd.reason


def error_of(response: httpx.Response) -> str:
    """Group and code, of a body in the shape that clients read."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert isinstance(body["message"], str)
    assert body["message"]
    assert body.get("actor", {}) is not None
    return f"{body['group']}.{body['code']}"


def test_curl_runs_a_command(server: Any) -> None:
    """JSON without any header, as a person types it."""
    response = server.http.post(server.path("curl", "action/exec"), content='{"args":["echo hi"]}')
    assert response.json()["output"]["stdout"] == "hi\n"


def test_racing_calls_meet_in_one_vm(server: Any) -> None:
    """A hundred calls that all create."""
    with ThreadPoolExecutor(100) as pool:
        results = list(
            pool.map(
                lambda _: server.post("race", "exec", "echo x >> n"),
                range(100),
            )
        )
    assert {one.status_code for one in results} == {200}
    assert server.call("race", "exec", "wc -l < n")["stdout"] == "100\n"
    listed = server.http.get("/actors", params={"name": "vm", "key": "race"}).json()["actors"]
    assert len(listed) == 1


def test_actors_api(server: Any) -> None:
    """Made once, found by key and id, refused twice, deleted for good."""
    body = {"name": "vm", "key": "a/b\\/c", "runner_name_selector": "default", "crash_policy": "sleep"}
    body["input"] = base64.b64encode(b"\xa1aaA1").decode()
    made = server.http.put("/actors?namespace=default", json=body).json()
    assert made["created"] is True
    actor = made["actor"]
    assert actor["key"] == "a/b\\/c"
    again = server.http.put("/actors?namespace=default", json=body).json()
    assert again == {"actor": actor, "created": False}
    duplicate = server.http.post("/actors?namespace=default", json=body)
    assert error_of(duplicate) == "actor.duplicate_key"
    assert duplicate.json()["metadata"]["existing_actor_id"] == actor["actor_id"]
    by_id = server.http.get("/actors", params={"actor_ids": actor["actor_id"]}).json()
    assert by_id == {"actors": [actor]}
    assert server.http.get(
        "/actors", params={"name": "vm", "key": "a/b\\/c", "namespace": "other"}
    ).json() == {"actors": []}
    assert server.http.delete(f"/actors/{actor['actor_id']}").json() == {}
    assert server.http.delete(f"/actors/{actor['actor_id']}").json() == {}
    assert server.http.get("/actors", params={"actor_ids": actor["actor_id"]}).json() == {"actors": []}


def test_listing_goes_on_where_it_stopped(server: Any) -> None:
    """A page at a time, every actor once."""
    for number in range(5):
        server.http.put("/actors?namespace=pages", json={"name": "vm", "key": str(number)})
    seen, cursor = [], ""
    while True:
        page = server.http.get("/actors", params={"namespace": "pages", "limit": 2, "cursor": cursor}).json()
        seen += [one["key"] for one in page["actors"]]
        if "pagination" not in page:
            break
        cursor = page["pagination"]["cursor"]
    assert sorted(seen) == ["0", "1", "2", "3", "4"]


def test_namespaces_are_apart(server: Any) -> None:
    """The same key in two namespaces is two VMs."""
    path = "/gateway/vm/action/exec?rvt-method=getOrCreate&rvt-key=same&rvt-namespace="
    server.http.post(path + "one", json={"args": ["touch here"]})
    other = server.http.post(path + "two", json={"args": ["ls"]}).json()
    assert other["output"]["stdout"] == ""


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", EXEC, b"", 400, "request.invalid"),
        ("POST", EXEC, b"{", 400, "request.invalid"),
        ("POST", EXEC, b"[]", 400, "request.invalid"),
        ("POST", EXEC, b'{"args":{}}', 400, "request.invalid"),
        ("POST", EXEC, b"[" * 100_000, 400, "request.invalid"),
        ("POST", EXEC, b"\xff", 400, "request.invalid"),
        ("POST", EXEC.replace("exec", "nope"), b'{"args":[]}', 404, "actor.action_not_found"),
        ("GET", EXEC, None, 405, "actor.method_not_allowed"),
        ("POST", "/gateway/vm/action/exec?rvt-method=steal&rvt-key=k", b'{"args":[]}', 400, "request.invalid"),
        ("POST", "/gateway/vm/action/exec?rvt-nope=1&rvt-method=get", b'{"args":[]}', 400, "request.invalid"),
        ("POST", "/gateway/vm/action/exec?rvt-method=get&rvt-method=get", b'{"args":[]}', 400, "request.invalid"),
        ("POST", "/gateway/vm/action/exec?rvt-method=get&rvt-key=none", b'{"args":[]}', 404, "vm.not_found"),
        ("POST", "/gateway/other/action/exec?rvt-method=getOrCreate", b'{"args":[]}', 400, "request.invalid"),
        ("POST", "/gateway/none/action/exec", b'{"args":[]}', 404, "vm.not_found"),
        ("POST", "/gateway/%ff/action/exec", b'{"args":[]}', 400, "request.invalid"),
        ("POST", "/gateway/vm/queue/jobs?rvt-method=getOrCreate&rvt-key=k", b"{}", 501, "actor.not_supported"),
        ("GET", "/gateway/vm/request/x?rvt-method=getOrCreate&rvt-key=k", None, 404, "api.not_found"),
        ("GET", "/gateway/vm/websocket/x?rvt-method=getOrCreate&rvt-key=k", None, 404, "api.not_found"),
        ("GET", "/gateway/", None, 400, "request.invalid"),
        ("GET", "/nope", None, 404, "api.not_found"),
        ("POST", "/metadata", b"", 405, "actor.method_not_allowed"),
        ("PATCH", "/actors", b"", 405, "actor.method_not_allowed"),
        ("PUT", "/actors", b"{", 400, "request.invalid"),
        ("PUT", "/actors", b"[" * 100_000, 400, "request.invalid"),
        ("PUT", "/actors", b'{"name":1}', 400, "request.invalid"),
        ("PUT", "/actors", b'{"name":"vm","key":"' + b"k" * 5000 + b'"}', 400, "request.invalid"),
        ("PUT", "/actors", b'{"name":"vm","key":"\\ud800"}', 400, "request.invalid"),
        ("PUT", "/actors", b'{"name":"vm","key":"i","input":"%%%"}', 400, "request.invalid"),
        ("GET", "/actors?limit=-1", None, 400, "request.invalid"),
        ("GET", "/actors?key=x", None, 400, "request.invalid"),
        ("GET", "/actors/none", None, 404, "vm.not_found"),
        ("GET", "/actors/a/b", None, 404, "api.not_found"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(
    server: Any, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    """A status, the error's shape, never a code that clients repeat; and the server goes on."""
    response = server.http.request(method, path, content=body)
    assert (response.status_code, error_of(response)) == (status, code)
    assert server.http.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("encoding", ["json", "cbor", "bare"])
@pytest.mark.parametrize("body", GARBAGE)
def test_garbage_in_every_encoding(server: Any, encoding: str, body: bytes) -> None:
    """Truncated, oversized, of an unknown version, nested without end."""
    path = server.path("garbage", "action/exec")
    response = server.http.post(path, content=body, headers={"x-rivet-encoding": encoding})
    assert (response.status_code, error_of(response)) == (400, "request.invalid")


def test_an_unknown_encoding(server: Any) -> None:
    """The names of those that there are."""
    response = server.http.post(
        server.path("k", "action/exec"), content=b"{}", headers={"x-rivet-encoding": "xml"}
    )
    assert "json, cbor or bare" in response.json()["message"]


def test_bodies_have_a_limit(server: Any) -> None:
    """Refused by its announced length, and by its bytes where none was announced."""
    path = server.path("big", "action/exec")
    announced = {"content-length": str(1 << 40)}
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        lines = [
            f"POST {path} HTTP/1.1",
            "host: localhost",
            f"content-length: {announced['content-length']}",
            "",
            "",
        ]
        raw.sendall("\r\n".join(lines).encode())
        raw.settimeout(10)
        answer = b""
        while received := raw.recv(4096):
            answer += received
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b"limit" in answer
    ten = server.http.post(path, content=json.dumps({"args": ["x" * 10_000_000]}))
    assert ten.status_code in (400, 429)
    assert server.http.get("/health").status_code == 200


def test_big_but_legal_bodies_pass(server: Any) -> None:
    """Three megabytes in, three megabytes out."""
    data = "0123456789" * 300_000
    assert server.call("legal", "writeFile", "big", data) is None
    kind, encoded = server.call("legal", "readFile", "big")
    assert kind == "$Uint8Array"
    assert base64.b64decode(encoded).decode() == data


def ended(raw: socket.socket) -> bool:
    """Whether the other side has closed."""
    try:
        while raw.recv(65_536):
            pass
    except ConnectionError:
        pass
    return True


def test_headers_without_end(server: Any) -> None:
    """Cut off, with an answer."""
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(10)
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        try:
            for _ in range(64):
                raw.sendall(b"x-filler: " + b"y" * 16_384 + b"\r\n")
                time.sleep(0.001)
        except OSError:
            pass
        assert ended(raw)
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("line", NO_HTTP)
def test_what_is_not_http(server: Any, line: bytes) -> None:
    """A TLS hello, half a request line, a raw byte in the path."""
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(10)
        raw.sendall(line)
        assert raw.recv(4096).startswith(b"HTTP/1.1 400")
    assert server.http.get("/health").status_code == 200


def test_other_sites_can_do_nothing(server: Any) -> None:
    """Neither by another site's page, nor by another name for this address."""
    path = server.path("guarded", "action/exec")
    foreign = server.http.post(path, json={"args": ["true"]}, headers=ORIGIN)
    assert (foreign.status_code, error_of(foreign)) == (401, "auth.denied")
    assert "access-control-allow-origin" not in foreign.headers
    rebound = server.http.get("/actors", headers={"host": f"evil.example:{server.port}"})
    assert (rebound.status_code, error_of(rebound)) == (401, "auth.denied")
    plain = server.http.get("/actors", headers={"sec-fetch-site": "cross-site"})
    assert plain.status_code == 401
    preflight = server.http.options(path, headers={**ORIGIN, "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers
    code, reason = refusal(server, server.socket_url("guarded"), additional_headers=ORIGIN)
    assert (code, reason) == (1011, "auth.denied")
    own = server.http.get("/metadata", headers={"origin": server.url})
    assert own.status_code == 200
    assert own.headers["access-control-allow-origin"] == server.url


def test_tokens(start_server: Any) -> None:
    """On every route and on the WebSocket; from anywhere, with it."""
    server = start_server("--token", "correct horse")
    # Given clients ask for this for ever, saying nothing, where it fails: it is answered, and tells nothing.
    assert server.http.get("/metadata").json() == {"runtime": "agentos"}
    for path in ("/actors", "/health", "/metrics", "/"):
        assert server.http.get(path).status_code == 401, path
    assert server.post("k", "exec", "true").status_code == 401
    assert refusal(server, server.socket_url("k")) == (1011, "auth.denied")
    assert refusal(server, server.socket_url("k") + "&rvt-token=wrong") == (1011, "auth.denied")
    for headers in ({"authorization": "Bearer correct horse"}, {"x-rivet-token": "correct horse"}):
        assert server.http.get("/metadata", headers={**headers, **ORIGIN}).status_code == 200
        answer = server.http.post(server.path("k", "action/exec"), json={"args": ["true"]}, headers=headers)
        assert answer.status_code == 200
    with connect(
        server.socket_url("k") + "&rvt-token=correct+horse", subprotocols=PROTOCOLS, proxy=None
    ) as websocket:
        assert "Init" in websocket.recv(timeout=10)
    actor_id = answer.headers["x-rivet-actor"]
    direct = server.http.post(f"/gateway/{actor_id}@correct%20horse/action/exec", json={"args": ["true"]})
    assert direct.status_code == 200


@pytest.mark.parametrize(
    ("path", "protocols", "reason"),
    [
        ("/gateway/vm/connect?rvt-method=get&rvt-key=none", PROTOCOLS, "vm.not_found"),
        ("/gateway/other/connect?rvt-method=getOrCreate", PROTOCOLS, "request.invalid"),
        ("/gateway/none/connect", PROTOCOLS, "vm.not_found"),
        ("/gateway/vm/websocket/x?rvt-method=getOrCreate", PROTOCOLS, "api.not_found"),
        ("/gateway/vm/connect?rvt-method=getOrCreate", ["rivet", "rivet_encoding.xml"], "request.invalid"),
        ("/elsewhere", PROTOCOLS, "api.not_found"),
        ("/elsewhere", ["unknown"], "api.not_found"),
    ],
)
def test_sockets_are_accepted_then_closed_with_a_reason(
    server: Any, path: str, protocols: list[str], reason: str
) -> None:
    """A refused upgrade would leave clients waiting for ever."""
    assert refusal(server, f"ws://127.0.0.1:{server.port}{path}", protocols) == (1011, reason)


@pytest.mark.parametrize("frame", ["{", '{"body":{"tag":"Nope","val":{}}}', "[]", b"\xff\xfe", "{" * 100_000])
def test_malformed_frames_end_only_their_connection(server: Any, frame: str | bytes) -> None:
    """Closed with a reason; another connection to the same VM notices nothing."""
    with connect(server.socket_url("frames"), subprotocols=PROTOCOLS, proxy=None) as other:
        other.recv(timeout=10)
        with connect(server.socket_url("frames"), subprotocols=PROTOCOLS, proxy=None) as websocket:
            websocket.recv(timeout=10)
            websocket.send(frame)
            with pytest.raises(ConnectionClosed) as closed:
                websocket.recv(timeout=10)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.reason == "actor.invalid_request"
        call = {"body": {"tag": "ActionRequest", "val": {"id": 0, "name": "exec", "args": ["echo ok"]}}}
        other.send(json.dumps(call))
        assert json.loads(other.recv(timeout=10))["body"]["val"]["output"]["stdout"] == "ok\n"


def test_a_text_frame_where_bytes_belong(server: Any) -> None:
    """Refused, not ignored."""
    with connect(
        server.socket_url("text"), subprotocols=["rivet", "rivet_encoding.bare"], proxy=None
    ) as websocket:
        assert isinstance(websocket.recv(timeout=10), bytes)
        websocket.send("hello")
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.reason == "actor.invalid_request"


def test_a_client_that_leaves_ends_its_command(server: Any) -> None:
    """Nobody waits for the result, so nothing runs on for it."""
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(server.path("left", "action/exec"), json={"args": ["sleep 987"]}, timeout=0.5)
    deadline = time.monotonic() + 10
    while True:
        running = [one["command"] for one in server.call("left", "allProcesses")]
        if "sleep" not in running:
            break
        assert time.monotonic() < deadline, running
        time.sleep(0.02)


def test_destroying_while_others_call(server: Any) -> None:
    """Each call runs in one VM or another, or says that its VM went; nothing else comes of it."""

    def work(number: int) -> str:
        response = (
            server.post("contested", "destroy")
            if number % 8 == 0
            else server.post("contested", "exec", "echo ok")
        )
        if response.status_code != 200:
            return error_of(response)
        output = response.json()["output"]
        return "destroyed" if output is None else str(output["stdout"] or output["reason"])

    with ThreadPoolExecutor(16) as pool:
        seen = set(pool.map(work, range(160)))
    assert {"ok\n", "destroyed"} <= seen <= {"ok\n", "destroyed", "vm.stopped", "vm.not_found", "vmStopped"}
    assert server.call("contested", "exec", "echo ok")["stdout"] == "ok\n"


def test_metrics_and_health(server: Any) -> None:
    """What ran is counted."""
    server.call("counted", "exec", "true")
    text = server.http.get("/metrics").text
    assert 'agentos_action_seconds_count{action="exec"}' in text
    assert "agentos_vms_running" in text
    assert server.http.get("/health").json()["vms"] >= 1
