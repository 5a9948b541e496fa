"""What a method is to the comparison, and how one is written down."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from flsplit.auxiliary import BuildAuxiliary

Rates = dict[str, float]


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes
    ----------
    title : str
        How pages call it.
    says : str
        What it does, for the page.
    shares_clients : bool
        Whether all clients have the same client segment at a round's end.
    make : callable or None
        Makes the strategy from the common options; None is FedAvg on the unsplit model.
    grid : list of dict
        Six points: the same budget for every method.
    auxiliary : callable or None
        What builds the auxiliary model, where the clients must be given it, too.
    """

    title: str
    says: str
    shares_clients: bool
    make: Callable[..., Any] | None
    grid: list[Rates]
    auxiliary: BuildAuxiliary | None = None


def made_with(cls: type, **fixed: Any) -> Callable[..., Any]:
    """Return what makes a strategy with some of its options fixed."""
    return lambda **options: cls(**fixed, **options)


def pairs(server: list[float], client: list[float]) -> list[Rates]:
    """Return a grid of every server rate with every client rate."""
    return [{"server_lr": s, "client_lr": c} for s, c in product(server, client)]
