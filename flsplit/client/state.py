"""Everything a client must remember between two messages, as one explicit value."""

from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from flsplit.message.arrays import from_record, to_array
from flsplit.message.fields import record, value
from flsplit.message.local_steps import AuxiliaryPlan
from flsplit.message.optimizer_state import OptimizerState, state_from_records, state_to_records
from flsplit.message.round_plan import RoundPlan

_SEGMENT, _OPTIMIZER, _NUMBERS = "flsplit.segment", "flsplit.optimizer", "flsplit.optimizer-numbers"
_PLAN, _PROGRESS = "flsplit.plan", "flsplit.progress"
_AUXILIARY, _AUXILIARY_PLAN = "flsplit.auxiliary", "flsplit.auxiliary-plan"
_AUXILIARY_OPTIMIZER = "flsplit.auxiliary-optimizer"
_AUXILIARY_NUMBERS = "flsplit.auxiliary-optimizer-numbers"
_AUXILIARY_PROGRESS = "flsplit.auxiliary-progress"

NO_STEP = -1
NO_SEGMENT = -1


@dataclass
class AuxiliaryState:
    """A client's auxiliary model between two messages.

    Attributes
    ----------
    plan : AuxiliaryPlan
        How it is built and what for.
    tensors : dict of str to torch.Tensor
        Parameters and buffers by name.
    optimizer : OptimizerState
        Of the optimizer that trains it; empty where the client doesn't.
    version : int
        Which of the server's versions it came from.
    """

    plan: AuxiliaryPlan
    tensors: dict[str, Tensor]
    optimizer: OptimizerState
    version: int

    def put(self, records: RecordDict) -> None:
        """Write the state into ``records``."""
        records[_AUXILIARY] = ArrayRecord({k: to_array(v) for k, v in self.tensors.items()})
        optimizer = state_to_records(self.optimizer)
        records[_AUXILIARY_OPTIMIZER], records[_AUXILIARY_NUMBERS] = optimizer
        records[_AUXILIARY_PLAN] = self.plan.to_config()
        records[_AUXILIARY_PROGRESS] = ConfigRecord({"version": self.version})

    @classmethod
    def get(cls, records: RecordDict) -> "AuxiliaryState | None":
        """Return the state in ``records``, None if there is none."""
        if _AUXILIARY_PLAN not in records:
            return None
        return cls(
            plan=AuxiliaryPlan.from_config(record(records, _AUXILIARY_PLAN, ConfigRecord)),
            tensors=from_record(record(records, _AUXILIARY, ArrayRecord), field=_AUXILIARY),
            optimizer=state_from_records(
                record(records, _AUXILIARY_OPTIMIZER, ArrayRecord),
                record(records, _AUXILIARY_NUMBERS, ConfigRecord),
            ),
            version=value(record(records, _AUXILIARY_PROGRESS, ConfigRecord), "version", int),
        )


@dataclass
class ClientState:
    """A client between two messages.

    A forward pass is undone by definition until its gradient arrives: while a step is pending,
    the state is the one *before* its forward pass, which can be computed again exactly from
    ``position`` and the seeds (BatchNorm buffers move once, not twice).

    Attributes
    ----------
    segment : dict of str to torch.Tensor
        Parameters and buffers (also those that a state dict leaves out), by name.
    optimizer : OptimizerState
        Momentum, moments and step counts.
    version : int
        Which of the server's segments this one came from; -1 before the first.
    position : int
        Mini-batches drawn since the run began.
    steps_done : int
        Steps done in this round.
    pending : int
        The step whose gradient is awaited; -1 if none.
    plan : RoundPlan or None
        The round the client is in.
    auxiliary : AuxiliaryState or None
        Its auxiliary model, where the method has one.
    """

    segment: dict[str, Tensor]
    optimizer: OptimizerState = field(default_factory=dict)
    version: int = NO_SEGMENT
    position: int = 0
    steps_done: int = 0
    pending: int = NO_STEP
    plan: RoundPlan | None = None
    auxiliary: AuxiliaryState | None = None

    def is_ahead_of(self, server_round: int, experiment: str) -> bool:
        """Tell whether a round that begins has been trained in already.

        A run that was resumed does rounds again. A round may begin twice before its first step.
        """
        if self.plan is None or self.plan.experiment != experiment:
            return False
        return server_round < self.plan.server_round + bool(self.steps_done)

    def put(self, records: RecordDict) -> None:
        """Write the state into ``records`` (a ``Context.state``), beside what else is there."""
        records[_SEGMENT] = ArrayRecord({k: to_array(v) for k, v in self.segment.items()})
        records[_OPTIMIZER], records[_NUMBERS] = state_to_records(self.optimizer)
        records[_PROGRESS] = ConfigRecord(
            {
                "version": self.version,
                "position": self.position,
                "steps-done": self.steps_done,
                "pending": self.pending,
            }
        )
        records[_PLAN] = self.plan.to_config() if self.plan else ConfigRecord()
        if self.auxiliary:
            self.auxiliary.put(records)

    @classmethod
    def get(cls, records: RecordDict) -> "ClientState | None":
        """Return the state in ``records``, None if there is none."""
        if _PROGRESS not in records:
            return None
        progress = record(records, _PROGRESS, ConfigRecord)
        plan = record(records, _PLAN, ConfigRecord)
        return cls(
            segment=from_record(record(records, _SEGMENT, ArrayRecord), field=_SEGMENT),
            optimizer=state_from_records(
                record(records, _OPTIMIZER, ArrayRecord), record(records, _NUMBERS, ConfigRecord)
            ),
            version=value(progress, "version", int),
            position=value(progress, "position", int),
            steps_done=value(progress, "steps-done", int),
            pending=value(progress, "pending", int),
            plan=RoundPlan.from_config(plan) if plan else None,
            auxiliary=AuxiliaryState.get(records),
        )
