"""The server's side of one WebSocket connection, without the WebSocket.

Frames go in and typed events come out; results go in and frames come out. Whoever owns the socket sends
each frame that a method answers, in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from agentos.errors import AgentOSError, LimitExceeded
from agentos.wire.encodings import Encoding, Frame
from agentos.wire.failures import error_message
from agentos.wire.malformed import FROM_CLIENT, Bounds, MalformedMessage, malformed, unwanted
from agentos.wire.messages import ActionRequest, ActionResponse, ActorSpecifier, Event, Init

CANCEL: Final = "cancelAction"
"""An addition to the protocol: the action that ends another action of its connection, whose id is its argument.

That one fails with request.cancelled, unless it has ended by then.
"""
MOST_IN_FLIGHT: Final = 1024
"""Actions of one connection that are not answered yet."""
MOST_SUBSCRIPTIONS: Final = 1024
"""Names of events that one connection is subscribed to."""
_LONGEST_NAME: Final = 1024


ActionCalled: TypeAlias = ActionRequest
"""Run the action, then `respond` or `fail` with its id."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """From now on the connection gets events of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Unsubscribed:
    """From now on it gets them no more."""

    name: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was done: `fail(action_id, error)` tells the client. The connection goes on."""

    action_id: int | None
    error: AgentOSError


Received: TypeAlias = ActionCalled | Subscribed | Unsubscribed | Refused


class ServerConnection:
    """One connection: knows what it is subscribed to and which of its actions wait for an answer."""

    def __init__(
        self, encoding: Encoding, actor: ActorSpecifier, connection_id: str, bounds: Bounds = FROM_CLIENT
    ) -> None:
        self.encoding = encoding
        self.actor = actor
        self.connection_id = connection_id
        self._bounds = bounds
        self._subscriptions: set[str] = set()
        self._in_flight: set[int] = set()

    @property
    def subscriptions(self) -> frozenset[str]:
        """The names of the events that the client wants."""
        return frozenset(self._subscriptions)

    @property
    def in_flight(self) -> frozenset[int]:
        """The ids of the actions that wait for an answer."""
        return frozenset(self._in_flight)

    def start(self) -> Frame:
        """The frame to send before any other: until then the client waits."""
        return self.encoding.encode_frame(Init(self.actor.actor_id, self.connection_id))

    def receive(self, frame: Frame, at_once: Bounds | None = None) -> Received | None:
        """What the client wants; None where a subscription changes nothing, as it was asked for twice.

        Raises MalformedMessage where no answer can be given: close with `failures.MALFORMED` then. With `at_once`
        it is a first look, within these bounds: where it raises, nothing was done, and one without may tell more.
        """
        try:
            message = self.encoding.decode_to_server(frame, at_once or self._bounds)
        except MalformedMessage as problem:
            if at_once or problem.action_id is None or problem.action_id in self._in_flight:
                raise
            # Its traceback holds what was decoded by then.
            return Refused(problem.action_id, problem.with_traceback(None))
        if isinstance(message, ActionRequest):
            return self._call(message)
        change = self._subscribe if message.subscribe else self._unsubscribe
        return change(message.event_name)

    def _call(self, message: ActionRequest) -> ActionCalled | Refused:
        if message.id in self._in_flight:
            raise malformed(f"action id {message.id} is in use by an action that is not answered yet")
        if len(self._in_flight) >= MOST_IN_FLIGHT:
            return Refused(message.id, _exceeded("actions in flight on one connection", MOST_IN_FLIGHT))
        self._in_flight.add(message.id)
        return message

    def _subscribe(self, name: str) -> Subscribed | Refused | None:
        if name in self._subscriptions:
            return None
        if len(name) > _LONGEST_NAME:
            return Refused(None, unwanted("eventName", name, f"at most {_LONGEST_NAME} characters"))
        if len(self._subscriptions) >= MOST_SUBSCRIPTIONS:
            return Refused(None, _exceeded("subscriptions of one connection", MOST_SUBSCRIPTIONS))
        self._subscriptions.add(name)
        return Subscribed(name)

    def _unsubscribe(self, name: str) -> Unsubscribed | None:
        if name not in self._subscriptions:
            return None
        self._subscriptions.discard(name)
        return Unsubscribed(name)

    def respond(self, action_id: int, output: Any) -> Frame:
        """The frame with an action's result. Raises InvalidRequest where it cannot be sent: `fail` then."""
        frame = self.encoding.encode_frame(ActionResponse(action_id, output))
        self._in_flight.discard(action_id)
        return frame

    def fail(self, action_id: int | None, error: BaseException) -> Frame:
        """The frame that says an action failed. Without an id, the client fails all that are in flight."""
        if action_id is None:
            self._in_flight.clear()
        else:
            self._in_flight.discard(action_id)
        return self.encoding.encode_frame(error_message(error, action_id, self.actor))

    def wants(self, name: str) -> bool:
        """Whether the client subscribed to events of this name. One frame serves all that did."""
        return name in self._subscriptions

    def event(self, name: str, *args: Any) -> Frame | None:
        """The frame with an event; None where the client did not subscribe to it."""
        if name not in self._subscriptions:
            return None
        return self.encoding.encode_frame(Event(name, args))


def _exceeded(what: str, most: int) -> LimitExceeded:
    return LimitExceeded(f"too many {what} (maximum {most})", limit=what, value=most + 1, maximum=most)
