"""The Flower message ``train.session``: what a node needs to become a session's host."""

import time
from typing import Annotated

from flwr.app import ConfigRecord, RecordDict
from msgspec import Meta, Struct, ValidationError, convert, to_builtins

from flsplit.errors import ProtocolError
from flsplit.message.fields import record

SESSION = "train.session"


class Invitation(Struct, frozen=True, rename="kebab"):
    """Asks a node to dial back and serve."""

    session: str  # the session's id
    experiment: str  # names the clients' states on disk; a resumed run keeps it
    address: str  # what to dial, as ``host:port``
    token: str  # lets this host in, once
    certificate: bytes  # the only certificate to trust, PEM; empty without TLS
    expires: Annotated[float, Meta(ge=0.0)]  # Unix time after which the invitation is void
    max_step_bytes: Annotated[int, Meta(ge=1)]  # the longest message
    # Where a simulated host keeps its clients' states; a deployed one has its own ``state-dir``
    state_dir: str
    # Whether the node is one of a simulation, whose hosts serve any of its clients
    simulated: bool = False

    @property
    def expired(self) -> bool:
        """Whether it is too late to come."""
        return time.time() > self.expires

    def to_content(self) -> RecordDict:
        """Return the content of a ``train.session`` message."""
        return RecordDict({"session": ConfigRecord(to_builtins(self, builtin_types=(bytes,)))})

    @classmethod
    def from_content(cls, content: RecordDict) -> "Invitation":
        """Return the invitation in a message; ProtocolError if it is malformed."""
        fields = dict(record(content, "session", ConfigRecord))
        try:
            return convert(fields, cls, builtin_types=(bytes,))
        except ValidationError as error:
            raise ProtocolError(f"invitation: {error}") from error
