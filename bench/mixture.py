"""What one client of the load run does: every verb of a VM in random order, every byte of it checked."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from agentos import create_client
from agentos.client.connection import Connection
from agentos.client.events import ProcessExit, ProcessOutput, StreamError
from agentos.errors import ConnectionLost
from agentos.model import ExitStatus

T = TypeVar("T")

BLOB_BYTES = 1024 * 1024
BULK = 4
"""How often the blob is written by the process that `bulk` follows."""
_MOST_STREAMS = 64


class Wrong(Exception):
    """What came is not what was sent."""


class Tally:
    """What all clients together did."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.lost: Counter[str] = Counter()
        """Calls that were not answered, and may not be asked again: only where connections are cut."""
        self.errors: Counter[str] = Counter()
        self.bytes = 0


class Followed:
    """The output of one process as events brought it."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.size = 0
        self.problems: list[str] = []
        self.ended = asyncio.Event()
        self.exits = 0

    def output(self, event: ProcessOutput) -> None:
        """The next bytes."""
        if event.offset != self.size:
            self.problems.append(f"offset {event.offset} where {self.size} bytes had come")
        self.hash.update(event.data)
        self.size += len(event.data)

    def exit(self) -> None:
        """The end."""
        self.exits += 1
        self.ended.set()


class Worker:
    """One client, with a connection of its own, on the VM of `key`."""

    def __init__(self, url: str, key: str, number: int, blob: bytes, tally: Tally, *, cut: bool) -> None:
        self.key = key
        self.number = number
        self.tally = tally
        self.blob = blob
        self.ran: list[str] = []
        self.unknown: list[str] = []
        """Commands of which nobody knows whether they ran."""
        self._rng = random.Random(number)
        self._cut = cut
        self._client = create_client(url)
        self._agent = self._client.vm.get_or_create(key)
        self._connection: Connection = self._agent.connect()
        self._streams: dict[int, Followed] = {}
        self._sentinel = 0
        self._count = 0

    @property
    def ledger(self) -> str:
        """The file in the VM that every command adds a line to."""
        return f"ran-{self.number}"

    async def start(self) -> None:
        """Connect. The VM boots with it."""
        self._sentinel = (await self._agent.spawn("sleep", ["100000"])).pid
        await self._open()

    async def _open(self) -> None:
        for _ in range(20):
            try:
                await self._connection.__aenter__()
                break
            except ConnectionLost:  # the first try is not repeated by the client
                if not self._cut:
                    raise
                self._connection = self._agent.connect()
        self._connection.on("processOutput", self._on_output)
        self._connection.on("processExit", self._on_exit)
        self._connection.on("streamError", self._on_gap)

    async def run(self, until: float, think: float) -> None:
        """Work until the clock says `until`."""
        while time.monotonic() < until:
            name = self._rng.choices(list(VERBS), [weight for _, weight in VERBS.values()])[0]
            began = time.monotonic()
            try:
                async with asyncio.timeout(120):
                    await VERBS[name][0](self)
                self.tally.seconds[name].append(time.monotonic() - began)
            except Exception as error:
                said = f"{name}: {type(error).__name__}: {error}"
                self.tally.errors[said[:300]] += 1
            await asyncio.sleep(self._rng.uniform(0, 2 * think))

    async def close(self) -> None:
        """Go."""
        await self._connection.close()
        await self._client.close()

    def _nonce(self) -> str:
        self._count += 1
        return f"c{self.number}n{self._count}"

    async def _once(self, name: str, call: Awaitable[T]) -> T | None:
        """The result of what may not be asked twice; None where the connection was cut meanwhile."""
        try:
            return await call
        except ConnectionLost:
            if not self._cut:
                raise
            self.tally.lost[name] += 1
            return None

    def _ended(self, status: ExitStatus) -> None:
        """By itself, and well."""
        self._same("end", (status.exit_code, status.signal, status.reason), (0, None, "exited"))

    def _same(self, what: str, got: object, wanted: object) -> None:
        if got != wanted:
            raise Wrong(f"{what}: got {str(got)[:80]!r}, wanted {str(wanted)[:80]!r}")

    # -- verbs

    async def exec(self) -> None:
        """A command over HTTP."""
        await self._command("exec", self._agent.exec)

    async def exec_on_websocket(self) -> None:
        """A command over the open connection."""
        await self._command("exec on websocket", self._connection.exec)

    async def _command(self, name: str, run: Callable[[str], Awaitable[Any]]) -> None:
        nonce = self._nonce()
        result = await self._once(name, run(f"echo {nonce} >> {self.ledger}; echo {nonce}"))
        if result is None:
            self.unknown.append(nonce)
            return
        self.ran.append(nonce)
        self._same("stdout", (result.exit_code, result.stdout, result.stderr), (0, f"{nonce}\n", ""))

    async def stream(self) -> None:
        """A process's output, followed to its end."""
        nonce, lines = self._nonce(), self._rng.randrange(1, 20_000)
        process = await self._agent.spawn("seq", ["-f", f"{nonce} %g", str(1), str(lines)])
        got = await self._follow(process.output())
        self._same("output", got, _lines(nonce, lines))
        self._ended(await process.wait_status())

    async def bulk(self) -> None:
        """More than a log holds, of a process that waits for its reader."""
        # It begins when its reader is there: events of the same process are told to others, perhaps faster.
        script = f"read go; exec cat {' blob' * BULK}"
        process = await self._agent.spawn("sh", ["-c", script], lossless=True)
        await process.read_output(0)
        while not await self._once("bulk output", _true(process.close_stdin())):
            pass
        got = await self._follow(process.output())
        wanted = hashlib.sha256(self.blob * BULK)
        self._same("output", got, (len(self.blob) * BULK, wanted.hexdigest()))

    async def _follow(self, chunks: Any) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        async for chunk in chunks:
            self._same("offset", (chunk.offset, chunk.skipped), (size, 0))
            digest.update(chunk.data)
            size += len(chunk.data)
        self.tally.bytes += size
        return size, digest.hexdigest()

    async def events(self) -> None:
        """A process's output, as events of the open connection."""
        nonce, lines = self._nonce(), self._rng.randrange(1, 20_000)
        process = await self._connection.spawn("seq", ["-f", f"{nonce} %g", str(1), str(lines)])
        followed = self._streams.setdefault(process.pid, Followed())
        await followed.ended.wait()
        await asyncio.sleep(0)
        self._same("events", followed.problems, [])
        self._same("exits", followed.exits, 1)
        self._same("events", (followed.size, followed.hash.hexdigest()), _lines(nonce, lines))
        self.tally.bytes += followed.size

    def _on_output(self, event: ProcessOutput) -> None:
        self._of(event.pid).output(event)

    def _on_exit(self, event: ProcessExit) -> None:
        self._of(event.pid).exit()

    def _on_gap(self, event: StreamError) -> None:
        if event.scope == "process":
            self._of(event.id).problems.append(event.message)

    def _of(self, pid: int) -> Followed:
        followed = self._streams.setdefault(pid, Followed())
        while len(self._streams) > _MOST_STREAMS:
            self._streams.pop(next(iter(self._streams)))
        return followed

    async def stdin(self) -> None:
        """Bytes in, the same bytes out."""
        process = await self._agent.spawn("cat")
        sent: list[tuple[bytes, bool]] = []
        for _ in range(self._rng.randrange(1, 6)):
            data = self._rng.randbytes(self._rng.randrange(1, 50_000))
            written = self._once("stdin", _true(process.write_stdin(data)))
            sent.append((data, bool(await written)))
        while not await self._once("stdin", _true(process.close_stdin())):
            pass  # closing twice does no harm
        got = b"".join([chunk.data async for chunk in process.output()])
        self.tally.bytes += len(got)
        if not _composed(got, sent):
            raise Wrong(f"stdin: {len(got)} bytes came back for {[(len(one), sure) for one, sure in sent]}")
        self._ended(await process.wait_status())

    async def files(self) -> None:
        """Write, read, look, delete."""
        path, files = f"file-{self.number}", self._agent.files
        data = self._rng.randbytes(int(2 ** self._rng.uniform(0, 19)))
        while not await self._once("files", _true(files.write_file(path, data))):
            pass  # the same bytes again
        self._same("file", await files.read_file(path), data)
        self._same("size", (await files.stat(path)).size, len(data))
        while not await self._once("files", _true(files.delete_file(path, missing_ok=True))):
            pass
        self._same("exists", await files.exists(path), False)
        self.tally.bytes += 2 * len(data)

    async def processes(self) -> None:
        """The lists, each with the process that runs all the time."""
        self._same("listed", self._sentinel in {one.pid for one in await self._agent.all_processes()}, True)
        self._same("got", (await self._agent.get_process(self._sentinel)).running, True)
        tree = await self._agent.process_tree()
        self._same("in the tree", self._sentinel in {one.process.pid for one in tree}, True)

    async def shell(self) -> None:
        """Typed, shown, ended."""
        nonce = self._nonce()
        script = f": {nonce}; read a; echo $a-$((40+2)); exit 7"
        shell = await self._once("shell", self._agent.open_shell("sh", ["-c", script]))
        if shell is None:
            for one in await self._agent.list_shells():
                if one.running and nonce in " ".join(one.args):
                    await self._once("shell", self._agent.close_shell(one.shell_id))
            return
        typed = await self._once("shell", _true(shell.write(f"{nonce}\n")))
        if not typed:
            await self._once("shell", shell.close())
            return
        shown = b"".join([chunk.data async for chunk in shell.output()])
        self._same("screen", shown, f"{nonce}\r\n{nonce}-42\r\n".encode())
        self._same("exit code", await shell.wait(), 7)


VERBS: dict[str, tuple[Callable[[Worker], Coroutine[Any, Any, None]], int]] = {
    "exec": (Worker.exec, 6),
    "exec on websocket": (Worker.exec_on_websocket, 6),
    "spawn + output": (Worker.stream, 4),
    "spawn + events": (Worker.events, 4),
    "bulk output": (Worker.bulk, 1),
    "stdin round trip": (Worker.stdin, 4),
    "files": (Worker.files, 4),
    "process lists": (Worker.processes, 4),
    "shell": (Worker.shell, 3),
}
"""Each verb with how often it is chosen."""


async def _true(call: Awaitable[None]) -> bool:
    await call
    return True


def _lines(nonce: str, lines: int) -> tuple[int, str]:
    text = "".join(f"{nonce} {number}\n" for number in range(1, lines + 1)).encode()
    return len(text), hashlib.sha256(text).hexdigest()


def _composed(got: bytes, sent: list[tuple[bytes, bool]]) -> bool:
    """Whether `got` is what was sent, in order, each once; of what nobody answered for, once or not at all."""
    reached = {0}
    for data, sure in sent:
        after = {at + len(data) for at in reached if got[at : at + len(data)] == data}
        reached = after if sure else after | reached
    return len(got) in reached


def check_ledger(worker: Worker, text: str) -> list[str]:
    """What is wrong with the commands that ran, by the file that each left a line in."""
    lines = Counter(text.split())
    missing = [one for one in worker.ran if lines[one] != 1]
    doubled = [one for one in worker.unknown if lines[one] > 1]
    strange = set(lines) - set(worker.ran) - set(worker.unknown)
    return [f"client {worker.number}: {one} ran {lines[one]} times" for one in (*missing, *doubled, *strange)]
