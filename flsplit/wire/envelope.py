"""What stands on the outside of a message: for whom, and which one it is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Envelope:
    """The address of one message within a session.

    Parameters
    ----------
    client : str
        Which client of the host's cohort the message is for, or comes from.
    sequence : int
        The number that a reply shares with the message it answers.
    epoch : int
        Raised when a host or client starts over, so that what is left over from before can be
        told from what is new.
    kind : str
        What sort of message this is; free for the layers above.
    """

    client: str
    sequence: int
    epoch: int
    kind: str = "message"
