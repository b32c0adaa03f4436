"""Bad input, route by route and encoding by encoding: a clear error each, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from agentos.actions import ACTIONS, Action
from agentos.wire.encodings import BARE, BARE_BYTES, CBOR, CBOR_BYTES, JSON, Encoding, Frame
from agentos.wire.messages import (
    ActionRequest,
    ActionResponse,
    Error,
    HttpActionRequest,
    HttpActionResponse,
    HttpResponseError,
    Init,
    SubscriptionRequest,
)
from agentos.wire.terms import Terms, headers_of_terms, subprotocols_of_terms

ENCODINGS: dict[str, Encoding] = {
    "json": JSON,
    "cbor": CBOR,
    "bare": BARE,
    "cbor with bytes": CBOR_BYTES,
    "bare with bytes": BARE_BYTES,
}
MIB = 1024 * 1024
TEN_MB = "x" * 10_000_000
WRONG: Any = {"x": {}}
"""A value that no kind of argument takes."""
RIGHT = {
    "pid": 99, "shell_id": "s", "path": "p", "command": "true", "args": [], "data": "d", "cols": 80, "rows": 24,
    "signal": "SIGINT", "paths": ["p"], "files": {"p": "d"}, "source": "p", "target": "q", "port": 80, "url": "/",
}  # fmt: skip

encodings = pytest.mark.parametrize("name", ENCODINGS)


class Side:
    """What a test says to the server in one encoding, and a connection that has to survive it."""

    def __init__(self, server: Any, encoding: Encoding) -> None:
        self.server = server
        self.encoding = encoding
        self.headers = dict(headers_of_terms(Terms(encoding)))

    def post(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        """A POST in this encoding."""
        response: httpx.Response = self.server.http.post(
            path, content=body, headers={**self.headers, **headers}
        )
        return response

    def call(self, action: str, *args: Any) -> httpx.Response:
        """An action over HTTP."""
        path = self.server.path("hostile", f"action/{quote(action, safe='')}")
        return self.post(path, self.encoding.encode_body(HttpActionRequest(args)))

    def connect(self) -> ClientConnection:
        """An open connection, its Init read."""
        protocols: Any = subprotocols_of_terms(Terms(self.encoding))
        websocket = connect(
            self.server.socket_url("hostile"),
            subprotocols=protocols,
            proxy=None,
            max_size=None,
            compression=None,
        )
        assert isinstance(self.encoding.decode_to_client(websocket.recv(timeout=10)), Init)
        return websocket

    def ask(self, websocket: ClientConnection, number: int, action: str, *args: Any) -> Any:
        """The message that answers an action."""
        websocket.send(self.encoding.encode_frame(ActionRequest(number, action, args)))
        return self.encoding.decode_to_client(websocket.recv(timeout=10))


def refused(response: httpx.Response, status: int, code: str) -> HttpResponseError:
    """The error in an answer, which has this status and code."""
    error = JSON.decode_body(HttpResponseError, response.content)
    assert (response.status_code, f"{error.group}.{error.code}") == (status, code), error
    assert error.message
    assert len(error.message) < 2000
    return error


@contextlib.contextmanager
def undisturbed(server: Any) -> Iterator[None]:
    """Another connection is open meanwhile, and works before and after; the server is well."""
    with connect(
        server.socket_url("witness"), subprotocols=["rivet", "rivet_encoding.json"], proxy=None
    ) as witness:  # type: ignore[list-item]
        witness.recv(timeout=10)

        def works(number: int) -> None:
            witness.send(JSON.encode_frame(ActionRequest(number, "exists", ("/",))))
            assert JSON.decode_to_client(witness.recv(timeout=10)) == ActionResponse(number, True)

        works(1)
        yield
        works(2)
    assert server.http.get("/health").json()["status"] == "ok"


# -- actions over HTTP


def malformed_bodies(encoding: Encoding) -> Iterator[tuple[str, bytes]]:
    """Bodies that no request is, each with what is wrong with it."""
    valid = encoding.encode_body(HttpActionRequest(("echo hi", {"cwd": "/", "stdin": b"\x00\xff" * 20})))
    for size in range(len(valid)):
        yield f"cut after {size} bytes", valid[:size]
    yield "a byte too many", valid + b"\x00"
    yield "twice", valid + valid
    yield "another encoding", (BARE if encoding is JSON else JSON).encode_body(HttpActionRequest(("x",)))
    yield "zeros", bytes(1000)
    yield "ones", b"\xff" * 1000
    yield "random", bytes((number * 7919 + 13) % 256 for number in range(4096))
    yield "an answer", encoding.encode_body(HttpActionResponse("x"))[:-1]
    if encoding.name == "json":
        yield from (
            ("deep", b'{"args":' + b"[" * 100_000),
            ("deep and closed", b'{"args":' + b"[" * 5000 + b"]" * 5000 + b"}"),
            ("no object", b"[]"),
            ("no args", b"{}"),
            ("args an object", b'{"args":{}}'),
            ("a number of many digits", b'{"args":[' + b"9" * 100_000 + b"]}"),
            ("NaN", b'{"args":[NaN]}'),
            ("not UTF-8", b'{"args":["\xff"]}'),
            ("bytes that are no base64", b'{"args":[["$Uint8Array","%%%"]]}'),
        )
    else:
        inside = {
            "deep": b"\x81" * 100_000,
            "an array of 2^62": b"\x9b" + b"\x3f" + b"\xff" * 7,
            "text of 2^62 bytes": b"\x7b" + b"\x3f" + b"\xff" * 7,
            "an unknown tag": b"\x81\xd9\xff\xff\x00",
            "a break": b"\xff",
            "a map": b"\xa0",
            "text that is not UTF-8": b"\x81\x61\xff",
            "a reserved head": b"\x81\x1c",
        }
        for what, blob in inside.items():
            if encoding.name == "cbor":
                yield what, b"\xa1\x64args" + blob
            else:
                length, size = b"", len(blob)
                while size > 0x7F:
                    length, size = length + bytes((size & 0x7F | 0x80,)), size >> 7
                yield what, b"\x04\x00" + length + bytes((size,)) + blob
    if encoding.name == "bare":
        yield "version 0", b"\x00\x00" + valid[2:]
        yield "version 5", b"\x05\x00" + valid[2:]
        yield "version 65535", b"\xff\xff" + valid[2:]
        yield "a length beyond the end", b"\x04\x00\xff\xff\xff\xff\x0f\x80"
        yield "a length of too many bytes", b"\x04\x00" + b"\xff" * 11


@encodings
def test_malformed_bodies(server: Any, name: str) -> None:
    """Truncated at every byte, with too much, with lengths that lie, of other versions and encodings."""
    side = Side(server, ENCODINGS[name])
    path = server.path("hostile", "action/exec")
    with undisturbed(server):
        for what, body in malformed_bodies(side.encoding):
            try:
                refused(side.post(path, body), 400, "request.invalid")
            except AssertionError as problem:
                raise AssertionError(f"{what}: {body[:60]!r}: {problem}") from None


def wrong_arguments(action: Action) -> Iterator[tuple[str, list[Any]]]:
    """Arguments that the action does not take, each with the name that the error has to say."""
    right = [RIGHT[one.name] for one in action.params]
    for index, param in enumerate(action.params):
        yield param.wire, [*right[:index], WRONG, *right[index + 1 :]]
        if param.required:
            yield param.wire, [*right[:index], None, *right[index + 1 :]]
    for option in action.options:
        yield option.wire, [*right, {option.wire: WRONG}]
    if action.options:
        yield "options", [*right, "no object"]
        yield "noSuchOption", [*right, {"noSuchOption": 1}]
    yield f"arguments of {action.name}", [*right, None, None]


@encodings
def test_wrong_arguments_of_every_action(server: Any, name: str) -> None:
    """The error names the argument; over HTTP and over a WebSocket, which goes on."""
    side = Side(server, ENCODINGS[name])
    number = 0
    with undisturbed(server), side.connect() as websocket:
        for action in ACTIONS:
            for said, args in wrong_arguments(action):
                error = refused(side.call(action.name, *args), 400, "request.invalid")
                files = action.name == "writeFiles" and said == "files"
                assert files or said in error.message, (action.name, args, error)
                number += 1
                answer = side.ask(websocket, number, action.name, *args)
                assert isinstance(answer, Error)
                assert (answer.action_id, answer.message) == (number, error.message)
        assert number > 150
        for unknown in (
            "nope",
            "",
            "__init__",
            "exec.exec",
            "Exec",
            "resumeEvents.x",
            "e" * 5000,
            "\x00",
            "ü",
        ):
            number += 1
            answer = side.ask(websocket, number, unknown)
            assert isinstance(answer, Error)
            assert (answer.action_id, answer.group, answer.code) == (number, "actor", "action_not_found")
            if unknown:
                refused(side.call(unknown), 404, "actor.action_not_found")


@encodings
def test_ten_megabytes_where_a_line_is_expected(server: Any, name: str) -> None:
    """A command, an environment, a path, a shell's id, an option: refused at once, by name or by limit."""
    side = Side(server, ENCODINGS[name])
    calls: list[tuple[str, list[Any], set[str]]] = [
        ("exec", [TEN_MB], {"limit.exceeded", "request.invalid"}),
        ("exec", ["true", {"env": {"A": TEN_MB}}], {"limit.exceeded", "request.invalid"}),
        ("exec", ["true", {"cwd": TEN_MB}], {"limit.exceeded"}),
        ("exec", ["true", {"user": TEN_MB}], {"request.invalid"}),
        ("exec", ["true", {"encoding": TEN_MB}], {"request.invalid"}),
        ("execFile", ["true", ["x"] * 400_000], {"limit.exceeded", "request.invalid"}),
        ("spawn", ["true", [], {"idempotencyKey": TEN_MB}], {"request.invalid"}),
        ("signalProcess", [1, TEN_MB], {"request.invalid", "process.not_found"}),
        ("waitProcess", [TEN_MB], {"request.invalid"}),
        ("waitShell", [TEN_MB], {"shell.not_found"}),
        ("readFile", [TEN_MB], {"file.failed", "file.name_too_long", "request.invalid", "limit.exceeded"}),
        ("readFiles", [["x"] * 300_000], {"request.invalid", "limit.exceeded"}),
        ("vmFetch", [80, TEN_MB], {"request.invalid", "limit.exceeded", "vm.port_unreachable"}),
    ]
    with undisturbed(server), side.connect() as websocket:
        for number, (action, args, codes) in enumerate(calls):
            response = side.call(action, *args)
            error = JSON.decode_body(HttpResponseError, response.content)
            assert 400 <= response.status_code <= 500, (action, error)
            assert f"{error.group}.{error.code}" in codes, (action, response.status_code, error)
            assert len(error.message) < 2000, action
            answer = side.ask(websocket, number, action, *args)
            assert isinstance(answer, Error)
            assert f"{answer.group}.{answer.code}" in codes, (action, answer)


def test_headers_that_say_nonsense(server: Any) -> None:
    """Encodings, parameters, targets and tokens that are none: said in JSON, whatever else was asked."""
    path = server.path("hostile", "action/exec")
    for headers in (
        {"x-rivet-encoding": "xml"},
        {"x-rivet-encoding": "x" * 10_000},
        {"x-rivet-conn-params": "{"},
        {"x-rivet-conn-params": "[" * 20_000},
        {"x-rivet-target": "runner", "x-rivet-actor": "a"},
        {"x-rivet-target": "actor"},
        {"content-encoding": "gzip"},
    ):
        response = server.http.post(path, content=b"{", headers=headers)
        refused(response, 400, "request.invalid")
    direct = {"x-rivet-target": "actor", "x-rivet-actor": "none"}
    refused(server.http.post("/request/x", content=b"{}", headers=direct), 404, "api.not_found")


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "BREW"])
def test_every_method_on_every_route(server: Any, method: str) -> None:
    """An answer each, with the shape of an error where it is one."""
    query = "?rvt-method=getOrCreate&rvt-key=hostile&rvt-namespace=default"
    with undisturbed(server):
        for path in (
            "/", "/health", "/metadata", "/metrics", "/actors", "/actors/x", "/actors/x/y", "/gateway", "/gateway/",
            f"/gateway/vm/action/exec{query}", f"/gateway/vm/action/{query}", f"/gateway/vm/connect{query}",
            f"/gateway/vm/request/x{query}", f"/gateway/vm/websocket/x{query}", f"/gateway/vm/queue/q{query}",
            f"/gateway/vm/health{query}", f"/gateway/vm/metadata{query}", f"/gateway/vm/dynamic/reload{query}",
            f"/gateway/vm{query}", "/gateway/none/action/exec", "/gateway/a@b/action/exec", "/connect", "/..", "//",
            "/%2e%2e/%00", "/gateway/%00/action/exec", f"/gateway/vm/action/%ff{query}", "/" + "a" * 20_000,
        ):  # fmt: skip
            for body in (b"", b"\xff" * 3000):
                response = server.http.request(method, path, content=body)
                assert response.status_code in (200, 400, 404, 405, 413, 501), (method, path, response.text)
                if method == "BREW":  # not even HTTP
                    assert response.status_code == 400
                elif response.status_code != 200 and method != "HEAD":
                    refused(response, response.status_code, code_of(response))


def code_of(response: httpx.Response) -> str:
    """Group and code of an error."""
    body = response.json()
    return f"{body['group']}.{body['code']}"


# -- frames


def malformed_frames(encoding: Encoding) -> Iterator[tuple[str, Frame]]:
    """Frames that no client sends."""
    for message in (ActionRequest(7, "exec", ("x",)), SubscriptionRequest("processOutput", True)):
        valid = encoding.encode_frame(message)
        step = 1 if len(valid) < 40 else 3
        for size in range(0, len(valid), step):
            yield f"cut after {size}", valid[:size]
        yield "a byte too many", valid + ("x" if isinstance(valid, str) else b"x")  # type: ignore[operator]
    other = BARE if encoding.name != "bare" else CBOR
    yield "another encoding", other.encode_frame(ActionRequest(1, "exec"))
    yield "what a server sends", encoding.encode_frame(Init("a", "b"))
    yield "zeros", bytes(100)
    yield "ones", b"\xff" * 100
    if encoding.binary:
        yield "a text frame", "hello"
        yield "a text frame of JSON", JSON.encode_frame(ActionRequest(1, "exec"))
    else:
        yield "deep", "[" * 100_000
        yield "no envelope", '{"tag":"ActionRequest"}'
        yield "an unknown tag", '{"body":{"tag":"Nope","val":{}}}'
        yield (
            "an id that is no number",
            '{"body":{"tag":"ActionRequest","val":{"id":"x","name":"exec","args":[]}}}',
        )


@encodings
def test_malformed_frames(server: Any, name: str) -> None:
    """Each ends its own connection with a reason that a client reads, unless its id could be read and is answered."""
    side = Side(server, ENCODINGS[name])
    with undisturbed(server):
        for what, frame in malformed_frames(side.encoding):
            with side.connect() as websocket:
                websocket.send(frame)
                reason, answer = "", None
                try:
                    answer = side.encoding.decode_to_client(websocket.recv(timeout=10))
                except ConnectionClosed as closed:
                    reason = closed.rcvd.reason if closed.rcvd else "no reason"
                if reason:
                    assert reason == "actor.invalid_request", what
                else:
                    assert isinstance(answer, Error), what
                    assert (answer.group, answer.code) == ("request", "invalid"), what
                    assert answer.action_id in (1, 7), what
                    assert side.ask(websocket, 8, "exists", "/") == ActionResponse(8, True)


@encodings
def test_an_action_that_cannot_be_read_is_refused_by_itself(server: Any, name: str) -> None:
    """Where its id could be read, the connection lives on."""
    side = Side(server, ENCODINGS[name])
    frames: tuple[Frame, ...]
    if side.encoding.name == "json":
        head = '{"body":{"tag":"ActionRequest","val":{"name":"exec","args":'
        frames = (f'{head}"x","id":5}}}}}}', f'{head}{"[" * 300_000}{"]" * 300_000},"id":5}}}}}}')
    elif side.encoding.name == "cbor":
        whole = CBOR.encode_frame(ActionRequest(5, "exec"))
        assert isinstance(whole, bytes)
        deep = b"\x81" * 300_000 + b"\x80"
        frames = tuple(whole.replace(b"\x64args\x80", b"\x64args" + value) for value in (b"\x61x", deep))
    else:
        head_bytes = b"\x04\x00\x00\x05\x04exec"
        frames = (head_bytes + b"\x02\x61x", head_bytes + b"\x7f" + b"\x81" * 126 + b"\x80")
    with undisturbed(server), side.connect() as websocket:
        for number, frame in enumerate(frames):
            websocket.send(frame)
            answer = side.encoding.decode_to_client(websocket.recv(timeout=10))
            assert isinstance(answer, Error)
            assert (answer.action_id, answer.group, answer.code) == (5, "request", "invalid")
            assert side.ask(websocket, 6 + number, "exists", "/") == ActionResponse(6 + number, True)


@encodings
def test_an_action_of_too_many_values_is_refused_by_itself(server: Any, name: str) -> None:
    """A message of more values than any action needs; over HTTP and over a WebSocket, which goes on."""
    side = Side(server, ENCODINGS[name])
    with undisturbed(server), side.connect() as websocket:
        for number, many in enumerate(
            ([0] * 1_000_001, [[]] * 300_000, {str(one): 0 for one in range(200_000)})
        ):
            answer = side.ask(websocket, 2 * number, "exec", "true", many)
            assert isinstance(answer, Error)
            assert (answer.action_id, answer.group, answer.code) == (2 * number, "request", "invalid")
            assert "values in one message" in answer.message
            refused(side.call("exec", "true", many), 400, "request.invalid")
            alive = 2 * number + 1
            assert side.ask(websocket, alive, "exists", "/") == ActionResponse(alive, True)


@encodings
def test_what_is_big_and_right(server: Any, name: str) -> None:
    """A thousand files, tens of thousands of arguments, a Buffer that JSON has number by number; in their order."""
    side = Side(server, ENCODINGS[name])
    files = [{"path": f"many/{number}", "content": "x" * 300} for number in range(1000)]
    numbers = {"type": "Buffer", "data": [7] * 900_000}
    with undisturbed(server), side.connect() as websocket:
        answer = side.ask(websocket, 1, "execFile", "wc", ["-c", *["x"] * 50_000])
        assert isinstance(answer, ActionResponse), answer
        assert answer.output["exitCode"] == 1
        assert side.ask(websocket, 2, "mkdir", "many", {"recursive": True}) == ActionResponse(2, None)
        answer = side.ask(websocket, 3, "writeFiles", files)
        assert isinstance(answer, ActionResponse)
        assert all(one["success"] for one in answer.output)
        assert side.ask(websocket, 4, "writeFile", "buffer", numbers) == ActionResponse(4, None)
        answer = side.ask(websocket, 5, "stat", "buffer")
        assert isinstance(answer, ActionResponse)
        assert answer.output["size"] == 900_000
        answer = side.ask(websocket, 6, "spawn", "cat")
        assert isinstance(answer, ActionResponse)
        pid = answer.output["pid"]
        for number in range(20):  # big ones and small ones, not waited for
            data = str(number % 10) * (300_000 if number % 2 else 1)
            websocket.send(
                side.encoding.encode_frame(ActionRequest(10 + number, "writeProcessStdin", (pid, data)))
            )
        answers = [side.encoding.decode_to_client(websocket.recv(timeout=10)) for _ in range(20)]
        assert all(isinstance(one, ActionResponse) for one in answers), answers
        assert side.ask(websocket, 40, "closeProcessStdin", pid) == ActionResponse(40, None)
        assert side.ask(websocket, 41, "waitProcess", pid) == ActionResponse(41, 0)
        written, cursor = "", 0
        while True:
            page = side.ask(websocket, 42 + cursor, "readProcessOutput", pid, {"cursor": cursor})
            assert isinstance(page, ActionResponse)
            written += "".join(one["data"].decode() for one in page.output["events"])
            if page.output["cursor"] == cursor:
                break
            cursor = page.output["cursor"]
        runs = "".join(one for at, one in enumerate(written) if not at or written[at - 1] != one)
        assert (len(written), runs) == (10 + 10 * 300_000, "01234567890123456789")


def read_to_end(raw: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    got = b""
    try:
        while data := raw.recv(65_536):
            got += data
    except ConnectionError:
        pass
    return got


MASK = b"\x00\x00\x00\x00"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x82\x01x", 1002),  # not masked
        (b"\xc2\x81" + MASK + b"x", 1002),  # a reserved bit
        (b"\x83\x81" + MASK + b"x", 1002),  # an unknown kind of frame
        (b"\x80\x81" + MASK + b"x", 1002),  # going on with what never began
        (b"\x89\xfe\x00\x80" + MASK + b"x" * 128, 1002),  # a ping that is too long
        (b"\x09\x81" + MASK + b"x", 1002),  # a ping in parts
        (b"\x81\x82" + MASK + b"\xff\xfe", 1007),  # text that is not UTF-8
        (b"\x88\x81" + MASK + b"x", 1002),  # a close of one byte
        (b"\x82\xff" + struct.pack("!Q", 1 << 40) + MASK, 1009),  # a terabyte
        (b"\x82\xff" + struct.pack("!Q", (1 << 64) - 1) + MASK, None),  # beyond what a length may be
    ],
)
def test_broken_frames(server: Any, data: bytes, code: int | None) -> None:
    """What the WebSocket protocol itself does not allow is closed with its code."""
    with undisturbed(server), contextlib.closing(server.upgraded("hostile", 10)) as raw:
        raw.sendall(data)
        answer = read_to_end(raw)
        at = answer.find(b"\x88")
        assert at >= 0, answer
        assert code in (None, struct.unpack("!H", answer[at + 2 : at + 4])[0])


def test_a_message_in_parts_without_end(server: Any) -> None:
    """Its parts together are held to the limit, as one frame would be."""
    part = b"\x02\xff" + struct.pack("!Q", MIB) + MASK + bytes(MIB)
    more = b"\x00" + part[1:]
    with undisturbed(server), contextlib.closing(server.upgraded("hostile", 10)) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(part)
            for _ in range(200):
                raw.sendall(more)
            raise AssertionError("200 MiB were taken")
        read_to_end(raw)


# -- what comes slowly, or not at all, or too much at once


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that waits half a second for headers and bodies."""
    folder = tmp_path_factory.mktemp("impatient")
    (folder / "app.py").write_text(
        textwrap.dedent(
            """
            import sys
            from agentos.registry import agent_os, setup
            from agentos.server.serve import serve
            registry = setup(
                use={"vm": agent_os()}, header_seconds=0.5, body_idle_seconds=0.5, body_seconds=2.0,
                max_body_bytes=65536,
            )
            serve(registry, "127.0.0.1", 0, sys.argv[1])
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(folder / "app.py"), str(folder / "data")], stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")},
    )  # fmt: skip
    assert process.stderr is not None
    entry = {}
    for line in process.stderr:
        entry = json.loads(line)
        if entry["message"] == "listening":
            break
    yield entry["port"]
    process.terminate()
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b'"level": "error"' not in rest


def well(port: int) -> None:
    """It answers at once."""
    began = time.monotonic()
    assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).json()["status"] == "ok"
    assert time.monotonic() - began < 5


HEAD = b"POST /gateway/vm/action/exec?rvt-method=getOrCreate&rvt-key=k HTTP/1.1\r\nhost: localhost\r\n"
SHAKE = HEAD.replace(b"POST", b"GET").replace(b"action/exec", b"connect") + b"upgrade: websocket\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),  # nothing at all: closed
        (b"G", b"408"),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: ", b"408"),
        (SHAKE, b"408"),
        (SHAKE + b"connection: upgrade\r\nsec-websocket-key: ", b"408"),
        (HEAD + b"content-length: 100\r\n\r\n{", b"408"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"408"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{", b"408"),
    ],
)
def test_what_begins_and_does_not_go_on(impatient: int, sent: bytes, status: bytes) -> None:
    """Headers, a handshake, a body: answered that it took too long, and closed."""
    with socket.create_connection(("127.0.0.1", impatient)) as raw:
        raw.settimeout(10)
        raw.sendall(sent)
        answer = read_to_end(raw)
    assert answer.startswith(b"HTTP/1.1 " + status) or (not status and b"408" in answer[:20]), answer
    well(impatient)


@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\nhost: localhost\r\n", SHAKE])
@pytest.mark.parametrize("rest", [b"", b"\r\n\r\n"], ids=["unfinished", "whole"])
@pytest.mark.parametrize("size", [100_000, 2_000_000])
def test_headers_that_come_at_once(impatient: int, head: bytes, rest: bytes, size: int) -> None:
    """Too long is too long, however they are sent; who still sends gets the answer too."""
    with socket.create_connection(("127.0.0.1", impatient)) as raw:
        raw.settimeout(10)
        raw.sendall(head + b"x: " + b"y" * size + rest)
        answer = read_to_end(raw)
    assert answer.startswith(b"HTTP/1.1 431"), answer
    well(impatient)


@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", SHAKE + b"x: "])
def test_headers_byte_by_byte(impatient: int, head: bytes) -> None:
    """Each byte in time, the whole never: the time is for all of it."""
    with socket.create_connection(("127.0.0.1", impatient)) as raw:
        raw.settimeout(10)
        raw.sendall(head)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                raw.sendall(b"y")
                time.sleep(0.05)
            raise AssertionError("a hundred bytes in five seconds were waited for")


def test_a_body_byte_by_byte(impatient: int) -> None:
    """No silence is long enough, all together is."""
    with socket.create_connection(("127.0.0.1", impatient)) as raw:
        raw.settimeout(10)
        raw.sendall(HEAD + b"content-length: 10000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                raw.sendall(b"y")
                time.sleep(0.1)
            raise AssertionError("a hundred bytes in ten seconds were waited for")


def test_a_body_that_grows_over_the_limit(impatient: int) -> None:
    """In chunks, so that nobody said how long it would be."""
    with socket.create_connection(("127.0.0.1", impatient)) as raw:
        raw.settimeout(10)
        raw.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                raw.sendall(b"4000\r\n" + b"y" * 0x4000 + b"\r\n")
        assert read_to_end(raw)[:12] in (b"HTTP/1.1 413", b"")
    well(impatient)


def test_a_thousand_connections_that_say_nothing(impatient: int) -> None:
    """Others are served meanwhile, and the thousand are let go."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", impatient))) for _ in range(1000)
        ]
        well(impatient)
        for one in silent:
            one.settimeout(20)
            read_to_end(one)
    well(impatient)


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\r\n\r\n",
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"POST / HTTP/9.9\r\n\r\n",
    ],
)
def test_garbage_behind_a_request(impatient: int, garbage: bytes) -> None:
    """What was asked is answered, or refused with it; then the connection ends."""
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", impatient)) as raw:
        raw.settimeout(10)
        raw.sendall(request + garbage)
        answer = read_to_end(raw)
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
    assert b"HTTP/1.1 400" in answer
    well(impatient)


def test_requests_one_behind_the_other(impatient: int) -> None:
    """Pipelined: all answered, in order."""
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = b"GET /nope HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", impatient)) as raw:
        raw.settimeout(10)
        raw.sendall(request * 50 + last)
        answer = read_to_end(raw)
    assert (answer.count(b"HTTP/1.1 200"), answer.count(b"HTTP/1.1 404")) == (50, 1)


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"content-length: -1\r\n",
        b"content-length: 5x\r\n",
        b"transfer-encoding: chunked, gzip\r\n",
        b"transfer-encoding: gzip\r\n",
        b"content-length : 5\r\n",
        b"x\x00y: z\r\n",
        b" folded: x\r\n",
    ],
)
def test_framing_that_could_be_read_in_two_ways(impatient: int, framing: bytes) -> None:
    """How one request is smuggled behind another: refused, or at least nothing behind it is answered."""
    smuggled = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", impatient)) as raw:
        raw.settimeout(10)
        raw.sendall(HEAD + framing + b"\r\n" + b"0\r\n\r\n" + smuggled)
        answer = read_to_end(raw)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 408")) or not answer, answer
    assert b'"status":"ok"' not in answer
    well(impatient)
