"""What all strategies have in common to choose."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from flwr.serverapp.strategy import Strategy
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flsplit.carry.choose import CarrierName
from flsplit.carry.session import SessionSettings
from flsplit.client_parts import ClientPart, check_places, describe_parts
from flsplit.cut.client_cuts import ClientCuts, all_cuts, check_cuts, default_cut
from flsplit.cut.partial_forward import places_of
from flsplit.errors import ConfigError, did_you_mean
from flsplit.log import logger
from flsplit.losses import SUMMED, Loss, reduction_of
from flsplit.run.arguments import fraction, number, one_of, whole
from flsplit.run.callbacks import Callback, refuse_misspelt
from flsplit.wireless.fleet import Fleet
from flsplit.wireless.fleet_file import find_fleet

if TYPE_CHECKING:
    from torchmetrics import Metric

Shares = Literal["examples", "batch", "equal"]
Reduction = Literal["mean", "sum"]

LearningRate = float | Callable[[int], float]
"""A learning rate, or a function of the round (from 1) that returns one."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """The options of every split strategy.

    Attributes
    ----------
    model : nn.Module
        The unsplit model.
    cut : str, mapping or callable
        Name of the submodule after which it is cut; the ClientApp's must be the same. For different
        cuts of different clients, names by patterns of clients' names, ``"default"`` among them, or
        a function of a client's name.
    example : Tensor, tuple or dict, optional
        A batch of the model's inputs, as the clients' data gives them, for models that can't be
        looked at without one; see :func:`flsplit.split`.
    share : sequence of str
        Inputs of the model that clients may send as they are, such as ``"attention_mask"``; the
        ClientApp's must allow it, too.
    server_lr : float or callable
        Learning rate of the server segment, or a function of the round.
    client_lr : float or callable, optional
        Learning rate of the client segments, sent with every round. Default: ``server_lr`` (a
        ``server_scheduler`` doesn't change it).
    server_optimizer : callable
        Called as ``server_optimizer(parameters, lr=…)``; lives as long as the run.
    server_scheduler : callable, optional
        Takes the server's optimizer, returns a torch scheduler that steps once per round.
    loss : callable
        Takes the model's output and the labels, returns the mean loss or ``(sum, weight)``; or a
        :class:`~flsplit.ModelLoss`, for a model that computes its own. See docs/losses.md.
    metrics : mapping of str to torchmetrics.Metric
        Metrics of federated evaluation, updated with ``(logits, labels)``, beside the loss and
        (where logits are ``(b, C)`` and labels class indices) the accuracy.
    batch_size : int
        Examples per client and step.
    local_epochs : int
        Epochs per round.
    local_steps : int
        Steps per round; 0 stands for ``local_epochs`` whole epochs.
    drop_last : bool
        Leave out an epoch's ragged last batch.
    evaluate_batch_size : int
        Test examples per exchange.
    evaluate_batches : int, optional
        Test batches that each client evaluates in a round, its first ones; 0 or None for all.
    shares : {'examples', 'batch', 'equal'}
        What a client's share λ of the server's loss follows: the size of its data, its rows in
        the step, or nothing.
    reduction : {'mean', 'sum'}
        Σ λ_i L_i, or S times that for S clients.
    server_batchnorm : {'pooled', 'per_client'}
        Whether the server segment normalises over all clients' rows or one client's at a time.
    callbacks : sequence of Callback
        What watches over the run, once per round: early stopping, the best model, a printout.
    client_parts : sequence of ClientPart
        What clients do beside the plain step, in order: clipping, noise, a proximal term.
    device : str
        Where the server computes: a torch device, or ``auto``.
    client_strategy : flwr.serverapp.strategy.Strategy, optional
        Aggregates the client segments every round and chooses the clients.
    share_client_segments : bool
        Let clients hand over their segments at the end of the run, where the method itself
        keeps them at home; they are in ``Result.client_segments``.
    fraction_train, fraction_evaluate : float
        Fraction of the connected clients that train, or evaluate, in a round.
    min_train_nodes, min_evaluate_nodes, min_available_nodes : int
        As in Flower's FedAvg; but 1 by default, since split learning works with one client.
    weighted_by_key : str
        Under which key client strategies find a client's weight.
    carrier : {'auto', 'session', 'flower'}
        How messages travel on Flower's grids: over a session, over Flower's own messages, or
        over a session where one can be opened.
    session : SessionSettings
        Addresses, limits and timeouts of sessions.
    checkpoint_dir : str
        Write a checkpoint after every round to this folder (an absolute path); empty for none.
    resume : bool
        Go on from the last checkpoint in ``checkpoint_dir``.
    fleet : Fleet, str or Path, optional
        Devices and links, or the TOML file that describes them: the ledger then has the time that
        rounds would take there. Empty for none.
    realtime : bool
        Let rounds really last as long as they would on the fleet.
    seed : int
        All random choices of the run follow from it.
    """

    model: nn.Module
    cut: ClientCuts
    example: Any = None
    share: Sequence[str] = ()
    server_lr: LearningRate = 0.01
    client_lr: LearningRate | None = None
    server_optimizer: Callable[..., Optimizer] = torch.optim.SGD
    server_scheduler: Callable[[Optimizer], LRScheduler] | None = None
    loss: Loss = functional.cross_entropy
    metrics: "Mapping[str, Metric]" = field(default_factory=dict)
    batch_size: int = 32
    local_epochs: int = 1
    local_steps: int = 0
    drop_last: bool = False
    evaluate_batch_size: int = 512
    evaluate_batches: int | None = 0
    shares: Shares = "examples"
    reduction: Reduction = "mean"
    server_batchnorm: str = "pooled"
    callbacks: Sequence[Callback] = field(default_factory=tuple)
    client_parts: Sequence[ClientPart] = field(default_factory=tuple)
    device: str = "auto"
    client_strategy: Strategy | None = None
    share_client_segments: bool = False
    fraction_train: float = 1.0
    fraction_evaluate: float = 1.0
    min_train_nodes: int = 1
    min_evaluate_nodes: int = 1
    min_available_nodes: int = 1
    weighted_by_key: str = "num-examples"
    carrier: CarrierName = "auto"
    session: SessionSettings = field(default_factory=SessionSettings)
    checkpoint_dir: str = ""
    resume: bool = False
    fleet: Fleet | str | Path | None = None
    realtime: bool = False
    seed: int = 0

    @property
    def several_cuts(self) -> bool:
        """Whether clients may be cut at different places."""
        return not isinstance(self.cut, str | tuple)

    @property
    def keeps_labels(self) -> bool:
        """Whether the clients have the last layers, too, so that labels stay with them."""
        return not callable(self.cut) and any(places_of(cut)[1] for cut in all_cuts(self.cut))

    @property
    def default_cut(self) -> str:
        """The cut of clients of which nothing else is said."""
        return default_cut(self.cut)

    def __post_init__(self) -> None:
        """Refuse values that can't be used."""
        check_cuts(self.cut)
        if self.keeps_labels:
            self._check_kept_labels()
        for name, kind in _KINDS.items():
            of_kind(name, getattr(self, name), kind)
        _check_metrics(self.metrics)
        for name in ("server_optimizer", "loss"):
            check_callable(name, getattr(self, name))
        if reduction_of(self.loss) == "sum":
            logger.warning("loss has %s", SUMMED)
        if self.server_scheduler is not None:
            check_callable("server_scheduler", self.server_scheduler)
        for callback in self.callbacks:
            of_kind("callbacks: one of them", callback, Callback)
            refuse_misspelt(callback)
        describe_parts(self.client_parts)  # what can't be sent is said now
        check_places(self.client_parts, two_cuts=self.keeps_labels)
        check_rate("server_lr", self.server_lr)
        if self.client_lr is not None:
            check_rate("client_lr", self.client_lr)
        one_of("shares", self.shares, get_args(Shares))
        one_of("carrier", self.carrier, get_args(CarrierName))
        one_of("reduction", self.reduction, get_args(Reduction))
        one_of("server_batchnorm", self.server_batchnorm, ("pooled", "per_client"))
        for name in ("batch_size", "evaluate_batch_size"):
            whole(name, getattr(self, name), 1)
        for name in (
            "local_epochs",
            "local_steps",
            "min_train_nodes",
            "min_evaluate_nodes",
            "seed",
        ):
            whole(name, getattr(self, name), 0)
        if self.evaluate_batches is not None:
            whole("evaluate_batches", self.evaluate_batches, 0)
        whole("min_available_nodes", self.min_available_nodes, 1)
        if self.checkpoint_dir and not Path(self.checkpoint_dir).is_absolute():
            raise ConfigError(
                f"checkpoint_dir is {self.checkpoint_dir!r}, expected an absolute path"
            )
        if self.fleet:
            find_fleet(self.fleet)  # what is wrong with it is said now
        if self.realtime and not self.fleet:
            raise ConfigError("realtime is True, but there is no fleet whose time could be played")
        if self.resume and not self.checkpoint_dir:
            raise ConfigError("resume is True, but checkpoint_dir is empty: resume from where?")
        for name in ("fraction_train", "fraction_evaluate"):
            fraction(name, getattr(self, name))
        if self.local_steps and self.local_epochs != 1:
            logger.warning(
                "local_epochs=%d is not used: a round has local_steps=%d",
                self.local_epochs, self.local_steps,
            )  # fmt: skip
        if not (self.local_epochs or self.local_steps):
            raise ConfigError("local_epochs and local_steps are both 0: nothing would be trained")
        if self.server_scheduler and callable(self.server_lr):
            raise ConfigError(
                "server_lr is a function and server_scheduler is given: use one of them"
            )
        if self.client_strategy:
            for name in ("fraction_train", "min_train_nodes", "weighted_by_key"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ConfigError(
                        f"client_strategy chooses the clients: set {name} there, not here"
                    )

    def _check_kept_labels(self) -> None:
        where = f"cut is {self.cut!r}, so labels stay at the clients:"
        if not all(places_of(cut)[1] for cut in all_cuts(self.cut)):
            raise ConfigError(f"{where} then those of all clients do, and all are cut twice")
        if self.metrics:
            raise ConfigError(
                f"{where} metrics can't be computed here, loss and accuracy are there"
            )
        if self.loss is not functional.cross_entropy:
            raise ConfigError(
                f"{where} give the loss to them, as client_app(loss=…), and none to the strategy"
            )


_METRIC_INTERFACE = ("update", "compute", "to")

_KINDS: dict[str, type | UnionType] = {
    "model": nn.Module,
    "metrics": Mapping,
    "drop_last": bool,
    "callbacks": Sequence,
    "client_parts": Sequence,
    "device": str,
    "client_strategy": Strategy | None,
    "share_client_segments": bool,
    "weighted_by_key": str,
    "session": SessionSettings,
    "checkpoint_dir": str,
    "resume": bool,
    "fleet": Fleet | str | Path | None,
    "realtime": bool,
}


def option_names() -> list[str]:
    """Return the names of all common options."""
    return [one.name for one in fields(SplitOptions)]


def at_round(rate: LearningRate, server_round: int) -> float:
    """Return the learning rate of a round."""
    if not callable(rate):
        return float(rate)
    try:
        found = rate(server_round)
    except Exception as error:  # a function of the user's may raise anything
        raise ConfigError(
            f"server_lr or client_lr is {rate!r}, which can't be called with the round "
            f"{server_round}: {type(error).__name__}: {error}"
        ) from error
    return number(f"the learning rate of round {server_round}", found, 0.0)


def refuse_unknown(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ConfigError for an argument that ``what`` doesn't have, naming the nearest it has."""
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{what} has no argument {name!r}{hint} (it has {', '.join(known)})")


def of_kind(name: str, value: object, kind: type | UnionType) -> None:
    """Raise ConfigError if the argument ``name`` is not an instance of ``kind``."""
    if not isinstance(value, kind):
        expected = kind.__name__ if isinstance(kind, type) else str(get_args(kind)[0].__name__)
        plain = value is None or isinstance(value, (str, int, float))
        found = repr(value) if plain else f"of type {type(value).__name__}"
        if isinstance(value, type):
            found = f"the class {value.__name__} itself"
        raise ConfigError(f"{name} is {found}, expected an object of type {expected}")


def check_callable(name: str, value: object) -> None:
    """Raise ConfigError if the argument ``name`` is nothing to call."""
    if not callable(value):
        raise ConfigError(f"{name} is {value!r}, expected something to call")
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise ConfigError(f"{name} is the class {value.__name__} itself, expected an object of it")


def check_rate(name: str, value: object) -> None:
    """Raise ConfigError if the argument ``name`` is no learning rate."""
    if not callable(value):
        number(name, value, 0.0)


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    for name, metric in metrics.items():
        if name in ("loss", "num-examples"):
            raise ConfigError(f"metrics: {name!r} is what every evaluation has, expected another")
        if isinstance(metric, type):
            raise ConfigError(
                f"metrics: {name!r} is the class {metric.__name__}, expected an object of it"
            )
        if not all(callable(getattr(metric, one, None)) for one in _METRIC_INTERFACE):
            raise ConfigError(
                f"metrics: {name!r} is {metric!r}, expected a torchmetrics metric (an object with "
                f"{', '.join(_METRIC_INTERFACE)})"
            )
