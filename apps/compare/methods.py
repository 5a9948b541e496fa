"""The methods that are compared, and the learning rates each is tried with."""

from collections.abc import Callable
from itertools import product
from typing import Any

from decoupled_methods import ABLATIONS, DECOUPLED
from flwr.serverapp.strategy import FedAvg
from method import Method, Rates, made_with, pairs

from flsplit.strategies import (
    EPSL,
    GAPSL,
    PSL,
    SFLGA,
    SGLR,
    CycleSL,
    SequentialSL,
    SplitFedV1,
    SplitFedV2,
)


def _with_fedavg(cls: type, **fixed: Any) -> Callable[..., Any]:
    # A strategy of its own for each run: Flower's keep state.
    return lambda **options: cls(client_strategy=FedAvg(), **fixed, **options)


def _one(rates: list[float]) -> list[Rates]:
    return [{"server_lr": rate, "client_lr": rate} for rate in rates]


# A client segment that is never averaged does better with small steps, where labels are skewed.
_OWN = pairs([0.03, 0.1, 0.3], [0.001, 0.01])
_SUM = pairs([0.003, 0.01, 0.03], [0.001, 0.01])  # ten clients' sum, or ten server steps
_SGLR = [{"client_lr": lr, "alpha": a} for lr, a in product([0.003, 0.01, 0.03], [1.0, 1.5])]
_SHARED = pairs([0.03, 0.1, 0.3], [0.01, 0.03])
_SUM_SHARED = pairs([0.003, 0.01, 0.03], [0.01, 0.03])
_TURNS = pairs([0.003, 0.01, 0.03], [0.01, 0.03])  # ten server steps where others do one
_WHOLE = _one([0.005, 0.01, 0.02, 0.04, 0.06, 0.08])  # FedAvg, and V1, which computes the same

_ALIGNED = "the server steps with the clients whose gradients agree with a leader's"

METHODS = {
    "sequential-sl": Method(
        "Sequential SL",
        "clients take turns; each hands its segment to the next",
        True,
        SequentialSL,
        _TURNS,
    ),
    "splitfed-v1": Method(
        "SplitFed V1",
        "a server copy per client; copies and client segments are averaged every round",
        True,
        SplitFedV1,
        _WHOLE,
    ),
    "splitfed-v2": Method(
        "SplitFed V2",
        "one server segment, a step for each client in turn; client segments are averaged",
        True,
        SplitFedV2,
        _TURNS,
    ),
    "sfl": Method(
        "SFL (PSL + FedAvg)",
        "PSL whose client segments are averaged every round",
        True,
        _with_fedavg(PSL),
        _SHARED,
    ),
    "fedavg": Method(
        "FedAvg",
        "Flower's, not split: every client trains the whole model; no server step at all",
        True,
        None,
        _WHOLE,
    ),
    **DECOUPLED,
    "psl": Method(
        "PSL",
        "one server step on all clients' smashed data together; clients keep their segments",
        False,
        PSL,
        _OWN,
    ),
    "sglr": Method(
        "SGLR",
        "PSL; half of the clients share a cut-layer gradient, the server's rate is scaled up",
        False,
        SGLR,
        _SGLR,
    ),
    "epsl-0.5": Method(
        "EPSL φ=0.5",
        "PSL; half of each mini-batch is aggregated over clients before it goes back",
        False,
        made_with(EPSL, phi=0.5),
        _OWN,
    ),
    "epsl-1": Method(
        "EPSL φ=1",
        "the same with the whole mini-batch",
        False,
        made_with(EPSL, phi=1.0),
        _OWN,
    ),
    "gapsl-eta-1": Method(
        "GAPSL η=-1",
        f"PSL; {_ALIGNED}; a lenient threshold",
        False,
        made_with(GAPSL, eta=-1.0),
        _SUM,
    ),
    "gapsl-eta0": Method(
        "GAPSL η=0",
        f"PSL; {_ALIGNED}; the default threshold, which keeps about half",
        False,
        made_with(GAPSL, eta=0.0),
        _SUM,
    ),
    "gapsl-eta0.3": Method(
        "GAPSL η=0.3",
        f"PSL; {_ALIGNED}; a strict threshold",
        False,
        made_with(GAPSL, eta=0.3),
        _SUM,
    ),
    "cyclesl": Method(
        "CycleSL",
        "the server trains on all rows, mixed, in mini-batches of 32; then clients get gradients",
        False,
        CycleSL,
        _SUM,
    ),
    "sfl-ga": Method(
        "SFL-GA",
        "PSL; all clients step with one broadcast mean of the cut-layer gradients",
        False,
        SFLGA,
        _OWN,
    ),
    # Variants, to find out why a method does as it does.
    "gapsl-mean": Method(
        "GAPSL η=0, mean",
        "GAPSL; the mean of the kept gradients instead of their sum",
        False,
        made_with(GAPSL, loss_reduction="mean"),
        _OWN,
    ),
    "gapsl-skip": Method(
        "GAPSL η=0, skip",
        "GAPSL; clients that are not kept do not step either",
        False,
        made_with(GAPSL, excluded_clients="skip"),
        _SUM,
    ),
    "gapsl-sfl": Method(
        "GAPSL η=0 + FedAvg",
        "GAPSL whose client segments are averaged every round",
        True,
        _with_fedavg(GAPSL),
        _SUM_SHARED,
    ),
    "gapsl-eta-1-sfl": Method(
        "GAPSL η=-1 + FedAvg",
        "the same with a lenient threshold",
        True,
        _with_fedavg(GAPSL, eta=-1.0),
        _SUM_SHARED,
    ),
    "sglr-phi0": Method(
        "SGLR φ=0",
        "SGLR without averaged gradients: only the server's rate is scaled",
        False,
        made_with(SGLR, phi=0.0),
        _SGLR,
    ),
    "sglr-sfl": Method(
        "SGLR + FedAvg",
        "SGLR whose client segments are averaged every round",
        True,
        _with_fedavg(SGLR),
        _SGLR,
    ),
    **ABLATIONS,
}
VARIANTS = [
    "gapsl-mean", "gapsl-skip", "gapsl-sfl", "gapsl-eta-1-sfl", "sglr-phi0", "sglr-sfl", *ABLATIONS,
]  # fmt: skip
COMPARED = [name for name in METHODS if name not in VARIANTS]
GROUPS = {  # what --methods takes for several of them
    "compared": COMPARED,
    "quick": [name for name in COMPARED if name not in ("epsl-1", "gapsl-eta-1", "gapsl-eta0.3")],
    "decoupled": [*DECOUPLED, "splitfed-v1", "splitfed-v2", "fedavg"],
    "ablations": list(ABLATIONS),
}


def expand(names: list[str]) -> list[str]:
    """Return each method that is named, itself or by a group of it, once."""
    return list(dict.fromkeys(one for name in names for one in GROUPS.get(name, [name])))
