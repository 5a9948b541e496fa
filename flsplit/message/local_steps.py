"""The messages of local training: steps without the server, then what came of them.

``train.local`` asks a client for steps that it takes by itself, with the gradient that its
auxiliary model emulates, and for the smashed data of some of them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from flsplit.account.clock import Leg
from flsplit.cut import Trace
from flsplit.cut.smashed import values_of
from flsplit.errors import ProtocolError
from flsplit.message import request as common
from flsplit.message.crossings import Unresolved, crossings_in, get_smashed, put_smashed
from flsplit.message.fields import Fields, In, Records, Slot, Written, nested, record, value
from flsplit.message.nestings import arrays_of, get_nesting
from flsplit.message.request import (
    Batch,
    Reply,
    Request,
    SegmentArrays,
    check_batch,
    check_clipped,
    check_handed_over,
    check_segment,
)
from flsplit.message.round_plan import RoundPlan
from flsplit.message.types import LOCAL
from flsplit.nested import num_rows, tensors_of

_MEMORY = ("segment", "activations", "auxiliary", "auxiliary-activations")


@dataclass(frozen=True, kw_only=True)
class AuxiliaryPlan(Fields):
    """Which auxiliary model a client works with in a round, and what it does with it."""

    kind: str  # how it is built: 'linear', 'first-stage' or 'given'
    # Shape of one row of the smashed data it takes
    shape: Annotated[tuple[int, ...], In(least=1, length=1)]
    num_classes: Annotated[int, In(least=1)]  # how many classes it tells apart
    version: Annotated[int, In(least=0)]  # which of the server's versions the client must hold
    train: bool  # whether the client trains it on its own loss
    lr: Annotated[float, In(least=0.0)]  # the learning rate for that
    # Whether its loss is the client's own, as the strategy's is not plain cross-entropy
    given_loss: bool = False


def _put_uploads(records: Written, uploads: Mapping[int, Batch]) -> None:
    smashed: dict[str, Array] = {}
    labels: dict[str, Array] = {}
    crossings: dict[str, Any] = {}
    for step, (rows, of_rows) in uploads.items():
        put_smashed(smashed, crossings, str(step), rows)
        labels |= arrays_of(of_rows, str(step))
    records["smashed-data"], records["labels"] = (ArrayRecord, smashed), (ArrayRecord, labels)
    if crossings:
        records["crossing"] = ConfigRecord, crossings


def _get_uploads(records: Records) -> dict[int, Batch]:
    smashed = record(records, "smashed-data", ArrayRecord)
    labels = record(records, "labels", ArrayRecord)
    steps = [list(dict.fromkeys(map(_step_in, one))) for one in (smashed, labels)]
    if steps[0] != steps[1]:
        raise ProtocolError(f"smashed-data is of steps {steps[0]}, labels of steps {steps[1]}")
    crossings = crossings_in(records)
    return {
        step: (
            get_smashed(smashed, crossings, str(step), "smashed-data"),  # type: ignore[misc]
            get_nesting(labels, str(step), field="labels"),
        )
        for step in steps[0]
    }


def _step_in(key: str) -> int:
    step = re.match("[0-9]{1,9}", key)
    if step is None or str(int(step.group())) != step.group():
        raise ProtocolError(f"smashed-data: key is {key!r}, expected a step")
    return int(step.group())


def _put_memory(records: Written, memory: Mapping[str, int]) -> None:
    records["memory"] = MetricRecord({name: memory[name] for name in _MEMORY})


def _get_memory(records: Records) -> dict[str, int]:
    memory = record(records, "memory", MetricRecord)
    found = {name: value(memory, name, int, minimum=0) for name in _MEMORY}
    if max(found.values()) > common.MOST_BYTES:
        raise ProtocolError(f"memory: {found}, expected at most {common.MOST_BYTES} bytes each")
    return found


_State = Annotated[dict[str, Tensor] | None, common.state_dict("auxiliary")]


@dataclass(frozen=True, kw_only=True)
class LocalReply(Reply):
    """What came of a client's local steps."""

    client: common.Client
    server_round: common.Round
    step: Annotated[int, In("reply", 0)]
    # Smashed data ``(b, ...)`` and labels ``(b, ...)`` by step
    uploads: Annotated[
        Mapping[int, Batch], Slot("smashed-data", _put_uploads, _get_uploads, required=True)
    ]
    num_examples: common.Examples  # size of the client's training data
    # How many steps the client has this round, and how many it has done
    num_steps: Annotated[int, In("metrics", 1)]
    steps_done: Annotated[int, In("metrics", 0)]
    # How many rows each step that was asked for had, from ``step`` on
    rows: Annotated[Sequence[int], In("metrics", 0, length=1)]
    seconds: common.Seconds
    # Measured bytes: ``segment`` and ``auxiliary`` (parameters, buffers, gradients, optimizer) and
    # ``activations`` and ``auxiliary-activations`` (what a batch leaves for backward; 0 where step
    # 0 was not among the steps)
    memory: Annotated[
        Mapping[str, int], Slot("memory", _put_memory, _get_memory, required=True)
    ] = field(default_factory=lambda: dict.fromkeys(_MEMORY, 0))
    # State dicts, where they were asked for and the client's round has ended
    segment: common.State = None
    auxiliary: _State = None
    traces: common.Traces = None
    steps_before: common.StepsBefore = 0  # how many it had done in the run before this round
    clipped: common.Clipped = None  # whether a privacy mod clipped the segment, where one does

    @property
    def ends_round(self) -> bool:  # type: ignore[override]
        """Whether all steps of the client's round are done."""
        return self.steps_done == self.num_steps

    def resolved(self, traces: Mapping[str, Trace]) -> Self:
        """Return the reply with its crossings' traces."""
        if not any(isinstance(one, Unresolved) for one, _ in self.uploads.values()):
            return self
        uploads = {
            step: (one.resolved(traces) if isinstance(one, Unresolved) else one, labels)
            for step, (one, labels) in self.uploads.items()
        }
        return replace(self, uploads=uploads)

    def batches(self) -> list[Batch]:
        """Return the uploads."""
        return list(self.uploads.values())

    def legs(self, backward_rows: int, up_bytes: int) -> Iterable[Leg]:
        """Return a leg per step; what goes up of a step goes up before the next."""
        is_peek = self.steps_done == self.step
        sent = {
            step: sum(tensor.nbytes for tensor in [*values_of(smashed), *tensors_of(labels)])
            for step, (smashed, labels) in self.uploads.items()
        }
        # What was compressed on its way took less: as much less of each step.
        if (total := sum(sent.values())) > up_bytes:
            sent = {step: one * up_bytes // total for step, one in sent.items()}
        for step, rows in enumerate(self.rows, start=self.step):
            trained = 0 if is_peek else rows
            yield Leg(
                forward_rows=rows,
                backward_rows=trained,
                auxiliary_rows=trained,
                up_bytes=sent.get(step, 0),
                step=step if step in sent else None,
            )
        yield Leg(up_bytes=up_bytes - sum(sent.values()))


@dataclass(frozen=True, kw_only=True)
class LocalRequest(Request):
    """Asks a client for local steps from ``step`` on."""

    kind = LOCAL
    answer = LocalReply
    echoed = ("server_round", "step", "num_steps", "num_examples")

    server_round: Annotated[int, In("local", 1)]
    step: Annotated[int, In("local", 0)]
    # The first step not to take; 0 stands for the end of the client's round
    stop: Annotated[int, In("local", 0)] = 0
    # Smashed data and labels of every step that this divides go up
    upload_every: Annotated[int, In("local", 1)] = 1
    upload_from: Annotated[int, In("local", 0)] = 0  # nothing of earlier steps goes up
    # Take no step: send the smashed data of ``step`` only
    peek: Annotated[bool, In("local")] = False
    # Whether to hand them over when the client's round ends
    upload_segment: Annotated[bool, In("local")] = False
    upload_auxiliary: Annotated[bool, In("local")] = False
    plan: common.Plan = None  # begins a round, as does the next: they come with step 0 only
    auxiliary_plan: Annotated[AuxiliaryPlan | None, nested("auxiliary-config", AuxiliaryPlan)] = (
        None
    )
    segment: common.Segment = None  # the client segment, for a client that doesn't hold it
    auxiliary: _State = None  # the auxiliary model's state dict, likewise
    # Whether the client is believed to hold that auxiliary model. It stays on the server.
    auxiliary_held: bool = False
    # What a segment that is handed over must fit. It stays on the server.
    like: SegmentArrays | None = None
    auxiliary_like: dict[str, Tensor] | None = None  # the same for an auxiliary model
    # How many steps the client has this round and how much data, as far as that is known. They stay
    # on the server.
    num_steps: int | None = None
    num_examples: int | None = None
    planned: RoundPlan | None = None  # the plan of the client's round. It stays on the server, too

    def uploads(self, done: int, plan: RoundPlan | None) -> list[int]:
        """Return the steps whose smashed data goes up, if the client has done ``done`` steps.

        Those that it sits out have none.
        """
        first = self.step if self.peek else max(self.step, self.upload_from)
        steps = [self.step] if self.peek else range(first, done)
        return [
            step
            for step in steps
            if (self.peek or step % self.upload_every == 0) and (not plan or plan.rows_at(step))
        ]

    def end(self, num_steps: int) -> int:
        """Return how many steps a client with ``num_steps`` has done afterwards."""
        if self.peek:
            return self.step
        return min(self.stop or num_steps, num_steps)

    def check(self, reply: LocalReply) -> None:
        """Check that the steps asked for were done, and what goes up."""
        if self.planned:
            self.planned.check_steps(reply.num_steps, reply.num_examples)
        done = self.end(reply.num_steps)
        if reply.steps_done != done:
            raise ProtocolError(f"reply: steps-done is {reply.steps_done}, expected {done}")
        if len(reply.rows) != (steps := done - self.step or 1):
            raise ProtocolError(f"field 'rows' has {len(reply.rows)} numbers, expected {steps}")
        if list(reply.uploads) != (expected := self.uploads(done, self.planned)):
            raise ProtocolError(
                f"smashed-data is of steps {list(reply.uploads)}, expected steps {expected}"
            )
        for step, (smashed, labels) in reply.uploads.items():
            most = self.planned.rows_at(step) if self.planned else None
            check_batch(smashed, labels, num_rows(labels), most)
            if (found := num_rows(labels)) != (rows := reply.rows[step - self.step]):
                raise ProtocolError(
                    f"smashed-data of step {step} has {found} rows, field 'rows' says {rows}"
                )
        if done < reply.num_steps or self.peek:
            return
        if self.upload_segment:
            check_segment(reply.segment, self.like)
            check_clipped(reply.clipped, self.planned)
        if self.upload_auxiliary:
            check_handed_over(reply.auxiliary, self.auxiliary_like, "auxiliary", "auxiliary model")
