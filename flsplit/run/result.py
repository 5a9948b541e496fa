"""What a run returns: Flower's Result, and what split learning has besides."""

from dataclasses import dataclass, field

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result

from flsplit.account import History


@dataclass(repr=False)
class SplitResult(Result):
    """Flower's ``Result`` with the ledger and, where clients shared them, their segments.

    Attributes
    ----------
    history : History
        The ledger, round by round.
    client_segments : dict of str to ArrayRecord
        Final client segments by client name; only with ``share_client_segments=True``.
    """

    history: History = field(default_factory=History)
    client_segments: dict[str, ArrayRecord] = field(default_factory=dict)
