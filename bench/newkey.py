"""The first action on a new key of a server (its VM made, booted, and a program run in it), and on one that sleeps."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench.figures import Bar, Options, Result, clocked, summary

PAUSE_SECONDS = 0.1
"""Between new keys: the pool's next VM boots in it."""
SLEEP_AFTER_SECONDS = 2.0
Call = Callable[[str], None]


@contextmanager
def serving(data_dir: Path) -> Iterator[int]:
    """A server of the default kind, as a process of its own; the port that it listens on."""
    command = [sys.executable, "-m", "agentos.server", "--port", "0", "--data-dir", str(data_dir)]
    with subprocess.Popen(
        [*command, "--sleep-after", str(SLEEP_AFTER_SECONDS)], stderr=subprocess.PIPE
    ) as server:
        assert server.stderr is not None
        entries = (json.loads(line) for line in server.stderr)
        port = next(int(entry["port"]) for entry in entries if entry["message"] == "listening")
        # It goes on writing its log, and waits where nobody reads.
        reader = threading.Thread(target=server.stderr.read)
        reader.start()
        yield port
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=120)
        reader.join()


def path(key: str) -> str:
    """Where the VM of `key` is asked to exec."""
    return f"/gateway/vm/action/exec?rvt-namespace=default&rvt-method=getOrCreate&rvt-key={key}"


def with_http_client(connection: http.client.HTTPConnection) -> Call:
    """Call over one open connection of the standard library: hardly more than the socket."""

    def call(key: str) -> None:
        connection.request("POST", path(key), b'{"args":["echo hi"]}', {"content-type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        assert json.loads(body)["output"]["stdout"] == "hi\n", body

    return call


def with_httpx(client: httpx.Client) -> Call:
    """Call over one open connection of a common HTTP client."""

    def call(key: str) -> None:
        answer = client.post(path(key), json={"args": ["echo hi"]})
        assert answer.json()["output"]["stdout"] == "hi\n", answer.text

    return call


async def measure(options: Options) -> Result:
    """New keys with a pause between, without one, and keys whose VM sleeps; a warm call beside them."""
    return await asyncio.to_thread(_measure, options.samples(200))


def _measure(n: int) -> Result:
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, serving(Path(directory)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.connect()
        raw = with_http_client(connection)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        over_httpx = with_httpx(client)
        for call in (raw, over_httpx):
            call("warm")
        samples["new key"] = [_new_key(raw, f"raw-{number}") for number in range(n)]
        samples["new key, httpx"] = [_new_key(over_httpx, f"httpx-{number}") for number in range(n)]
        samples["new key, no pause"] = [
            clocked(lambda k=f"burst-{number}": raw(k)) for number in range(n // 4)
        ]  # type: ignore[misc]
        time.sleep(1)
        samples["warm"] = [clocked(lambda: raw("warm")) for _ in range(n)]
        while client.get("/health").json()["vms"]:
            time.sleep(0.1)
        samples["wake"] = [_new_key(raw, f"raw-{number}") for number in range(n)]
        client.close()
        connection.close()
    return {name: summary(values) for name, values in samples.items()}


def _new_key(call: Call, key: str) -> float:
    time.sleep(PAUSE_SECONDS)
    return clocked(lambda: call(key))


def bars(result: Result) -> list[Bar]:
    """For the plot."""
    return [
        Bar("first action on a new key", result["new key"], "new VM"),
        Bar("first action on a key that sleeps", result["wake"], "new VM"),
    ]
