"""The client's side of one connection, which outlives the WebSockets that carry it.

Ids count on from one WebSocket to the next, and events are subscribed to again on each. What was called
before the connection is open waits for it; what was sent when a WebSocket broke is lost, as nobody can
know whether it was done.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeAlias

from agentos.errors import AgentOSError
from agentos.wire.connection import CANCEL
from agentos.wire.encodings import Encoding, Frame
from agentos.wire.failures import error_of
from agentos.wire.malformed import FROM_SERVER, Bounds, unwanted
from agentos.wire.messages import ActionRequest, ActionResponse, Error, Event, Init, SubscriptionRequest
from agentos.wire.positions import RESUME, Positions


@dataclass(frozen=True, slots=True)
class Opened:
    """The connection is open: send these frames, in this order."""

    actor_id: str
    connection_id: str
    frames: tuple[Frame, ...]


Completed: TypeAlias = ActionResponse
"""The action with this id has this output."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The actions with these ids failed. There may be none: then the error is about the connection alone."""

    ids: tuple[int, ...]
    error: AgentOSError


@dataclass(frozen=True, slots=True)
class Lost:
    """Streams that the connection followed before it broke, and whose rest cannot be had any more."""

    errors: tuple[dict[str, Any], ...]
    """What a streamError says, for each."""


@dataclass(frozen=True, slots=True)
class EventArrived:
    """An event that is subscribed to."""

    name: str
    args: tuple[Any, ...]


Received: TypeAlias = Opened | Completed | Failed | EventArrived | Lost


class ClientConnection:
    """Calls and subscriptions of one client. `open` tells whether Init has come on the current WebSocket."""

    def __init__(self, encoding: Encoding, bounds: Bounds = FROM_SERVER) -> None:
        self.encoding = encoding
        self.open = False
        self._bounds = bounds
        self._next_id = 0
        self._waiting: dict[int, Frame] = {}
        self._in_flight: set[int] = set()
        self._listeners: Counter[str] = Counter()
        self._positions = Positions()
        self._resuming: int | None = None

    def call(self, name: str, args: tuple[Any, ...]) -> tuple[int, Frame | None]:
        """A new action's id and the frame to send; None where it waits for the connection to open.

        Raises InvalidRequest, and uses up no id, where an argument cannot be sent.
        """
        action_id = self._next_id
        frame = self.encoding.encode_frame(ActionRequest(action_id, name, args))
        self._next_id += 1
        if not self.open:
            self._waiting[action_id] = frame
            return action_id, None
        self._in_flight.add(action_id)
        return action_id, frame

    def forget(self, action_id: int) -> None:
        """Nobody waits for this action any more: it is not sent if it was not yet, its answer is ignored."""
        self._waiting.pop(action_id, None)
        self._in_flight.discard(action_id)

    def cancel(self, action_id: int) -> Frame | None:
        """As `forget`; the frame to send so that the server ends the action too, if it was sent."""
        sent = action_id in self._in_flight
        self.forget(action_id)
        if not sent:
            return None
        number, self._next_id = self._next_id, self._next_id + 1
        return self.encoding.encode_frame(ActionRequest(number, CANCEL, (action_id,)))

    def subscribe(self, name: str) -> Frame | None:
        """Count one more listener; the frame to send, if it is the first one and the connection is open."""
        self._listeners[name] += 1
        return self._subscription(name, True) if self._listeners[name] == 1 and self.open else None

    def unsubscribe(self, name: str) -> Frame | None:
        """Count one listener less; the frame to send, if it was the last one and the connection is open."""
        if name not in self._listeners:
            return None
        self._listeners[name] -= 1
        if self._listeners[name]:
            return None
        del self._listeners[name]
        return self._subscription(name, False) if self.open else None

    def _subscription(self, name: str, subscribe: bool) -> Frame:
        return self.encoding.encode_frame(SubscriptionRequest(name, subscribe))

    def receive(self, frame: Frame) -> Received | None:
        """What the server says; None where nobody waits for it any more. Raises MalformedMessage."""
        message = self.encoding.decode_to_client(frame, self._bounds)
        if isinstance(message, Init):
            return self._opened(message)
        if isinstance(message, Event):
            self._positions.note(message.name, message.args)
            return EventArrived(message.name, message.args) if message.name in self._listeners else None
        if isinstance(message, ActionResponse):
            if message.id == self._resuming:
                return self._resumed(message.output)
            if message.id not in self._in_flight:
                return None
            self._in_flight.discard(message.id)
            return message
        return self._failed(message)

    def _opened(self, message: Init) -> Opened | None:
        if self.open:
            return None
        self.open = True
        # First of all: events begin with the subscriptions. Servers that do not know it refuse it, which is no harm.
        self._resuming, self._next_id = self._next_id, self._next_id + 1
        resume = ActionRequest(self._resuming, RESUME, (self._positions.request(),))
        frames = [self.encoding.encode_frame(resume)]
        frames += [self._subscription(name, True) for name in self._listeners]
        frames += self._waiting.values()
        self._in_flight.update(self._waiting)
        self._waiting.clear()
        return Opened(message.actor_id, message.connection_id, tuple(frames))

    def _resumed(self, answer: Any) -> Lost | None:
        self._resuming = None
        try:
            lost = self._positions.resumed(answer)
        except (TypeError, ValueError, KeyError):
            raise unwanted(RESUME, answer, "positions") from None
        return Lost(tuple(lost)) if lost else None

    def _failed(self, message: Error) -> Failed | None:
        if message.action_id is None:
            return Failed(self._lose(), error_of(message))
        if message.action_id not in self._in_flight:
            return None
        self._in_flight.discard(message.action_id)
        return Failed((message.action_id,), error_of(message))

    def _lose(self) -> tuple[int, ...]:
        lost = tuple(sorted(self._in_flight))
        self._in_flight.clear()
        return lost

    def dropped(self) -> tuple[int, ...]:
        """The WebSocket is gone: the ids of the actions that were sent and will not be answered.

        What waits for the connection to open goes on waiting, and subscriptions are kept.
        """
        self.open = False
        return self._lose()

    def give_up(self) -> tuple[int, ...]:
        """The connection is over: the ids of all actions that will not be answered, sent or not."""
        lost = self.dropped() + tuple(self._waiting)
        self._waiting.clear()
        return lost
