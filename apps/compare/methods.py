"""The methods that are compared, and the learning rates that each one's tuning begins with.

A method is written ``name``, ``name{options}`` or ``name+fedavg``, where the name is a registered
strategy's, the options a TOML table as of ``strategy-args``, and ``+fedavg`` averages the client
segments of a method that doesn't do it itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from flwr.serverapp.strategy import FedAvg
from task import pooled_classifier
from tuning import Grid, Rates

from flsplit.auxiliary import BuildAuxiliary
from flsplit.errors import ConfigError, did_you_mean
from flsplit.run import SplitStrategy, make_strategy
from flsplit.run.registry import GROUP, arguments_table, strategy_names

# The client's rate matters most: three of them, two of the server's. A step of the mean over
# clients takes a larger server rate than ten steps in turn, or a sum of ten gradients.
CLIENT = [0.003, 0.01, 0.03]
MEAN: Grid = {"client_lr": CLIENT, "server_lr": [0.03, 0.1]}
TURNS: Grid = {"client_lr": CLIENT, "server_lr": [0.01, 0.03]}
SCALED: Grid = {"client_lr": CLIENT, "alpha": [0.5, 1.0]}  # SGLR's server rate follows from these
WHOLE: Grid = {"lr": [0.01, 0.03, 0.1]}  # one rate for all layers
FROZEN: Grid = {"server_lr": [0.03, 0.1]}  # the clients' is 0


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes
    ----------
    title, says : str
        How pages call it, and what it does.
    strategy : str
        A registered strategy; empty for FedAvg on the unsplit model.
    grid : mapping of str to list of float
        What its tuning begins with.
    options : mapping of str to object
        The strategy's options.
    averaged : bool
        Whether Flower's FedAvg averages client segments that the method leaves apart.
    auxiliary : callable, optional
        What builds the auxiliary model, where the clients must be given it, too.
    """

    title: str
    says: str
    strategy: str
    grid: Grid = field(default_factory=lambda: MEAN)
    options: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = False
    auxiliary: BuildAuxiliary | None = None

    @property
    def shares_clients(self) -> bool:
        """Whether all clients have the same client segment at a round's end."""
        cls = None if not self.strategy else strategy_class(self.strategy)
        return cls is None or self.averaged or getattr(cls, "aggregates", False) or cls.hands_on

    def make(self, rates: Rates, **options: Any) -> SplitStrategy:
        """Return a strategy; ``options`` are those that all methods have."""
        return make_strategy(self.strategy, **self.arguments(options) | as_options(rates))

    def arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options but the rates; a strategy of Flower's keeps state: a new one each."""
        averaging = {"client_strategy": FedAvg()} if self.averaged else {}
        auxiliary = {"auxiliary": self.auxiliary} if self.auxiliary else {}
        return {**options, **self.options, **averaging, **auxiliary}


METHODS = {
    "sequential-sl": Method(
        "Sequential SL",
        "clients take turns; each hands its segment to the next",
        "sequential-sl", TURNS,
    ),
    "splitfed-v1": Method(
        "SplitFed V1",
        "a server copy per client; copies and client segments are averaged every round",
        "splitfed-v1", WHOLE,
    ),
    "splitfed-v2": Method(
        "SplitFed V2",
        "one server segment, a step for each client in turn; client segments are averaged",
        "splitfed-v2", TURNS,
    ),
    "sfl": Method(
        "SFL (PSL + FedAvg)", "PSL whose client segments are averaged every round", "psl",
        averaged=True,
    ),
    "fedavg": Method(
        "FedAvg",
        "Flower's, not split: every client trains the whole model; no server step at all",
        "", WHOLE,
    ),
    "fsl-sage": Method(
        "FSL-SAGE",
        "clients step with auxiliary models and don't wait; every 5th mini-batch's smashed data "
        "goes up; the server aligns the auxiliary models in every 5th round",
        "fsl-sage", TURNS, {"align_every": 5},
    ),
    "cse-fsl": Method(
        "CSE-FSL",
        "the same, but clients train the auxiliary models, whose averages take their place",
        "cse-fsl", TURNS,
    ),
    "psl": Method(
        "PSL",
        "one server step on all clients' smashed data together; clients keep their segments",
        "psl",
    ),
    "frozen": Method(
        "PSL, clients frozen",
        "clients keep the weights that they begin with: what no training of theirs is needed for",
        "psl", FROZEN, {"client_lr": 0.0},
    ),
    "sglr": Method(
        "SGLR",
        "PSL; half of the clients share a cut-layer gradient, the server's rate is scaled up",
        "sglr", SCALED,
    ),
    "epsl": Method(
        "EPSL",
        "PSL; half of each mini-batch is aggregated over clients before it goes back",
        "epsl", options={"phi": 0.5},
    ),
    "gapsl": Method(
        "GAPSL",
        "PSL; the server steps with the clients whose gradients agree with a leader's",
        "gapsl", TURNS,
    ),
    "cyclesl": Method(
        "CycleSL",
        "the server trains on all rows, mixed, in mini-batches of 32; then clients get gradients",
        "cyclesl", TURNS,
    ),
    "sfl-ga": Method(
        "SFL-GA",
        "PSL; all clients step with one broadcast mean of the cut-layer gradients",
        "sfl-ga",
    ),
    "fsl-sage-pooled": Method(
        "FSL-SAGE, pooled",
        "FSL-SAGE with the mean of each channel and a linear layer as auxiliary model",
        "fsl-sage", TURNS, {"align_every": 5}, auxiliary=pooled_classifier,
    ),
}  # fmt: skip
DECOUPLED = ("fsl-sage", "cse-fsl")
ABLATIONS = [
    *(f"{name}{{upload_every={q}}}" for name in DECOUPLED for q in (1, 2, 10)),
    *(f"fsl-sage{{align_every={n}}}" for n in (0, 1, 2, 10)),
    'fsl-sage{align="before_round"}', "fsl-sage-pooled", 'fsl-sage{auxiliary="first-stage"}',
]  # fmt: skip


def groups() -> dict[str, list[str]]:
    """Return what ``--methods`` takes for several of them."""
    own = [name for name in METHODS if name != "fsl-sage-pooled"]
    return {
        "all": [*own, *(name for name in strategy_names() if name not in METHODS)],
        "quick": ["splitfed-v2", "sfl", "fedavg", "fsl-sage", "cse-fsl", "psl", "epsl", "gapsl"],
        "decoupled": [*DECOUPLED, "splitfed-v1", "splitfed-v2", "fedavg"],
        "ablations": ABLATIONS,
    }


def expand(names: Sequence[str]) -> list[str]:
    """Return each method that is named, itself or by a group of it, once.

    Raises
    ------
    ConfigError
        If there is no such method; the nearest is named.
    """
    found = list(dict.fromkeys(one for name in names for one in groups().get(name, [name])))
    for name in found:
        find_method(name)
    return found


@lru_cache
def find_method(spec: str) -> Method:
    """Return the method that is written so."""
    head, brace, table = spec.partition("{")
    name, plus, averaged = head.strip().partition("+")
    known = [*METHODS, *(one for one in strategy_names() if one not in METHODS)]
    if name not in known:
        choices = [*known, *groups()]
        hint = did_you_mean(name, choices)
        raise ConfigError(f"--methods: there is no {name!r}{hint} (there are {', '.join(choices)})")
    if plus and averaged != "fedavg":
        raise ConfigError(f"--methods: {spec!r} ends in +{averaged}, expected +fedavg")
    method = METHODS.get(name) or _registered(name)
    if not (brace or plus):
        return method
    own = arguments_table(brace + table)
    if not method.strategy:
        raise ConfigError(f"--methods: {name} takes no options, but they are {table!r}")
    shown = ", ".join(f"{key} {value}" for key, value in own.items())
    return replace(
        method,
        title=", ".join(filter(None, [method.title + (" + FedAvg" if plus else ""), shown])),
        says=f"{method.says}; here {spec}",
        options={**method.options, **{k.replace("-", "_"): v for k, v in own.items()}},
        averaged=method.averaged or bool(plus),
    )


@lru_cache
def strategy_class(name: str) -> type[SplitStrategy]:
    """Return a registered strategy's class."""
    (found,) = entry_points(group=GROUP, name=name)
    cls: type[SplitStrategy] = found.load()
    return cls


def as_options(rates: Rates) -> dict[str, float]:
    """Return the options that a point of a grid stands for."""
    found = dict(rates)
    if "lr" in found:
        found["server_lr"] = found["client_lr"] = found.pop("lr")
    return found


def _registered(name: str) -> Method:
    """Return somebody else's strategy."""
    says = (strategy_class(name).__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return Method(name, says, name)
