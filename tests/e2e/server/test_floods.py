"""Clients that send and do not read, or begin and do not go on: memory stays bounded, others are served meanwhile."""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from agentos.wire.encodings import BARE, CBOR_BYTES, Frame
from agentos.wire.messages import ActionRequest, ActionResponse, SubscriptionRequest
from agentos.wire.terms import Terms, subprotocols_of_terms

MIB = 1024 * 1024
MASK = bytes(4)
SECONDS = 2.0
LONGEST = 1.0
"""Until another client has its answer. Two programs that attack have the second CPU meanwhile."""
GROWTH = 48 * MIB
EVENTS = (
    "processOutput", "processExit", "shellData", "shellExit", "vmBooted", "vmShutdown", "streamError", "limitReached",
)  # fmt: skip


def memory(server: Any) -> int:
    """Resident bytes of the server's process."""
    fields = Path(f"/proc/{server.process.pid}/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def masked(frame: Frame, head: int = 0x82) -> bytes:
    """A frame as clients send it."""
    data = frame.encode() if isinstance(frame, str) else frame
    size = len(data)
    if size < 126:
        length = bytes((0x80 | size,))
    else:
        length = b"\xfe" + struct.pack("!H", size) if size < 1 << 16 else b"\xff" + struct.pack("!Q", size)
    return bytes((head,)) + length + MASK + data


def action(number: int, name: str, *args: Any) -> bytes:
    """The frame that asks for an action."""
    return masked(BARE.encode_frame(ActionRequest(number, name, args)))


def pour(raw: socket.socket, data: bytes) -> None:
    """Send as much of `data`, again and again, as is taken within some seconds."""
    end = time.monotonic() + SECONDS
    raw.settimeout(0.2)
    view, at = memoryview(data), 0
    while (left := end - time.monotonic()) > 0 and at < len(data):
        try:
            at += raw.send(view[at : at + 65_536])
        except TimeoutError:
            time.sleep(min(left, 0.2))


class Witness:
    """Another client, which goes on with its own work; `times` has how long each of its actions took."""

    def __init__(self, server: Any) -> None:
        protocols: Any = subprotocols_of_terms(Terms(BARE))
        self.times: list[float] = []
        self._connection = connect(
            server.socket_url("witness"),
            subprotocols=protocols,
            proxy=None,
            compression=None,
            ping_interval=None,
        )
        self._connection.recv(timeout=10)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            began = time.monotonic()
            self._connection.send(BARE.encode_frame(ActionRequest(number, "exec", ("echo hi",))))
            answer = BARE.decode_to_client(self._connection.recv(timeout=60))
            self.times.append(time.monotonic() - began)
            assert isinstance(answer, ActionResponse)
            assert answer.output["stdout"] == "hi\n"
            time.sleep(0.005)

    def close(self) -> None:
        """End it, its last action answered."""
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._connection.close()


@contextlib.contextmanager
def unharmed(server: Any, growth: int = GROWTH) -> Iterator[None]:
    """While it lasts the server grows by little, and a witness is never kept waiting for long."""
    for key in ("flooded", "witness"):
        server.call(key, "exec", "true")
    witness = Witness(server)
    before, most = memory(server), 0
    over = threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, memory(server))

    watch = threading.Thread(target=look)
    watch.start()
    try:
        yield
        time.sleep(0.3)
    finally:
        over.set()
        watch.join()
        witness.close()
    assert most - before < growth, f"{(most - before) // MIB} MiB more"
    assert max(witness.times) < LONGEST, witness.times
    assert statistics.median(witness.times) < LONGEST / 4


@pytest.fixture
def flooded(flooded_server: Any) -> Iterator[Any]:
    """The same, with a client of the test's own."""
    with flooded_server.with_own_client() as running:
        yield running


@pytest.fixture(scope="module")
def flooded_server(server_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of these tests' own: what they do to its memory is nobody else's."""
    running = server_process(tmp_path_factory.mktemp("flooded"))
    yield running
    assert running.close() == 0
    assert not [one for one in running.logs if one["level"] == "error"]


def unknown_actions() -> bytes:
    """Answered at once, each with more than was sent."""
    return b"".join(action(number, "nope") for number in range(200_000))


def quick_actions() -> bytes:
    """They do something, and more of them come than may be in flight."""
    return b"".join(action(number, "exists", "/") for number in range(10_000))


def commands() -> bytes:
    """The same with a process each."""
    return b"".join(action(number, "exec", "echo hi") for number in range(10_000))


def subscriptions() -> bytes:
    """Nothing answers these."""
    return b"".join(
        masked(BARE.encode_frame(SubscriptionRequest("processOutput", number % 2 == 0)))
        for number in range(100_000)
    )


def pings() -> bytes:
    """The WebSocket itself answers these."""
    return masked(b"x" * 100, 0x89) * 200_000


def empty_parts() -> bytes:
    """One message that never ends, and never becomes longer."""
    return masked(b"", 0x02) + masked(b"", 0x00) * 1_000_000


def parts_of_a_byte() -> bytes:
    """One that becomes as long as one may be, byte by byte."""
    return masked(b"x", 0x02) + masked(b"x", 0x00) * 1_000_000


def slow_to_decode() -> bytes:
    """Short frames of a great many values."""
    blobs = [
        b"\x9a\x00\x03\xd0\x90" + b"\xa0" * 250_000,
        b"\x9a\x00\x00\x1f\x40" + (b"\x81" * 30 + b"\x80") * 8000,
        b"\x9a\x00\x01\xd4\xc0" + b"\xc1\x00" * 120_000,
    ]
    head = b"\x04\x00\x00\x05\x04exec"
    sized = [
        head + bytes((len(one) & 127 | 128, len(one) >> 7 & 127 | 128, len(one) >> 14)) + one for one in blobs
    ]
    return b"".join(masked(one) for one in sized) * 10


@pytest.mark.parametrize(
    "flood",
    [
        slow_to_decode,
        unknown_actions,
        quick_actions,
        commands,
        subscriptions,
        pings,
        empty_parts,
        parts_of_a_byte,
    ],
)
def test_frames_without_reading(flooded: Any, flood: Callable[[], bytes]) -> None:
    """What one connection is sent and does not take is bounded, in bytes and in frames; also when it ends."""
    data = flood()
    with unharmed(flooded), contextlib.closing(flooded.upgraded("flooded", 20)) as raw:
        pour(raw, data)


@pytest.mark.parametrize(
    "request_line",
    ["GET /health", "GET /metrics", "POST {exists}", "POST {sleep}"],
    ids=lambda one: one[-7:-1],
)
def test_requests_without_reading(flooded: Any, request_line: str) -> None:
    """Pipelined: no more of them are taken in than are answered, and no more answered than are taken."""
    path = flooded.path("flooded", "action/exists"), flooded.path("flooded", "action/exec")
    line = request_line.format(exists=path[0], sleep=path[1])
    body = b"" if "GET" in line else b'{"args":["/"]}' if "exists" in line else b'{"args":["sleep 3"]}'
    head = f"{line} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    data = (head + body) * 100_000
    with unharmed(flooded), socket.create_connection(("127.0.0.1", flooded.port)) as raw:
        pour(raw, data)


def test_pipelined_to_the_end(flooded: Any) -> None:
    """Whoever reads gets every answer, in order, however much is sent at once and wherever it is cut."""
    exists = flooded.path("flooded", "action/exists")
    asked, expected = [], []
    for number in range(3000):
        there = number % 3 == 0
        body = b'{"args":["%s"]}' % (b"/" + b"x" * (0 if there else number))
        asked.append(
            f"POST {exists} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )
        expected.append(b'{"output":true}' if there else b'{"output":false}')
    data = b"".join(asked).replace(b"host: x", b"host: localhost")
    with socket.create_connection(("127.0.0.1", flooded.port)) as raw:
        raw.settimeout(30)
        sender = threading.Thread(target=raw.sendall, args=(data,))
        sender.start()
        got = b""
        while got.count(b'{"output":') < len(expected):
            more = raw.recv(1 << 16)
            assert more, got[-500:]
            got += more
        sender.join()
    answers = [b'{"output":' + one.partition(b"}")[0] + b"}" for one in got.split(b'{"output":')[1:]]
    assert answers == expected


def test_who_asked_more_than_once_and_went_away(flooded: Any) -> None:
    """What is done for it then is stopped, though another of its requests came last."""
    exists, run = flooded.path("flooded", "action/exists"), flooded.path("flooded", "action/exec")
    asked = b""
    for path, body in ((run, b'{"args":["sleep 4321"]}'), (exists, b'{"args":["/"]}')):
        asked += (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )

    def sleeps() -> int:
        processes = flooded.call("flooded", "allProcesses")
        return sum(one["args"][-1:] == ["4321"] for one in processes)

    with socket.create_connection(("127.0.0.1", flooded.port)) as raw:
        raw.sendall(asked)
        wait_until(lambda: sleeps() == 1)
    wait_until(lambda: sleeps() == 0)


def wait_until(there: Callable[[], bool]) -> None:
    """Return when it is so; fail when it is not within ten seconds."""
    end = time.monotonic() + 10
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_all_events_and_none_read(flooded: Any) -> None:
    """A hundred connections get all that a noisy process writes, and take nothing of it: a page waits for each."""
    with contextlib.ExitStack() as stack, unharmed(flooded, 100 * MIB):
        for _ in range(100):
            raw = stack.enter_context(contextlib.closing(flooded.upgraded("flooded", 20)))
            raw.sendall(
                b"".join(masked(BARE.encode_frame(SubscriptionRequest(name, True))) for name in EVENTS)
            )
        flooded.call("flooded", "spawn", "sh", ["-c", "timeout 2 yes hello"])
        time.sleep(3)


def test_a_thousand_that_begin(flooded: Any) -> None:
    """Half a head, half a frame, half a body each: what little they sent is kept, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    run = flooded.path("flooded", "action/exec")
    head = f"POST {run} HTTP/1.1\r\nhost: localhost\r\n".encode()
    with contextlib.ExitStack() as stack, unharmed(flooded):
        for number in range(999):
            raw = stack.enter_context(contextlib.closing(
                flooded.upgraded("flooded", 20) if number % 3 == 0
                else socket.create_connection(("127.0.0.1", flooded.port))
            ))  # fmt: skip
            if number % 3 == 0:
                raw.sendall(b"\x82\xff" + struct.pack("!Q", 60 * MIB) + MASK + b"x" * 4000)
            elif number % 3 == 1:
                raw.sendall(head + b"content-length: 60000000\r\n\r\n" + b"x" * 4000)
            else:
                raw.sendall(head + b"x-half: " + b"x" * 4000)


def test_what_was_said_is_not_kept(flooded: Any) -> None:
    """A connection that says nothing more holds nothing of what it said last, however big that was."""
    frame = CBOR_BYTES.encode_frame(ActionRequest(1, "writeFile", ("big", bytes(40 * MIB))))
    protocols: Any = subprotocols_of_terms(Terms(CBOR_BYTES))
    before = memory(flooded)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(
                connect(
                    flooded.socket_url("flooded"), subprotocols=protocols, proxy=None, compression=None,
                    ping_interval=None,
                )
            )  # fmt: skip
            connection.recv(timeout=10)
            connection.send(frame)
            assert CBOR_BYTES.decode_to_client(connection.recv(timeout=20)) == ActionResponse(1, None)
        assert memory(flooded) - before < 4 * 40 * MIB


ARRIVING = 32 * MIB


@pytest.fixture
def narrow(server_process: Any, tmp_path: Path) -> Iterator[Any]:
    """A server that takes 32 MiB of what is not whole yet."""
    app = tmp_path / "app.py"
    app.write_text(
        "import sys\n"
        "from agentos.registry import agent_os, setup\n"
        "from agentos.server.serve import serve\n"
        f'registry = setup(use={{"vm": agent_os()}}, max_arriving_bytes={ARRIVING}, body_idle_seconds=2.0)\n'
        'serve(registry, "127.0.0.1", 0, sys.argv[-1])\n'
    )
    running = server_process(tmp_path / "data", program=[str(app)])
    yield running
    assert running.close() == 0


@pytest.mark.parametrize("kind", ["frames", "bodies"])
def test_big_ones_that_begin(narrow: Any, kind: str) -> None:
    """Of all together no more than a bound is kept; who would exceed it is told, and what is small goes on."""
    run = narrow.path("flooded", "action/exec")
    half = b"x" * (2 * MIB)
    narrow.call("flooded", "exec", "true")
    before, told = memory(narrow), 0
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            if kind == "frames":
                raw = stack.enter_context(contextlib.closing(narrow.upgraded("flooded", 20)))
                begun = b"\x82\xff" + struct.pack("!Q", 60 * MIB) + MASK + half
            else:
                raw = stack.enter_context(socket.create_connection(("127.0.0.1", narrow.port)))
                begun = (
                    f"POST {run} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 60000000\r\n\r\n".encode()
                    + half
                )
            with contextlib.suppress(ConnectionError):
                raw.sendall(begun)
            assert narrow.call("flooded", "exec", "echo x" * 1000)["exitCode"] == 0
            raw.settimeout(0.02)
            with contextlib.suppress(TimeoutError, ConnectionError):
                said = raw.recv(4096)
                assert b"limit.exceeded" in said or b'"code":"exceeded"' in said, said
                told += 1
        assert told >= 40
        assert memory(narrow) - before < 4 * ARRIVING
    wait_until(
        lambda: memory(narrow) - before < ARRIVING * 3 // 4
    )  # and nothing is kept of those that have gone
    wait_until(lambda: narrow.post("flooded", "writeFile", "big", "x" * (8 * MIB)).status_code == 200)
    assert narrow.call("flooded", "stat", "big")["size"] == 8 * MIB
