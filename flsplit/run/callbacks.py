"""What watches over a run, mostly once per round: early stopping, the best model, a printout."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result

from flsplit.account.ledger import RoundEntry
from flsplit.errors import ConfigError
from flsplit.log import logger
from flsplit.message.arrays import from_record, to_record
from flsplit.message.request import Reply, Request
from flsplit.run.arguments import number, whole


@dataclass(frozen=True)
class FinishedRound:
    """A round that has ended, with what a callback may want to see.

    Attributes
    ----------
    entry : RoundEntry
        Its line of the ledger: losses, evaluation, metrics, bytes, times.
    num_rounds : int
        How many rounds the run has.
    arrays : ArrayRecord
        The whole model's state dict, or the server segment's, as in ``Result.arrays``.
    central : dict of str to float
        What ``evaluate_fn`` returned for this round.
    is_whole_model : bool
        Whether ``arrays`` is the whole model's.
    """

    entry: RoundEntry
    num_rounds: int
    arrays: ArrayRecord
    central: dict[str, float]
    is_whole_model: bool = True

    def metric(self, name: str) -> float:
        """Return a metric: of federated or central evaluation, of training, or of the method.

        ``train-loss`` and ``train-accuracy`` are those of the round's training.

        Raises
        ------
        ConfigError
            If the round has no such metric; those that it has are named.
        """
        found: dict[str, Any] = {**self.entry.named(), **self.central}
        value = found.get(name)
        if not isinstance(value, (int, float)):
            there = sorted(key for key, one in found.items() if isinstance(one, (int, float)))
            raise ConfigError(
                f"round {self.entry.round} has no metric {name!r} (it has {', '.join(there)})"
            )
        return float(value)


class Callback:
    """Base class: called at the end of every round; may stop the run, may keep state.

    It is given as the option ``callbacks``, in a list.
    """

    def on_round_end(self, round_: FinishedRound) -> bool | None:
        """Look at a round; return True to end the run after it."""
        return None

    def on_exchange(self, requests: Mapping[str, Request], replies: Mapping[str, Reply]) -> None:
        """Look at what the server sent to clients and what came back, by client, in training.

        They are the server's own objects, with tensors as they crossed: nothing may be changed.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, for checkpoints: tensors, numbers, strings, dicts, lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""


def refuse_misspelt(callback: Callback) -> None:
    """Raise ConfigError if a callback has a hook that nobody calls, or overrides none."""
    cls, hooks = type(callback), [name for name in vars(Callback) if name.startswith("on_")]
    for name in dir(cls):
        if name.startswith("on_") and name not in hooks:
            raise ConfigError(
                f"callbacks: {cls.__name__} has {name}, expected {' or '.join(hooks)}"
            )
    if all(getattr(cls, hook) is getattr(Callback, hook) for hook in hooks):
        raise ConfigError(f"callbacks: {cls.__name__} has neither {' nor '.join(hooks)}")


def may_stop(callback: Callback) -> bool:
    """Tell whether a callback may end the run: whether it looks at rounds at all."""
    return type(callback).on_round_end is not Callback.on_round_end


class _Best(Callback):
    def __init__(self, metric: str, mode: Literal["auto", "max", "min"]) -> None:
        if mode not in ("auto", "max", "min"):
            raise ConfigError(f"mode is {mode!r}, expected 'auto', 'max' or 'min'")
        if not isinstance(metric, str):
            raise ConfigError(f"metric is {metric!r}, expected a name such as 'loss'")
        self.metric = metric
        lower = mode == "min" or (mode == "auto" and metric.endswith("loss"))
        self._sign = -1.0 if lower else 1.0
        self.best, self.best_round = math.nan, 0

    def improves(self, round_: FinishedRound, least: float = 0.0) -> bool:
        """Look at a round's value; tell whether it is better than all before it by ``least``."""
        value = round_.metric(self.metric)
        if math.isnan(value):
            return False
        if self.best_round and not self._sign * (value - self.best) > least:
            return False
        self.best, self.best_round = value, round_.entry.round
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its round."""
        return {"best": self.best, "best-round": self.best_round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.best, self.best_round = state["best"], state["best-round"]


class EarlyStopping(_Best):
    """Ends a run whose metric has not become better for some rounds.

    Parameters
    ----------
    metric : str
        A metric's name, see :meth:`FinishedRound.metric`.
    patience : int
        So many rounds without an improvement are waited for, at least 1.
    min_delta : float
        An improvement is more than this.
    mode : {'auto', 'max', 'min'}
        Whether more or less is better; ``auto``: less for a name that ends in ``loss``.
    """

    def __init__(
        self,
        metric: str = "loss",
        *,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["auto", "max", "min"] = "auto",
    ) -> None:
        super().__init__(metric, mode)
        self.patience = whole("patience", patience, 1)
        self.min_delta = number("min_delta", min_delta, 0.0)

    def on_round_end(self, round_: FinishedRound) -> bool:
        """Stop ``patience`` rounds after the best one."""
        if self.improves(round_, self.min_delta):
            return False
        stop = round_.entry.round - self.best_round >= self.patience
        if stop:
            logger.info(
                "stopping after round %d: the best %s was %.4f, in round %d",
                round_.entry.round, self.metric, self.best, self.best_round,
            )  # fmt: skip
        return stop


class KeepBest(_Best):
    """Keeps the arrays of the round whose metric was best, in ``arrays``.

    Parameters
    ----------
    metric : str
        A metric's name, see :meth:`FinishedRound.metric`.
    mode : {'auto', 'max', 'min'}
        As in :class:`EarlyStopping`.

    Attributes
    ----------
    arrays : ArrayRecord or None
        Of the best round so far, None before the first.
    best, best_round : float, int
        Its value, and which round it was.
    """

    def __init__(
        self, metric: str = "accuracy", *, mode: Literal["auto", "max", "min"] = "auto"
    ) -> None:
        super().__init__(metric, mode)
        self.arrays: ArrayRecord | None = None
        self._told = False

    def on_round_end(self, round_: FinishedRound) -> None:
        """Keep the round's arrays if it is the best."""
        if not round_.is_whole_model and not self._told:
            self._told = True
            logger.warning(
                "KeepBest keeps the server segment alone: the clients have segments of their own, "
                "which go on changing. To keep whole models, pass client_strategy=FedAvg()"
            )
        if self.improves(round_):
            self.arrays = round_.arrays

    def state_dict(self) -> dict[str, Any]:
        """Return the best round's arrays, too."""
        arrays = from_record(self.arrays, field="best") if self.arrays is not None else None
        return super().state_dict() | {"arrays": arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        super().load_state_dict(state)
        self.arrays = None if state["arrays"] is None else to_record(state["arrays"])


class PrintMetrics(Callback):
    """Logs every round's metrics as Flower's strategies do, one MetricRecord for each kind."""

    def on_round_end(self, round_: FinishedRound) -> None:
        """Log them."""
        entry = round_.entry
        logger.info("[ROUND %d/%d]", entry.round, round_.num_rounds)
        for what, numbers in (
            ("train", dict(entry.train_metrics())),
            ("evaluate, clients", entry.evaluation),
            ("evaluate, server", round_.central),
        ):
            if numbers:
                logger.info("\t└──> Aggregated MetricRecord (%s): %s", what, numbers)


class Stopping(Callback):
    """``should_stop`` of ``Strategy.start`` as a callback."""

    def __init__(self, should_stop: Callable[..., bool], result: Result) -> None:
        self._should_stop, self._result = should_stop, result
        parameters = inspect.signature(should_stop).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._takes = sum(one.kind in kinds for one in parameters)

    def on_round_end(self, round_: FinishedRound) -> bool:
        """Ask it."""
        known = (round_.entry.round, self._result)
        return bool(self._should_stop(*known[: self._takes]))
