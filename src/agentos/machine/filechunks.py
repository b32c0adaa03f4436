"""One write of a file, chunk by chunk."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing, suppress
from typing import Any

from agentos.errors import AgentOSError
from agentos.machine.fileserver import ABORT, END
from agentos.machine.filevalues import as_bytes, nothing, understand
from agentos.machine.filewire import NONSENSE, Worker, request_frame

CHUNK_BYTES = 256 * 1024
"""Bytes that travel at once, and of one chunk of read_file_stream unless told otherwise."""


async def write_chunks(
    worker: Worker, request: dict[str, Any], chunks: AsyncIterable[bytes] | Iterable[bytes]
) -> int:
    """Write what `chunks` bring, as they bring it, and return how many bytes that were.

    Where they raise, the worker forgets the write.
    """
    await worker.request(request_frame(request))
    written = 0
    try:
        async with aclosing(_each(chunks)) as each:
            async for chunk in each:
                await _send_chunk(worker, request, memoryview(chunk))
                written += len(chunk)
    except Exception:
        if not worker.at_rest:
            with suppress(AgentOSError):
                await _abort(worker, request)
        raise
    await worker.send_mark(END)
    reply = await worker.answer(take_page=nothing)
    return understand(worker, reply, request["path"], lambda _: written)


async def _send_chunk(worker: Worker, request: dict[str, Any], chunk: memoryview) -> None:
    for start in range(0, len(chunk), CHUNK_BYTES):
        # It says nothing before the end, unless it failed: then the rest need not be sent.
        if worker.has_spoken():
            await _abort(worker, request)
            raise worker.broken(NONSENSE)
        await worker.send_data(chunk[start : start + CHUNK_BYTES])


async def _each(chunks: AsyncIterable[bytes] | Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            yield as_bytes("chunks", chunk, text=False)
    else:
        for chunk in chunks:
            yield as_bytes("chunks", chunk, text=False)


async def _abort(worker: Worker, request: dict[str, Any]) -> None:
    """Have the worker forget the write, and raise what it failed of, if it did."""
    await worker.send_mark(ABORT)
    understand(worker, await worker.answer(take_page=nothing), request["path"], nothing)
