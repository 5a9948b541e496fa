"""The methods that are compared, and the learning rates each is tried with."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from flwr.serverapp.strategy import FedAvg

from flsplit.strategies import EPSL, GAPSL, PSL, SGLR, SequentialSL, SplitFedV1, SplitFedV2

Rates = dict[str, float]


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes
    ----------
    make : callable or None
        Makes the strategy from the common options; None is FedAvg on the unsplit model.
    grid : list of dict
        Six points: the same budget for every method.
    """

    make: Callable[..., Any] | None
    grid: list[Rates]


def _with(cls: type, **fixed: Any) -> Callable[..., Any]:
    return lambda **options: cls(**fixed, **options)


def _sfl(**options: Any) -> PSL:
    return PSL(client_strategy=FedAvg(), **options)


def _pairs(server: list[float], client: list[float]) -> list[Rates]:
    return [{"server_lr": s, "client_lr": c} for s, c in product(server, client)]


def _one(rates: list[float]) -> list[Rates]:
    return [{"server_lr": rate, "client_lr": rate} for rate in rates]


_BOTH = _pairs([0.03, 0.1, 0.3], [0.01, 0.03])
_TURNS = _pairs([0.003, 0.01, 0.03], [0.01, 0.03])  # ten server steps where others do one
_SUM = _pairs([0.003, 0.01, 0.03], [0.01, 0.03])  # a sum over ten clients, not a mean
_SGLR = [{"client_lr": lr, "alpha": a} for lr, a in product([0.01, 0.03, 0.1], [0.5, 1.0])]
_WHOLE = _one([0.005, 0.01, 0.02, 0.04, 0.06, 0.08])  # FedAvg, and V1, which computes the same

METHODS = {
    "psl": Method(PSL, _BOTH),
    "sfl": Method(_sfl, _BOTH),
    "splitfed-v1": Method(SplitFedV1, _WHOLE),
    "splitfed-v2": Method(SplitFedV2, _TURNS),
    "sequential-sl": Method(SequentialSL, _TURNS),
    "fedavg": Method(None, _WHOLE),
    "sglr": Method(SGLR, _SGLR),
    "epsl-0.5": Method(_with(EPSL, phi=0.5), _BOTH),
    "epsl-1": Method(_with(EPSL, phi=1.0), _BOTH),
    "gapsl-eta-1": Method(_with(GAPSL, eta=-1.0), _SUM),
    "gapsl-eta0": Method(_with(GAPSL, eta=0.0), _SUM),
    "gapsl-eta0.3": Method(_with(GAPSL, eta=0.3), _SUM),
}
