"""What a simulated clock is told of a run: who computes what and sends what, in which order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A piece of a client's work: it computes, then it sends."""

    forward_rows: int = 0  # rows that go forward and backward through its segment
    backward_rows: int = 0
    auxiliary_rows: int = 0  # rows that go forward and backward through its auxiliary model
    # Rows that go forward and backward through the last layers of a U-shaped split
    tail_rows: int = 0
    up_bytes: int = 0  # what it sends then
    step: int | None = None  # the step whose smashed data is among that


@dataclass(frozen=True)
class Errand:
    """What an exchange has one client do: receive, then the legs, one after the other."""

    down_bytes: int  # what is sent to this client alone
    legs: tuple[Leg, ...] = ()  # its work; none if no answer came


@dataclass(frozen=True)
class Exchange:
    """What was asked of clients at the same time."""

    errands: Mapping[str, Errand]  # by client
    shared_bytes: int = 0  # what is sent to several clients alike, once
    # Whether clients begin when the server is ready, or where they left off
    after_server: bool = True
    # Whether the server goes on when all have answered, or works on answers as they come
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
