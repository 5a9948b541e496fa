"""The ledger: what every round sent, computed and reached."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from flwr.app import MetricRecord

CATEGORIES = (
    "activations-up",
    "labels-up",
    "outputs-down",
    "output-gradients-up",
    "gradients-down-unicast",
    "gradients-down-broadcast",
    "client-segments-up",
    "client-segments-down",
    "optimizer-up",
    "optimizer-down",
    "auxiliary-up",
    "auxiliary-down",
    "evaluation-up",
    "evaluation-down",
)
"""What is counted. Up is from a client to the server. ``outputs-down`` and ``output-gradients-up``
are those of a U-shaped split. What evaluation takes (smashed data and labels of test batches, a
U-shaped split's outputs) is kept apart because papers don't count it."""


class Traffic:
    """Bytes by category in two columns.

    Attributes
    ----------
    logical : dict of str to int
        Bytes of the tensors' elements; a gradient shared by several clients counts once, as on
        a broadcast channel. The same on every carrier.
    wire : dict of str to int
        Bytes that the carrier sent for them, as serialised; nothing for a carrier within one
        process.
    """

    def __init__(self) -> None:
        self.logical = dict.fromkeys(CATEGORIES, 0)
        self.wire = dict.fromkeys(CATEGORIES, 0)

    def include(self, other: "Traffic") -> None:
        """Count all that another has counted."""
        for category in CATEGORIES:  # no call for each: this runs for every client and step
            self.logical[category] += other.logical[category]
            self.wire[category] += other.wire[category]

    @property
    def training_bytes(self) -> int:
        """Logical bytes without evaluation: what the papers' tables count."""
        return sum(n for name, n in self.logical.items() if not name.startswith("evaluation"))

    @property
    def up_bytes(self) -> int:
        """Logical bytes of training from clients to the server."""
        return self.training_bytes - self.down_bytes

    @property
    def down_bytes(self) -> int:
        """Logical bytes from the server to clients."""
        return sum(
            n
            for name, n in self.logical.items()
            if "-down" in name and not name.startswith("evaluation")
        )


@dataclass
class LeftOut:
    """A client that was left out from some step of a round on, and why.

    ``away`` tells that its node or host was lost, so that it may be back in the next round, and
    ``times`` how often the run has left it out so far.
    """

    client: str
    step: int
    reason: str
    away: bool = False
    times: int = 1


@dataclass
class RoundEntry:
    """One round of the ledger.

    Attributes
    ----------
    round : int
        The round, from 1.
    participants : list of str
        The clients that were asked to train.
    steps : int
        Server steps.
    rows : int
        Rows back-propagated through the server segment.
    loss, accuracy : float or None
        Mean over the round's training rows, in training mode; accuracy where labels are classes.
    evaluation : dict of str to float
        Federated evaluation: loss and metrics over all test samples.
    traffic : Traffic
        Bytes by category.
    seconds, server_seconds, client_seconds, waiting_seconds : float
        Wall time of the round; compute time of the server; compute time of the clients, summed;
        time the server waited for clients.
    simulated_seconds : float or None
        How long the round takes on the fleet that the run was given.
    left_out : list of LeftOut
        Who was left out, from which step on, and why.
    redone : list of LeftOut
        Whom earlier attempts at the round had lost before it was done again.
    restarted : list of str
        Who had lost its state, or the last of it: it started from the server's segment, with a new
        optimizer and at its first batch, or from what was left.
    metrics : dict of str to float
        What methods record, mean over the round's steps.
    notes : list of str
        What was wrong with files that hold states, of clients and of the server.
    """

    round: int
    participants: list[str] = field(default_factory=list)
    steps: int = 0
    rows: int = 0
    loss: float | None = None
    accuracy: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    seconds: float = 0.0
    server_seconds: float = 0.0
    client_seconds: float = 0.0
    waiting_seconds: float = 0.0
    simulated_seconds: float | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    redone: list[LeftOut] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """Return all that must be the same on every carrier: all but measured times and wire."""
        return {
            "round": self.round,
            "participants": self.participants,
            "steps": self.steps,
            "rows": self.rows,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "evaluation": self.evaluation,
            "logical-bytes": self.traffic.logical,
            "left-out": [asdict(one) for one in self.left_out],
            "redone": [asdict(one) for one in self.redone],
            "restarted": self.restarted,
            "metrics": self.metrics,
            "simulated-seconds": self.simulated_seconds,
        }

    def named(self) -> dict[str, float]:
        """Return all that has a metric's name: of evaluation, of training, of the method.

        ``train-loss`` and ``train-accuracy`` are those of the round's training.
        """
        trained = {"train-loss": self.loss, "train-accuracy": self.accuracy}
        known = {name: value for name, value in trained.items() if value is not None}
        return self.metrics | known | self.evaluation

    def to_json(self) -> dict[str, Any]:
        """Return the entry for the history file; JSON has no NaN and no infinity, but null."""
        return self.numbers() | {
            "loss": _nullable(self.loss),
            "evaluation": {name: _nullable(one) for name, one in self.evaluation.items()},
            "metrics": {name: _nullable(one) for name, one in self.metrics.items()},
            "wire-bytes": self.traffic.wire,
            "notes": self.notes,
            **self._times(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RoundEntry":
        """Return the entry in a line of a history file, which may lack what is newer than it.

        TypeError or ValueError if it is none.
        """
        _check(data)
        given = {name.replace("-", "_"): value for name, value in data.items()}
        traffic = Traffic()
        traffic.logical |= given.pop("logical_bytes")
        traffic.wire |= given.pop("wire_bytes")
        for name in ("evaluation", "metrics"):
            numbers = given[name].items()
            given[name] = {key: math.nan if one is None else one for key, one in numbers}
        for name in ("left_out", "redone"):
            given[name] = [LeftOut(**one) for one in given.get(name, [])]
        return cls(traffic=traffic, **given)

    def _times(self) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "server-seconds": self.server_seconds,
            "client-seconds": self.client_seconds,
            "waiting-seconds": self.waiting_seconds,
        }

    def train_metrics(self) -> MetricRecord:
        """Return the round as the MetricRecord of Flower's ``Result.train_metrics_clientapp``."""
        record = MetricRecord()
        if self.loss is not None:
            record["train-loss"] = self.loss
        if self.accuracy is not None:
            record["train-accuracy"] = self.accuracy
        record["steps"], record["rows"] = self.steps, self.rows
        record["num-left-out"] = len({one.client for one in self.left_out})
        for name, logical in self.traffic.logical.items():
            if logical or self.traffic.wire[name]:
                record[f"logical-bytes-{name}"] = logical
                record[f"wire-bytes-{name}"] = self.traffic.wire[name]
        times = self._times()
        if self.simulated_seconds is not None:
            times["simulated-seconds"] = self.simulated_seconds
        for name, number in (times | self.metrics).items():
            record[name] = number
        return record


_Number = (int, float, type(None))
_TIMES = ("seconds", "server-seconds", "client-seconds", "waiting-seconds")
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("round", "steps", "rows"), (int,)),
    **dict.fromkeys(("evaluation", "metrics", "logical-bytes", "wire-bytes"), (dict,)),
    **dict.fromkeys(("participants", "left-out", "redone", "restarted", "notes"), (list,)),
    **dict.fromkeys(("loss", "accuracy", "simulated-seconds"), _Number),
    **dict.fromkeys(_TIMES, (int, float)),
}
"""What a line of the history file has, and of which types."""

_NEEDED = ("round", "evaluation", "metrics", "logical-bytes", "wire-bytes")


def _check(data: Any) -> None:
    """Raise TypeError or ValueError if ``data`` is no entry, with what is wrong."""
    if not isinstance(data, dict):
        raise TypeError(f"it is a {type(data).__name__}, expected an object")
    if missing := [name for name in _NEEDED if name not in data]:
        raise ValueError(f"{', '.join(map(repr, missing))} missing")
    for name, value in data.items():
        if name not in _KINDS:
            raise ValueError(f"{name!r} is nothing that a round has")
        _refuse_other_types(name, value, _KINDS[name])
        if name in ("evaluation", "metrics"):
            for key, one in value.items():
                _refuse_other_types(f"{name}: {key}", one, _Number)
        if name.endswith("-bytes"):
            for key, one in value.items():
                _refuse_other_types(f"{name}: {key}", one, (int,))
        if name in ("left-out", "redone"):
            for one in value:
                try:
                    LeftOut(**one)
                except TypeError as error:
                    raise ValueError(f"{name!r} has {one!r}: {error}") from error


def _refuse_other_types(name: str, value: object, expected: tuple[type, ...]) -> None:
    if not isinstance(value, expected) or (isinstance(value, bool) and float not in expected):
        kinds = " or ".join("null" if one is type(None) else one.__name__ for one in expected)
        raise TypeError(f"{name!r} is {value!r}, expected {kinds}")


def _nullable(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
