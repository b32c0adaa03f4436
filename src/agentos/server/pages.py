"""What a stream's log holds, as frames of events: encoded once for all connections that are at the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from agentos.actor import Actor
from agentos.model import OutputChunk
from agentos.streams import Stream
from agentos.wire.encodings import Encoding, Frame
from agentos.wire.messages import Event

PAGE_BYTES: Final = 128 * 1024
_SHARED_PAGES: Final = 32
"""Pages of one actor that are kept for the connections that have not come to them yet."""

OUTPUT: Final = {"process": "processOutput", "shell": "shellData"}
EXIT: Final = {"process": "processExit", "shell": "shellExit"}


@dataclass(frozen=True, slots=True)
class Page:
    """Frames that tell what follows a cursor, and where they end."""

    frames: tuple[Frame, ...]
    cursor: int
    skipped: int


def encoded_page(actor: Actor, stream: Stream, cursor: int, encoding: Encoding, *, positions: bool) -> Page:
    """What follows `cursor`; with `positions` for a client that can go on from there after it was cut off."""
    key = (stream.serial, cursor, encoding, positions)
    pages: dict[Any, Page] = actor.streams.pages
    page = pages.get(key)
    if page is None:
        read = stream.log.peek(cursor, PAGE_BYTES)
        position = cursor + read.skipped
        frames = []
        for name, data, offset in _joined(read.events):
            position += len(data)
            payload = _output_payload(stream, name, data, offset)
            if positions:
                payload |= {"serial": stream.serial, "cursor": position}
            frames.append(encoding.encode_frame(Event(OUTPUT[stream.scope], (payload,))))
        page = Page(tuple(frames), read.cursor, read.skipped)
        if len(actor.listeners) > 1:
            while len(pages) >= _SHARED_PAGES:
                del pages[next(iter(pages))]
            pages[key] = page
    return page


def _joined(chunks: tuple[OutputChunk, ...]) -> list[tuple[str, bytes, int]]:
    """The chunks, with those of one stream that follow one another made one."""
    runs: list[tuple[str, list[bytes], int]] = []
    for chunk in chunks:
        if runs and runs[-1][0] == chunk.stream:
            runs[-1][1].append(chunk.data)
        else:
            runs.append((chunk.stream, [chunk.data], chunk.offset))
    return [(name, parts[0] if len(parts) == 1 else b"".join(parts), offset) for name, parts, offset in runs]


def _output_payload(stream: Stream, name: str, data: bytes, offset: int) -> dict[str, Any]:
    if stream.is_shell:
        return {"shellId": stream.id, "data": data, "offset": offset}
    return {"pid": stream.id, "stream": name, "data": data, "offset": offset}


def exit_payload(stream: Stream) -> dict[str, Any]:
    """What a processExit or shellExit says."""
    status = stream.source.status
    payload: dict[str, Any] = {
        "shellId" if stream.is_shell else "pid": stream.id,
        "exitCode": stream.source.exit_code,
    }
    if status is not None:
        payload |= {"signal": status.signal, "reason": status.reason}
    return payload


def gap_payload(stream: Stream, skipped: int) -> dict[str, Any]:
    """What a streamError says of bytes that a connection did not get."""
    return {
        "scope": stream.scope,
        "id": stream.id,
        "code": "stream.gap",
        "skipped": skipped,
        "message": f"this connection fell behind: {skipped} bytes of {stream.scope} {stream.id} were passed over",
    }
