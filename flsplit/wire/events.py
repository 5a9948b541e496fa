"""What the server tells the thread that runs the session."""

from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from flsplit.wire.header import Envelope


@dataclass(frozen=True, slots=True)
class HostJoined:
    """A host has opened its stream and introduced itself."""

    host: str  # what the token was issued for; in all events
    epoch: int
    hello: dict[str, Any]  # what the host says of itself. It comes from outside: check it


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """A host has sent a message of `size` bytes; the envelope is what the host says."""

    host: str
    epoch: int
    envelope: Envelope
    message: Message
    size: int


@dataclass(frozen=True, slots=True)
class HostLost:
    """A host's stream has ended, and not because the server closed it."""

    host: str
    epoch: int
    reason: str


Event = HostJoined | MessageArrived | HostLost
