"""A way to a server on which connections break: a TCP proxy on loopback that resets them at random.

    python -m bench.cutting PORT --seconds 1.0 --kilobytes 2000

Prints the port that it listens on, ends when its stdin does, and then prints what it did. Half of the
connections live for a random time, the others for a random number of bytes, so that frames are cut in two.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close sends RST


class End(asyncio.Protocol):
    """One of the two sockets of a connection; `other` is the one that its bytes go to."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self.transport: Any = None
        self.other: End | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._pair.ends.append(self)

    def join(self, other: End) -> None:
        """From now on what comes in here goes out there."""
        self.other = other
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
            return
        data, over = self._pair.spend(data)
        self.other.transport.write(data)
        if over:
            self._pair.cut()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pair.end()


class Pair:
    """One connection through the proxy, and its fate."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.ends: list[End] = []
        self._timer: asyncio.TimerHandle | None = None
        self._left: int | None = None
        if proxy.rng.random() < 0.5:
            seconds = proxy.rng.expovariate(1 / proxy.seconds)
            self._timer = asyncio.get_running_loop().call_later(seconds, self.cut)
        else:
            self._left = int(proxy.rng.expovariate(1 / proxy.size))

    def spend(self, data: bytes) -> tuple[bytes, bool]:
        """As much of `data` as may pass, and whether that was the last of it."""
        if self._left is None:
            return data, False
        passed = data[: self._left]
        self._left -= len(passed)
        return passed, not self._left

    def cut(self) -> None:
        """Reset it, on both sides."""
        self._proxy.cuts += 1
        for end in self.ends:
            sock: socket.socket | None = end.transport.get_extra_info("socket")
            if sock is not None and not end.transport.is_closing():
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.transport.abort()

    def end(self) -> None:
        """One side has gone: so has the other."""
        if self._timer is not None:
            self._timer.cancel()
        for end in self.ends:
            end.transport.close()


class Proxy:
    """All its connections."""

    def __init__(self, port: int, seconds: float, size: int, seed: int) -> None:
        self.port = port
        self.seconds = seconds
        self.size = size
        self.rng = random.Random(seed)
        self.connections = 0
        self.cuts = 0
        self._joining: set[asyncio.Task[None]] = set()

    def accept(self) -> End:
        """A new connection's near end."""
        self.connections += 1
        pair = Pair(self)
        near = End(pair)
        task = asyncio.get_running_loop().create_task(self._join(pair, near))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)
        return near

    async def _join(self, pair: Pair, near: End) -> None:
        try:
            _, far = await asyncio.get_running_loop().create_connection(
                lambda: End(pair), "127.0.0.1", self.port
            )
        except OSError:
            pair.end()
            return
        if near.transport.is_closing():
            far.transport.abort()
            return
        far.join(near)
        near.join(far)

    async def run(self) -> None:
        """Serve until stdin ends."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self.accept, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
        server.close()
        print(json.dumps({"connections": self.connections, "cuts": self.cuts}), flush=True)


class Cutting:
    """The proxy as a process. `result` has what it did, once `cutting` has ended."""

    def __init__(self, port: int, seconds: float, kilobytes: int, seed: int) -> None:
        command = [sys.executable, "-m", "bench.cutting", str(port), "--seconds", str(seconds)]
        self._process = subprocess.Popen(
            [*command, "--kilobytes", str(kilobytes), "--seed", str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.result: dict[str, int] = {}

    def stop(self) -> None:
        """End it."""
        output, _ = self._process.communicate(timeout=30)
        self.result = json.loads(output.splitlines()[-1])


@contextlib.contextmanager
def cutting(port: int, *, seconds: float = 1.5, kilobytes: int = 3000, seed: int = 1) -> Iterator[Cutting]:
    """A way to the server at `port` on which a connection lasts about `seconds`, or that many bytes."""
    proxy = Cutting(port, seconds, kilobytes, seed)
    try:
        yield proxy
    finally:
        proxy.stop()


def main() -> None:
    """Run as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--kilobytes", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    proxy = Proxy(options.port, options.seconds, options.kilobytes * 1000, options.seed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(proxy.run())


if __name__ == "__main__":
    main()
