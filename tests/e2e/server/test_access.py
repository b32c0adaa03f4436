"""What a web page of another origin, another name and a caller without the token can do to a real server: nothing."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

PROTOCOLS = ["rivet", "rivet_encoding.json"]
TOKEN = "correct-horse"
SOURCE = Path(__file__).parents[3] / "src"


def keys_of(server: Any, **headers: str) -> set[str]:
    """Keys of all VMs that the server knows."""
    answer = server.http.get("/actors?name=vm&limit=1000", headers=headers)
    assert answer.status_code == 200
    return {one["key"] for one in answer.json()["actors"]}


def closed_with(url: str, protocols: list[str] = PROTOCOLS, **more: Any) -> str:
    """The reason with which a WebSocket is closed that was not let in."""
    with (
        connect(url, subprotocols=protocols, proxy=None, **more) as websocket,
        pytest.raises(ConnectionClosed) as closed,
    ):
        websocket.recv(timeout=10)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.reason


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"host": "evil.example"},
        {"host": "evil.example", "origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
def test_a_page_of_another_origin_does_nothing(server: Any, headers: dict[str, str]) -> None:
    """By no method and no route: nothing is run, nothing is made, nothing can be read."""
    key = f"csrf-{uuid.uuid4().hex[:8]}"
    action = server.path(key, "action/exec")
    body = json.dumps({"args": ["touch /tmp/owned"]})
    simple = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x")
    for kind in (*simple, "application/json"):
        answer = server.http.post(action, content=body, headers={**headers, "content-type": kind})
        assert answer.status_code == 401
        assert "access-control-allow-origin" not in answer.headers
    actor = json.dumps({"name": "vm", "key": key})
    attempts = [
        ("GET", action, None), ("PUT", "/actors", actor), ("POST", "/actors", actor), ("GET", "/actors", None),
        ("DELETE", "/actors/x", None), ("GET", "/metrics", None), ("GET", "/health", None), ("GET", "/", None),
        ("GET", server.path(key, "health"), None), ("GET", server.path(key, "metadata"), None),
        ("POST", server.path(key, "queue/x"), "{}"), ("GET", server.path(key, "request/x"), None),
        ("GET", "/nothing", None),
    ]  # fmt: skip
    for method, path, content in attempts:
        answer = server.http.request(method, path, content=content, headers=headers)
        assert answer.status_code == 401, (method, path)
        assert "access-control-allow-origin" not in answer.headers
    preflight = server.http.options(action, headers={**headers, "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in preflight.headers
    own = {name.title(): value for name, value in headers.items() if name != "host"}
    if own:
        assert closed_with(server.socket_url(key), additional_headers=own) == "auth.denied"
    assert server.http.get("/metadata", headers=headers).json() == {"runtime": "agentos"}
    assert key not in keys_of(server)


def test_a_get_changes_nothing(server: Any) -> None:
    """Nor HEAD nor OPTIONS: what an image's address or a link can make a browser send is without effect."""
    key = f"get-{uuid.uuid4().hex[:8]}"
    for method in ("GET", "HEAD", "OPTIONS"):
        for rest in ("action/exec", "action/destroy", "connect", "health", "metadata", "request/x"):
            server.http.request(method, server.path(key, rest))
        server.http.request(method, f"/actors?name=vm&key={key}")
    assert key not in keys_of(server)


@pytest.mark.parametrize("host", ["evil.example", "localhost:1@evil.example:2"])
def test_a_socket_under_another_name(server: Any, host: str) -> None:
    """What DNS rebinding makes of a WebSocket: the right address, the wrong name."""
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(10)
        path = server.path("rebound", "connect")
        lines = (
            f"GET {path} HTTP/1.1", f"Host: {host}", f"Origin: http://{host}", "Upgrade: websocket",
            "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Protocol: rivet, rivet_encoding.json", "", "",
        )  # fmt: skip
        raw.sendall("\r\n".join(lines).encode())
        seen = b""
        while b"auth.denied" not in seen:  # then it waits for our half of the closing
            data = raw.recv(4096)
            assert data, seen
            seen += data
    assert "rebound" not in keys_of(server)


def test_every_form_of_the_token(start_server: Any) -> None:
    """In headers, in both forms of the address, in a subprotocol; on every route; a wrong one in none."""
    server = start_server("--token", TOKEN)
    for shown, wrong in (
        ({"authorization": f"Bearer {TOKEN}"}, {"authorization": f"Bearer {TOKEN}x"}),
        ({"authorization": f"bearer  {TOKEN}"}, {"authorization": f"Basic {TOKEN}"}),
        ({"x-rivet-token": TOKEN}, {"x-rivet-token": TOKEN.upper()}),
    ):
        body = {"args": ["true"]}
        assert server.http.post(server.path("k", "action/exec"), json=body, headers=shown).status_code == 200
        assert server.http.post(server.path("k", "action/exec"), json=body, headers=wrong).status_code == 401
        for path in ("/actors", "/health", "/metrics", "/"):
            assert server.http.get(path, headers=shown).status_code == 200, path
            assert server.http.get(path, headers=wrong).status_code == 401, path
        assert server.http.get("/metadata", headers=wrong).json() == {"runtime": "agentos"}
    actor_id = server.http.get("/actors?name=vm&key=k", headers={"x-rivet-token": TOKEN}).json()["actors"][0][
        "actor_id"
    ]
    for path in (
        server.path("k", "action/exec") + f"&rvt-token={TOKEN}",
        f"/gateway/{actor_id}@{TOKEN}/action/exec",
    ):
        assert server.http.post(path, json={"args": ["true"]}).status_code == 200
        assert (
            server.http.post(path.replace(TOKEN, "wrong-token"), json={"args": ["true"]}).status_code == 401
        )
    base = f"ws://127.0.0.1:{server.port}"
    direct = [*PROTOCOLS, "rivet_target.actor", f"rivet_actor.{actor_id}"]
    for url, protocols in (
        (f"{server.socket_url('k')}&rvt-token={TOKEN}", PROTOCOLS),
        (f"{base}/gateway/{actor_id}@{TOKEN}/connect", PROTOCOLS),
        (f"{base}/connect", [*direct, f"rivet_token.{TOKEN}"]),
    ):
        with connect(url, subprotocols=protocols, proxy=None) as websocket:
            assert "Init" in websocket.recv(timeout=10)
        forged = [one.replace(TOKEN, "wrong-token") for one in protocols]
        assert closed_with(url.replace(TOKEN, "wrong-token"), forged) == "auth.denied"
    assert closed_with(f"{base}/connect", direct) == "auth.denied"
    assert not [one for one in server.logs if TOKEN in json.dumps(one)]


def test_what_is_not_allowed_is_not_read(start_server: Any) -> None:
    """Who has no token sends no megabytes: the answer comes before the body."""
    server = start_server("--token", TOKEN)
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(10)
        head = f"POST {server.path('k', 'action/exec')} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 60000000\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 401")


def test_frames_have_a_limit(server: Any) -> None:
    """As bodies do; the connection beside it goes on."""
    with connect(server.socket_url("frames"), subprotocols=PROTOCOLS, proxy=None) as other:
        other.recv(timeout=10)
        with connect(server.socket_url("frames"), subprotocols=PROTOCOLS, proxy=None) as websocket:
            websocket.recv(timeout=10)
            # Its head is enough: of a whole one the rest would meet a closed socket, and the reset the close.
            websocket.socket.sendall(struct.pack("!BBQ4x", 0x81, 0x80 | 127, 64 * 1024 * 1024 + 1))
            with pytest.raises(ConnectionClosed):
                websocket.recv(timeout=20)
            assert websocket.close_code == 1009
        other.send(
            json.dumps(
                {"body": {"tag": "ActionRequest", "val": {"id": 0, "name": "exec", "args": ["echo ok"]}}}
            )
        )
        assert json.loads(other.recv(timeout=10))["body"]["val"]["output"]["stdout"] == "ok\n"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_addresses_need_a_token(tmp_path: Path, host: str) -> None:
    """Said at once, with what to do."""
    done = start(tmp_path, "--host", host)
    assert done.returncode == 1
    assert b"a token is needed (--token, or AGENTOS_TOKEN)" in done.stderr


def test_an_inherited_socket_needs_one_too(tmp_path: Path) -> None:
    """A service manager may hand over a socket that other machines reach, whatever --host says."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        done = start(tmp_path, fd=listener.fileno())
    assert done.returncode == 1
    assert b"0.0.0.0 can be reached from other machines" in done.stderr


def start(tmp_path: Path, *arguments: str, fd: int | None = None) -> subprocess.CompletedProcess[bytes]:
    """`agentos serve` where it is expected to refuse."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AGENTOS_", "LISTEN_"))}
    env["PYTHONPATH"] = str(SOURCE)
    command = [
        sys.executable,
        "-m",
        "agentos",
        "serve",
        "--port",
        "0",
        "--data-dir",
        str(tmp_path / "data"),
        *arguments,
    ]
    if fd is not None:
        # As sd_listen_fds(3) has it: descriptor 3, and the pid of who is meant, which exec keeps.
        command = [
            "bash",
            "-c",
            f'exec 3<&{fd}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"',
            "bash",
            *command,
        ]
    return subprocess.run(
        command, env=env, capture_output=True, timeout=30, pass_fds=[] if fd is None else [fd]
    )


def test_metrics_have_few_labels(server: Any) -> None:
    """Whatever callers name: keys, pids, unknown actions and errors make no new series."""

    def series() -> set[str]:
        lines = server.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if line and not line.startswith("#")}

    server.post("metered", "exec", "exit 3")
    server.post("metered", "noSuchAction")
    server.post("metered", "getProcess", 4711)
    before = series()
    for number in range(20):
        server.post(f"metered-{number}", "exec", f"exit {number}")
        server.post("metered", f"noSuchAction{number}")
        server.post("metered", "getProcess", 4711 + number)
    assert series() == before
    assert not any("metered" in one or "4711" in one for one in before)
    assert 'agentos_action_failures_total{action="unknown",code="actor.action_not_found"}' in before


def test_logs_name_the_vm_and_the_process(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One JSON object a line, with the key and, where a process is meant, its pid in the VM."""
    monkeypatch.setenv("AGENTOS_LOG", "debug")
    server = start_server()
    pid = server.call("logged", "spawn", "sh", ["-c", "exit 3"])["pid"]
    assert server.call("logged", "waitProcess", pid) == 3
    shell_id = server.call("logged", "openShell", {"command": "true"})["shellId"]
    server.call("logged", "waitShell", shell_id)
    server.call("logged", "destroy")
    server.close()
    mine = [one for one in server.logs if one.get("key") == ["logged"]]
    assert [one["message"] for one in mine] == [
        "actor created", "vm booted", "process started", "exited", "shell started", "exited", "vm shut down",
    ]  # fmt: skip
    for one in mine:
        assert (one["vm"], one["namespace"]) == ("vm", "default")
        assert one["time"].endswith("Z")
        assert len(one["actor"]) == 32
    assert [one["level"] for one in mine] == ["info", "info", *["debug"] * 4, "info"]
    assert (mine[2]["pid"], mine[3]["pid"], mine[3]["exit_code"]) == (pid, pid, 3)
    assert mine[4]["pid"] == mine[5]["pid"] != pid
