"""How far a client is in the streams of a VM, so that a new connection goes on where the last one was cut.

An addition to the protocol. A client that calls the action `resumeEvents` first of all on a connection is told
where it begins in each stream, and gets two more fields with every event of a stream: `serial`, the stream's
number, which is never used again, and `cursor`, the position in the stream's log after this event. On its next
connection it calls the action with what it has, and gets what it missed, each byte once. Numbers are valid in
one `epoch`: a server that has forgotten them, as after a restart, answers with another one.

    request    {} or {epoch, after, positions: [[serial, cursor], ...]}
    answer     {epoch, after, positions: [[serial, cursor, scope, id], ...]}

`after`: the greatest serial that the client can know of. What is not among the positions has been told to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from agentos.wire.malformed import unwanted

RESUME: Final = "resumeEvents"
"""The action's name. It belongs to a connection: over HTTP there is none."""

MOST_STREAMS: Final = 4096
"""Streams whose position a client keeps; the oldest is forgotten beyond it."""

_ENDS: Final = frozenset(("processExit", "shellExit"))


@dataclass(frozen=True, slots=True)
class Resumption:
    """What a client had got when it was cut off."""

    epoch: str
    after: int
    cursors: Mapping[int, int]


def read_resumption(args: tuple[Any, ...]) -> Resumption | None:
    """The arguments of `resumeEvents`; None from a client that begins. Raises MalformedMessage."""
    given = args[0] if args else {}
    if len(args) > 1 or not isinstance(given, dict):
        raise unwanted("resumeEvents", args, "one object")
    if not given:
        return None
    epoch, after, positions = given.get("epoch"), given.get("after"), given.get("positions")
    if not isinstance(epoch, str):
        raise unwanted("epoch", epoch, "text")
    if not isinstance(after, int) or not _is_count(after):
        raise unwanted("after", after, "a whole number, 0 or more")
    if not isinstance(positions, list) or len(positions) > MOST_STREAMS:
        raise unwanted("positions", positions, f"an array of at most {MOST_STREAMS}")
    cursors = {}
    for one in positions:
        if not isinstance(one, list) or len(one) < 2 or not _is_count(one[0]) or not _is_count(one[1]):
            raise unwanted("positions", one, "pairs of serial and cursor")
        cursors[one[0]] = one[1]
    return Resumption(epoch, after, cursors)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(slots=True)
class _Position:
    cursor: int
    scope: str | None = None
    """None: nothing was told of this stream yet."""
    id: Any = None


@dataclass(slots=True)
class Positions:
    """The client's side."""

    epoch: str | None = None
    after: int = 0
    _streams: dict[int, _Position] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """The argument of `resumeEvents`."""
        if self.epoch is None:
            return {}
        known = [[serial, one.cursor] for serial, one in self._streams.items()]
        return {"epoch": self.epoch, "after": self.after, "positions": known}

    def resumed(self, answer: Any) -> list[dict[str, Any]]:
        """Take the answer; the payloads of a streamError for each stream whose rest cannot be had any more."""
        found = {
            serial: _Position(cursor, scope, one_id) for serial, cursor, scope, one_id in answer["positions"]
        }
        same = answer["epoch"] == self.epoch
        lost = [one for serial, one in self._streams.items() if one.scope and not (same and serial in found)]
        self.epoch, self.after, self._streams = answer["epoch"], answer["after"], found
        return [_lost(one) for one in lost]

    def note(self, name: str, args: tuple[Any, ...]) -> None:
        """Remember what an event tells of its stream."""
        payload = args[0] if len(args) == 1 else None
        serial = payload.get("serial") if isinstance(payload, dict) else None
        if payload is None or not isinstance(serial, int) or not _is_count(serial):
            return
        # Those that began before it and have been silent so far have not been told to their ends.
        for silent in range(max(self.after + 1, serial - MOST_STREAMS), serial):
            self._streams[silent] = _Position(0)
        self.after = max(self.after, serial)
        known = self._streams.get(serial)
        if name in _ENDS:
            self._streams.pop(serial, None)
        elif known is not None and known.scope is not None:
            known.cursor = payload["cursor"]
        else:
            self._streams[serial] = _Position(payload["cursor"], *_whose(payload))
        while len(self._streams) > MOST_STREAMS:
            del self._streams[next(iter(self._streams))]


def _whose(payload: Mapping[str, Any]) -> tuple[str, Any]:
    """Scope and id, of output or of a gap in it."""
    if "scope" in payload:
        return payload["scope"], payload["id"]
    return ("shell", payload["shellId"]) if "shellId" in payload else ("process", payload["pid"])


def _lost(position: _Position) -> dict[str, Any]:
    said = f"the rest of {position.scope} {position.id} is lost: the server no longer has it"
    return {"scope": position.scope, "id": position.id, "code": "stream.lost", "skipped": 0, "message": said}
