"""Every message of the protocol as a frozen value, and the fields each has on the wire.

FIELDS says it once for all encodings: the names that JSON and CBOR use, the order and types that BARE
needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, TypeAlias

VERSION: Final = 4
"""The version that is spoken; all from 1 on are understood."""


@dataclass(frozen=True, slots=True)
class ActorSpecifier:
    """Which actor an error came from."""

    actor_id: str
    generation: int = 1
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Init:
    """First message of a connection: it is open."""

    actor_id: str
    connection_id: str


@dataclass(frozen=True, slots=True)
class Error:
    """An action failed; without `action_id`, every action in flight on the connection did."""

    group: str
    code: str
    message: str
    metadata: Any = None
    action_id: int | None = None
    actor: ActorSpecifier | None = None


@dataclass(frozen=True, slots=True)
class ActionResponse:
    """An action's result. Responses come in any order."""

    id: int
    output: Any


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened that the connection subscribed to."""

    name: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class ActionRequest:
    """Call action `name`. A connection's ids count from 0."""

    id: int
    name: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class SubscriptionRequest:
    """Begin or end sending the events of this name."""

    event_name: str
    subscribe: bool


@dataclass(frozen=True, slots=True)
class HttpActionRequest:
    """The body of a POST that calls an action; its name is in the path."""

    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpActionResponse:
    """The body of a successful answer."""

    output: Any


@dataclass(frozen=True, slots=True)
class HttpResponseError:
    """The body of any other answer."""

    group: str
    code: str
    message: str
    metadata: Any = None
    actor: ActorSpecifier | None = None


@dataclass(frozen=True, slots=True)
class HttpQueueSendRequest:
    """Put `body` into a queue; with `wait`, answer once it was handled. `timeout` is in milliseconds."""

    body: Any
    name: str | None = None
    wait: bool | None = None
    timeout: int | None = None


@dataclass(frozen=True, slots=True)
class HttpQueueSendResponse:
    """`status` is completed or timedOut."""

    status: str
    response: Any = None


ToClient: TypeAlias = Init | Error | ActionResponse | Event
ToServer: TypeAlias = ActionRequest | SubscriptionRequest
HttpMessage: TypeAlias = (
    HttpActionRequest | HttpActionResponse | HttpResponseError | HttpQueueSendRequest | HttpQueueSendResponse
)

TO_CLIENT: Final[tuple[type[ToClient], ...]] = (Init, Error, ActionResponse, Event)
"""In the order of their BARE tags; the names of the classes are the tags of JSON and CBOR."""
TO_SERVER: Final[tuple[type[ToServer], ...]] = (ActionRequest, SubscriptionRequest)


class Kind(Enum):
    """What a field holds."""

    TEXT = auto()
    BOOL = auto()
    ID = auto()
    """A uint that is a bigint in JavaScript."""
    UINT = auto()
    """A uint that is a number in JavaScript."""
    U64 = auto()
    """The same, in 8 bytes in BARE."""
    VALUE = auto()
    ARGUMENTS = auto()
    """A value that is an array."""
    SPECIFIER = auto()


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its name in the class and on the wire, its type, and the versions that have it."""

    attribute: str
    wire: str
    kind: Kind
    optional: bool = False
    since: int = 1
    until: int = VERSION


_ACTOR = Field("actor", "actor", Kind.SPECIFIER, optional=True, since=4)
_FAILURE = (
    Field("group", "group", Kind.TEXT),
    Field("code", "code", Kind.TEXT),
    Field("message", "message", Kind.TEXT),
    Field("metadata", "metadata", Kind.VALUE, optional=True),
)
_ARGS = Field("args", "args", Kind.ARGUMENTS)
_OUTPUT = Field("output", "output", Kind.VALUE)

FIELDS: Final[dict[type, tuple[Field, ...]]] = {
    ActorSpecifier: (
        Field("actor_id", "actorId", Kind.TEXT),
        Field("generation", "generation", Kind.UINT),
        Field("key", "key", Kind.TEXT, optional=True),
    ),
    Init: (
        Field("actor_id", "actorId", Kind.TEXT),
        Field("connection_id", "connectionId", Kind.TEXT),
        Field("", "connectionToken", Kind.TEXT, until=1),
    ),
    Error: (*_FAILURE, Field("action_id", "actionId", Kind.ID, optional=True), _ACTOR),
    ActionResponse: (Field("id", "id", Kind.ID), _OUTPUT),
    Event: (Field("name", "name", Kind.TEXT), _ARGS),
    ActionRequest: (Field("id", "id", Kind.ID), Field("name", "name", Kind.TEXT), _ARGS),
    SubscriptionRequest: (
        Field("event_name", "eventName", Kind.TEXT),
        Field("subscribe", "subscribe", Kind.BOOL),
    ),
    HttpActionRequest: (_ARGS,),
    HttpActionResponse: (_OUTPUT,),
    HttpResponseError: (*_FAILURE, _ACTOR),
    HttpQueueSendRequest: (
        Field("body", "body", Kind.VALUE),
        Field("name", "name", Kind.TEXT, optional=True),
        Field("wait", "wait", Kind.BOOL, optional=True),
        Field("timeout", "timeout", Kind.U64, optional=True),
    ),
    HttpQueueSendResponse: (
        Field("status", "status", Kind.TEXT),
        Field("response", "response", Kind.VALUE, optional=True),
    ),
}

FIRST_VERSION: Final[dict[type, int]] = {HttpQueueSendRequest: 3, HttpQueueSendResponse: 3}
"""The oldest version that has the message, where that is not 1."""
