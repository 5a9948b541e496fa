"""What a simulated clock is told of a run: who computes what and sends what, in which order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A piece of a client's work: it computes, then it sends.

    Attributes
    ----------
    forward_rows, backward_rows : int
        Rows that go forward and backward through its segment.
    auxiliary_rows : int
        Rows that go forward and backward through its auxiliary model.
    tail_rows : int
        Rows that go forward and backward through the last layers of a U-shaped split.
    up_bytes : int
        What it sends then.
    step : int or None
        The step whose smashed data is among that.
    """

    forward_rows: int = 0
    backward_rows: int = 0
    auxiliary_rows: int = 0
    tail_rows: int = 0
    up_bytes: int = 0
    step: int | None = None


@dataclass(frozen=True)
class Errand:
    """What an exchange has one client do: receive, then the legs, one after the other.

    Attributes
    ----------
    down_bytes : int
        What is sent to this client alone.
    legs : tuple of Leg
        Its work; none if no answer came.
    """

    down_bytes: int
    legs: tuple[Leg, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """What was asked of clients at the same time.

    Attributes
    ----------
    errands : mapping of str to Errand
        By client.
    shared_bytes : int
        What is sent to several clients alike, once.
    after_server : bool
        Whether clients begin when the server is ready, or where they left off.
    before_server : bool
        Whether the server goes on when all have answered, or works on answers as they come.
    """

    errands: Mapping[str, Errand]
    shared_bytes: int = 0
    after_server: bool = True
    before_server: bool = True


class Clock(Protocol):
    """Tells how long a run would take somewhere else.

    ``started`` is when something really began, by `time.perf_counter`: a clock may let it last
    as long as it would take there.
    """

    def exchanged(self, exchange: Exchange, started: float) -> None:
        """Take note of an exchange."""
        ...

    def stepped(
        self,
        uploads: Iterable[tuple[str, int]],
        *,
        forward_rows: int,
        backward_rows: int,
        logit_rows: int,
        started: float,
    ) -> None:
        """Take note of the server's work on the smashed data of (client, step).

        ``forward_rows`` go forward through its segment, ``logit_rows`` back through the last
        layer and ``backward_rows`` on from there to the cut. A plain step has as many of each; a
        step may be told in several calls.
        """
        ...

    def aligned(self, rows: int, epochs: int, started: float) -> None:
        """Take note of an auxiliary model's alignment on ``rows`` of smashed data."""
        ...

    def end_round(self) -> float:
        """Return how long the round takes, in seconds, and begin the next."""
        ...
