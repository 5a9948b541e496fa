"""The Flower message ``train.session``: what a node needs to become a session's host."""

import time
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from flsplit.errors import ProtocolError
from flsplit.message.fields import record, value

SESSION = "train.session"


@dataclass(frozen=True)
class Invitation:
    """Asks a node to dial back and serve.

    Attributes
    ----------
    session : str
        The session's id.
    experiment : str
        Names the clients' states on disk; a resumed run keeps it.
    address : str
        What to dial, as ``host:port``.
    token : str
        Lets this host in, once.
    certificate : bytes
        The only certificate to trust, PEM; empty without TLS.
    expires : float
        Unix time after which the invitation is void.
    max_step_bytes : int
        The longest message.
    state_dir : str
        Where a simulated host keeps its clients' states; a deployed one has its own
        ``state-dir``.
    """

    session: str
    experiment: str
    address: str
    token: str
    certificate: bytes
    expires: float
    max_step_bytes: int
    state_dir: str

    @property
    def expired(self) -> bool:
        """Whether it is too late to come."""
        return time.time() > self.expires

    def to_content(self) -> RecordDict:
        """Return the content of a ``train.session`` message."""
        fields = {
            "session": self.session,
            "experiment": self.experiment,
            "address": self.address,
            "token": self.token,
            "certificate": self.certificate,
            "expires": self.expires,
            "max-step-bytes": self.max_step_bytes,
            "state-dir": self.state_dir,
        }
        return RecordDict({"session": ConfigRecord(fields)})  # type: ignore[arg-type]

    @classmethod
    def from_content(cls, content: RecordDict) -> "Invitation":
        """Return the invitation in a message; ProtocolError if it is malformed."""
        fields = record(content, "session", ConfigRecord)
        certificate = fields.get("certificate")
        if not isinstance(certificate, bytes):
            raise ProtocolError(f"field 'certificate' is {certificate!r}, expected bytes")
        return cls(
            session=value(fields, "session", str),
            experiment=value(fields, "experiment", str),
            address=value(fields, "address", str),
            token=value(fields, "token", str),
            certificate=certificate,
            expires=value(fields, "expires", float, minimum=0.0),
            max_step_bytes=value(fields, "max-step-bytes", int, minimum=1),
            state_dir=value(fields, "state-dir", str),
        )
