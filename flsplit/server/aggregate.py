"""Aggregating segments with any Flower strategy: parameters through it, buffers beside it."""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)
from torch import Tensor

from flsplit.carry.carrier import MessageGrid
from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.flower_internals import CLIPPING_NORM, Run
from flsplit.log import logger
from flsplit.message.arrays import check_like, from_record, to_record


@dataclass(frozen=True)
class Upload:
    """What one client brings to an aggregation: a state dict, its weight, how it trained."""

    tensors: dict[str, Tensor]
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def _refuse_to_send(*arguments: Any, **options: Any) -> NoReturn:
    raise ConfigError(
        "a client_strategy that sends messages of its own can't aggregate segments; flsplit calls "
        "its configure_train and aggregate_train only"
    )


class _ClientView(MessageGrid):
    """Shows a Flower strategy the clients as nodes 0, 1, 2, … in their fixed order.

    Real node ids are random: a strategy that samples among them would choose other clients in
    every run, and others again on another carrier.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def get_node_ids(self) -> Iterable[int]:
        return range(len(self._names))

    @property
    def run(self) -> Run:
        _refuse_to_send()

    set_run = push_messages = pull_messages = send_and_receive = _refuse_to_send


CLIENT_SEGMENTS, COPIES, JOINED = "client segments", "server segment's copies", "joined models"
_BESIDE = {CLIENT_SEGMENTS: "the server segment, ", COPIES: "the client segments, ", JOINED: ""}

_CLIPS_AT_SERVER = (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
_DIFFERENTIALLY_PRIVATE = (
    *_CLIPS_AT_SERVER,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
)
_NUM_EXAMPLES = "num-examples"
_TINY = 1e-15  # its square is still a number in float32


class SegmentAggregator:
    """Lets a Flower strategy choose a round's clients and aggregate what they upload.

    Of the Flower strategy only ``configure_train`` and ``aggregate_train`` are called. Buffers
    don't go through it: floating-point ones are averaged by ``num_examples``, integer ones
    (BatchNorm's counter) take the maximum. Frozen parameters stay, where an average could differ in
    a bit. ``sees`` says in words what is aggregated.
    """

    def __init__(
        self,
        strategy: Strategy,
        buffers: set[str],
        frozen: Collection[str] = (),
        sees: str = CLIENT_SEGMENTS,
    ) -> None:
        self.strategy = strategy
        self._layers = [strategy]  # those of differential privacy are wrapped around another
        while isinstance(inner := getattr(self._layers[-1], "strategy", None), Strategy):
            self._layers.append(inner)
        if (name := type(self._layers[-1]).__name__).startswith("FedXgb"):
            raise ConfigError(f"{name} aggregates trees, and no weights of a network")
        self.clipping_norm = 0.0
        """To what length the clients are to clip in this round; 0 for not at all."""
        self.buffers, self.frozen = buffers, frozenset(frozen)
        self.metrics = MetricRecord()
        """What the strategy's ``train_metrics_aggr_fn`` made of the last round's metrics."""
        self._messages: dict[str, Message] = {}
        self._weight_key = getattr(self._layers[-1], "weighted_by_key", _NUM_EXAMPLES)
        self._warn_of_what_is_not_asked(sees)
        for layer in self._layers:
            if isinstance(layer, _DIFFERENTIALLY_PRIVATE):
                logger.warning(
                    "%s sees the %s only: %ssmashed data, labels, cut-layer gradients and buffers "
                    "are neither clipped nor get noise, so the run is not differentially private "
                    "by it", type(layer).__name__, sees, _BESIDE[sees],
                )  # fmt: skip

    def _warn_of_what_is_not_asked(self, sees: str) -> None:
        inner = self._layers[-1]
        if sees == COPIES and getattr(inner, "fraction_evaluate", 1.0) != 1.0:
            logger.warning(
                "%s has a fraction_evaluate, which is not used: it aggregates the %s only",
                type(inner).__name__, sees,
            )  # fmt: skip
        if self._weight_key != _NUM_EXAMPLES:
            logger.warning(
                "%s weighs clients by %r, which is their number of examples here",
                type(inner).__name__, self._weight_key,
            )  # fmt: skip

    def evaluates(self, fraction: float, least: int) -> tuple[float, int]:
        """Return the fraction and the least number of clients that evaluate.

        What the split strategy's options say goes before what the Flower strategy says.
        """
        inner = self._layers[-1]
        if fraction == 1.0:
            fraction = getattr(inner, "fraction_evaluate", fraction)
        return fraction, getattr(inner, "min_evaluate_nodes", least) if least == 1 else least

    @property
    def wants_norm_bit(self) -> bool:
        """Whether clients that clip say if there was something to clip."""
        adaptive = DifferentialPrivacyClientSideAdaptiveClipping
        return any(isinstance(one, adaptive) for one in self._layers)

    @property
    def least_clients(self) -> int:
        """With fewer clients a Flower strategy waits for more, without an end."""
        if getattr(self._layers[-1], "fraction_train", 1.0) == 0.0:
            return 0
        names = ("min_available_nodes", "min_train_nodes")
        return max(getattr(self._layers[-1], name, 0) for name in names)

    def configure(
        self,
        server_round: int,
        tensors: Mapping[str, Tensor],
        names: Callable[[], list[str]],
        seed: int,
    ) -> list[str]:
        """Return the clients that the strategy chooses; its random choice follows ``seed``."""
        names_now = names()
        if len(names_now) < self.least_clients:
            raise NotEnoughClientsError(
                f"{type(self.strategy).__name__} needs {self.least_clients} clients or more (its "
                f"min_available_nodes, min_train_nodes), but there are {len(names_now)}"
            )
        view, arrays = _ClientView(names_now), to_record(self._parameters(tensors))
        state = random.getstate()
        random.seed(seed)
        try:
            messages = list(
                self.strategy.configure_train(server_round, arrays, ConfigRecord(), view)
            )
        finally:
            random.setstate(state)
        self.clipping_norm = 0.0
        for message in messages:
            self._check_config(message)
        by_index = dict(enumerate(names_now))
        self._messages = {by_index[m.metadata.dst_node_id]: m for m in messages}
        return [name for name in by_index.values() if name in self._messages]

    def _check_config(self, message: Message) -> None:
        """Refuse what the strategy tells the clients and a split client would not heed."""
        for config in message.content.config_records.values():
            if CLIPPING_NORM in config:
                norm = config[CLIPPING_NORM]
                if not (isinstance(norm, int | float) and 0 < norm < math.inf):
                    raise ConfigError(f"{CLIPPING_NORM} is {norm!r}, expected a finite number")
                self.clipping_norm = float(norm)
            if ignored := sorted(set(config) - {"server-round", CLIPPING_NORM}):
                raise ConfigError(
                    f"{type(self.strategy).__name__} tells the clients {', '.join(ignored)}, which "
                    "a split client doesn't know: of FedProx, take FedAvg and the client part "
                    "Proximal(mu); learning rates are set with server_lr and client_lr"
                )

    def aggregate(
        self, server_round: int, uploads: Mapping[str, Upload], before: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the aggregated state dict; ``before`` where the strategy returns nothing."""
        if any(isinstance(one, _CLIPS_AT_SERVER) for one in self._layers):
            uploads = self._changed(uploads, before)
        if not uploads:
            return dict(before)
        known = _common([upload.metrics for upload in uploads.values()])
        replies = [self._reply(name, upload, known) for name, upload in uploads.items()]
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        self.metrics = metrics or MetricRecord()
        if arrays is None:
            logger.warning(
                "%s aggregated nothing in round %d: the segment stays as it was",
                type(self.strategy).__name__, server_round,
            )  # fmt: skip
            return dict(before)
        aggregated = from_record(arrays, field="aggregated arrays")
        aggregated |= average_buffers(
            [{k: u.tensors[k] for k in before if k in self.buffers} for u in uploads.values()],
            [upload.num_examples for upload in uploads.values()],
        )
        aggregated |= {name: before[name] for name in self.frozen if name in before}
        what = "the aggregated segment"
        return check_like(aggregated, before, what=what, free=self.buffers)

    def _changed(
        self, uploads: Mapping[str, Upload], before: Mapping[str, Tensor]
    ) -> dict[str, Upload]:
        """Return the uploads but those that are what they were: Flower divides by their length."""
        start = self._parameters(before)
        changed = {
            name: one
            for name, one in uploads.items()
            if any((one.tensors[k].to(old) - old).norm() > _TINY for k, old in start.items())
        }
        for name in uploads.keys() - changed.keys():
            logger.warning(
                "client %r isn't aggregated: nothing of it has changed, and %s can't clip that",
                name, type(self.strategy).__name__,
            )  # fmt: skip
        return changed

    def _reply(self, name: str, upload: Upload, known: Collection[str]) -> Message:
        key = self._weight_key
        metrics = {one: upload.metrics[one] for one in known}
        if "train-loss" in metrics and (loss := getattr(self._layers[-1], "train_loss_key", "")):
            metrics[loss] = metrics["train-loss"]  # QFedAvg weighs clients by it
        content = RecordDict(
            {
                getattr(self._layers[-1], "arrayrecord_key", "arrays"): to_record(
                    self._parameters(upload.tensors)
                ),
                "metrics": MetricRecord(
                    {_NUM_EXAMPLES: upload.num_examples, key: upload.num_examples, **metrics}
                ),
            }
        )
        return Message(content, reply_to=self._messages[name])

    def evaluate(
        self, server_round: int, scores: Mapping[str, Mapping[str, float]]
    ) -> MetricRecord:
        """Return what the strategy makes of the clients' evaluations, as Flower calls it."""
        key = self._weight_key
        replies, known = [], _common(list(scores.values()))
        for index, numbers in enumerate(scores.values()):
            own = {one: numbers[one] for one in known}
            metrics = MetricRecord({**own, key: int(numbers[_NUM_EXAMPLES])})
            asked = Message(RecordDict(), index, "evaluate", group_id=str(server_round))
            replies.append(Message(RecordDict({"metrics": metrics}), reply_to=asked))
        return self.strategy.aggregate_evaluate(server_round, replies) or MetricRecord()

    def state_dict(self) -> dict[str, Any]:
        """Return what the strategy, and one that it is wrapped around, remember between rounds.

        FedAdam, FedAvgM and their like keep arrays as dicts of NumPy arrays in attributes; Flower
        has no interface for saving them. Wrappers of differential privacy keep a norm that adapts,
        and an accountant of what was spent.
        """
        state: dict[str, Any] = {}
        for depth, one in enumerate(self._layers):
            for name, value in vars(one).items():
                key = "strategy." * depth + name
                if name == "clipping_norm" and hasattr(one, "clip_norm_lr"):
                    state[key] = value
                elif name == "accountant" and value is not None:
                    state[key] = value.state_dict()
                elif (
                    isinstance(value, dict)
                    and value
                    and all(isinstance(array, np.ndarray) for array in value.values())
                ):
                    state[key] = {k: torch.from_numpy(np.array(v)) for k, v in value.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        for key, value in state.items():
            *wrappers, name = key.split(".")
            one = self._layers[len(wrappers)]
            if name == "accountant":
                one.accountant.load_state_dict(value)  # type: ignore[attr-defined]
            elif name == "clipping_norm":
                setattr(one, name, value)
            else:
                setattr(one, name, {k: tensor.numpy() for k, tensor in value.items()})

    def _parameters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name not in self.buffers}


def _common(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the metrics that all clients have: Flower's strategies take no others.

    One whose labels are no class indices, say, has no accuracy.
    """
    return [name for name in metrics[0] if all(name in one for one in metrics)] if metrics else []


def average_buffers(buffers: list[dict[str, Tensor]], num_examples: list[int]) -> dict[str, Tensor]:
    """Return buffers averaged by ``num_examples``, and of whole numbers the maximum.

    Of buffers whose shapes differ, those count that have the shape of most examples.
    """
    averaged = {}
    for name in buffers[0]:
        of_shape: Counter[torch.Size] = Counter()
        for one, n in zip(buffers, num_examples, strict=True):
            of_shape[one[name].shape] += n
        ((usual, total),) = of_shape.most_common(1)
        pairs = [
            (one[name], n)
            for one, n in zip(buffers, num_examples, strict=True)
            if one[name].shape == usual
        ]
        device = pairs[0][0].device  # some may be the server's own
        stacked = torch.stack([tensor.to(device) for tensor, _ in pairs])
        if stacked.is_floating_point() or stacked.is_complex():
            precise = torch.complex128 if stacked.is_complex() else torch.float64
            shares = torch.tensor([n / total for _, n in pairs], dtype=precise)
            weights = shares.view(-1, *[1] * (stacked.ndim - 1)).to(stacked.device)
            averaged[name] = (stacked.to(precise) * weights).sum(0).to(stacked.dtype)
        else:
            # On CPU, torch has no maximum of uint16 and wider ones.
            largest = torch.from_numpy(np.asarray(stacked.cpu().numpy().max(0)))
            averaged[name] = largest.to(stacked.device)
    return averaged
