"""Everything a client must remember between two messages, as one explicit value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Self

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from flsplit.message.arrays import check_like, from_record, to_array
from flsplit.message.fields import Content, In, Records, Slot, Written, nested, record
from flsplit.message.local_steps import AuxiliaryPlan
from flsplit.message.optimizer_state import IndexedState, indexed
from flsplit.message.round_plan import RoundPlan
from flsplit.untrained import names_of_buffers, put

_PREFIX = "flsplit."
_PROGRESS = f"{_PREFIX}progress"

NO_STEP = -1
NO_SEGMENT = -1


def _tensors(key: str) -> Slot:
    """Return how tensors are kept: raw, since NumPy doesn't know all their types."""

    def put(records: Written, tensors: dict[str, Tensor]) -> None:
        arrays = records[key] = ArrayRecord()
        for name, tensor in tensors.items():
            arrays[name] = to_array(tensor)

    return Slot(key, put, lambda records: from_record(record(records, key, ArrayRecord), field=key))


def _put_told(records: Written, told: tuple[str, ...]) -> None:
    if told:
        records[f"{_PREFIX}told"] = ConfigRecord({"traces": list(told)})


def _get_told(records: Records) -> tuple[str, ...]:
    told = record(records, f"{_PREFIX}told", ConfigRecord)["traces"]
    return tuple(map(str, told)) if isinstance(told, list) else ()


_TOLD = Slot(f"{_PREFIX}told", _put_told, _get_told)
_AUXILIARY = f"{_PREFIX}auxiliary"
_AUXILIARY_PLAN = nested(f"{_AUXILIARY}-plan", AuxiliaryPlan)


@dataclass
class AuxiliaryState(Content):
    """A client's auxiliary model between two messages."""

    plan: Annotated[AuxiliaryPlan, _AUXILIARY_PLAN]  # how it is built and what for
    tensors: Annotated[dict[str, Tensor], _tensors(_AUXILIARY)]
    # Of the optimizer that trains it; empty where the client doesn't
    optimizer: Annotated[IndexedState, indexed(f"{_AUXILIARY}-optimizer")]
    # Which of the server's versions it came from
    version: Annotated[int, In(f"{_AUXILIARY}-progress")]


def _put_auxiliary(records: Written, state: AuxiliaryState) -> None:
    records.update(state.to_content())


@dataclass
class ClientState(Content):
    """A client between two messages.

    A forward pass is undone by definition until its gradient arrives: while a step is pending,
    the state is the one *before* its forward pass, which can be computed again exactly from
    ``drawn`` and the seeds (BatchNorm buffers move once, not twice).
    """

    # Parameters and buffers (also those that a state dict leaves out), by name
    segment: Annotated[dict[str, Tensor], _tensors(f"{_PREFIX}segment")]
    # Momentum, moments and step counts
    optimizer: Annotated[IndexedState, indexed(f"{_PREFIX}optimizer")] = field(default_factory=dict)
    # Which of the server's segments this one came from; -1 before the first
    version: Annotated[int, In(_PROGRESS)] = NO_SEGMENT
    # Examples drawn since the run began; what an epoch left out counts as well
    drawn: Annotated[int, In(_PROGRESS)] = 0
    # Size of the training data when the round began
    num_examples: Annotated[int, In(_PROGRESS, 0)] = 0
    # Size of the test data when the last evaluation began
    num_tests: Annotated[int, In(_PROGRESS, 0)] = 0
    steps_done: Annotated[int, In(_PROGRESS)] = 0  # steps done in this round
    trained: Annotated[int, In(_PROGRESS, 0)] = 0  # steps done in this run
    # The step whose gradient is awaited; -1 if none
    pending: Annotated[int, In(_PROGRESS)] = NO_STEP
    plan: Annotated[RoundPlan | None, nested(f"{_PREFIX}plan", RoundPlan)] = None
    # Its auxiliary model, where the method has one
    auxiliary: Annotated[
        AuxiliaryState | None,
        Slot(_AUXILIARY_PLAN.record, _put_auxiliary, AuxiliaryState.from_content),
    ] = None
    # What client parts remember, by their index
    parts: Annotated[IndexedState, indexed(f"{_PREFIX}parts")] = field(default_factory=dict)
    # Trainable parameters when the round began, where a client part needs them
    round_start: Annotated[dict[str, Tensor], _tensors(f"{_PREFIX}round-start")] = field(
        default_factory=dict
    )
    # Trainable parameters as the server gave them last, where a privacy mod needs them
    given: Annotated[dict[str, Tensor], _tensors(f"{_PREFIX}given")] = field(default_factory=dict)
    # Digests of the traces that were sent in this round
    told: Annotated[tuple[str, ...], _TOLD] = ()
    # Of the last layers of a U-shaped split: what the pending step's passes have left
    tail: Annotated[dict[str, Tensor], _tensors(f"{_PREFIX}tail")] = field(default_factory=dict)
    # Sums over the test batches of an evaluation, where a client computes them itself
    tested: Annotated[dict[str, Tensor], _tensors(f"{_PREFIX}tested")] = field(default_factory=dict)

    def is_ahead_of(self, server_round: int, experiment: str) -> bool:
        """Tell whether a round that begins has been trained in already.

        A run that was resumed does rounds again. A round may begin twice before its first step.
        """
        if self.plan is None or self.plan.experiment != experiment:
            return False
        return server_round < self.plan.server_round + bool(self.steps_done)

    def put(self, records: RecordDict) -> None:
        """Write the state into ``records`` (a ``Context.state``), beside what else is there."""
        for name in [name for name in records if name.startswith(_PREFIX)]:
            del records[name]
        records.update(self.to_content())

    @classmethod
    def get(cls, records: RecordDict) -> Self | None:
        """Return the state in ``records``, None if there is none."""
        return cls.from_content(records) if _PROGRESS in records else None


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name, also what its state dict leaves out."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


@torch.no_grad()
def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Give a module the values that :func:`own_tensors` returned.

    SegmentMismatchError if they are those of another module.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    free = names_of_buffers(module)
    for name, tensor in check_like(tensors, own, what=what, free=free).items():
        put(own[name], tensor)
