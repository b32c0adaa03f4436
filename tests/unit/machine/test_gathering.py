"""Pieces of a fast writer's output: every byte once, bounded, and the event loop gets its turn."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import threading

from agentos.machine.gathering import PIECE_BYTES, Gatherer
from agentos.machine.pipes import READ_BYTES, Reader

KIB = 1024


def _pipe() -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read, False)
    return read, write


def test_a_piece_is_what_is_there() -> None:
    """To the bound that is asked for, and to its own; the end is told once all is read."""
    read, write = _pipe()
    gatherer = Gatherer(read)
    data = random.Random(1).randbytes(200 * KIB)
    assert gatherer.read(100) == (b"", False)
    os.write(write, data)
    assert gatherer.read(3) == (data[:3], False)
    assert gatherer.read(10 * PIECE_BYTES) == (data[3:], False)
    os.write(write, b"last")
    os.close(write)
    assert gatherer.read(4) == (b"last", False)
    assert gatherer.read(4) == (b"", True)
    os.close(read)


def test_who_trickles_is_not_waited_for() -> None:
    """A writer of single bytes that never rests gets a bounded number of reads."""
    read, write = _pipe()
    os.set_blocking(write, False)
    gatherer = Gatherer(read)
    reads = 0
    inner = gatherer._read

    def one_byte(into: memoryview) -> int | None:
        nonlocal reads
        reads += 1
        os.write(write, b"x")
        return inner(into)

    gatherer._read = one_byte  # type: ignore[method-assign, assignment]
    data, ended = gatherer.read(PIECE_BYTES)
    assert (data, ended) == (b"x" * reads, False)
    assert reads <= 1000
    os.close(read)
    os.close(write)


def test_threads_do_not_share_what_they_read_into() -> None:
    """Each event loop may gather while another does."""
    wrong: list[int] = []

    def gather(seed: int) -> None:
        read, write = _pipe()
        data = random.Random(seed).randbytes(60 * KIB)
        gatherer = Gatherer(read)
        for _ in range(50):
            os.write(write, data)
            if gatherer.read(PIECE_BYTES) != (data, False):
                wrong.append(seed)
        os.close(read)
        os.close(write)

    threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_reader_gathers_of_a_fast_writer_and_keeps_to_the_room() -> None:
    """In large pieces, whose pipe has grown, each byte once; where there is little room, not in large ones."""
    data = random.Random(2).randbytes(8 * 1024 * KIB)

    async def run(room: int) -> tuple[list[int], int]:
        read, write = _pipe()
        pieces: list[bytes] = []
        ended = asyncio.Event()
        grown = 0

        def sink(piece: bytes) -> None:
            nonlocal grown
            grown = max(grown, fcntl.fcntl(read, fcntl.F_GETPIPE_SZ))
            pieces.append(piece)

        Reader(asyncio.get_running_loop(), read, sink, ended.set, room=lambda: room)

        def send() -> None:
            with os.fdopen(write, "wb", buffering=0) as pipe:
                rest = memoryview(data)
                while rest:
                    rest = rest[pipe.write(rest) :]

        await asyncio.gather(asyncio.to_thread(send), asyncio.wait_for(ended.wait(), 30))
        assert b"".join(pieces) == data
        return [len(piece) for piece in pieces], grown

    sizes, grown = asyncio.run(run(200 * KIB))
    assert READ_BYTES < max(sizes) <= 200 * KIB
    assert grown > READ_BYTES
    sizes, grown = asyncio.run(run(10 * KIB))
    assert max(sizes) <= READ_BYTES
    assert grown == READ_BYTES
