"""The messages of training: what the server asks and what a client answers.

One message per client and step carries the cut-layer gradient of the step before and asks
for the smashed data of the next, so T mini-batches cost T+1 exchanges. ``docs/protocol.md``
writes the same down for people.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from torch import Tensor

from flsplit.account.clock import Leg
from flsplit.errors import NonFiniteError, ProtocolError
from flsplit.finite import all_finite
from flsplit.message import request as common
from flsplit.message.fields import In
from flsplit.message.request import (
    Batch,
    Reply,
    Request,
    SegmentArrays,
    check_batch,
    check_clipped,
    check_segment,
    refuse_labels,
)
from flsplit.message.round_plan import RoundPlan
from flsplit.message.types import FINISH, STEP
from flsplit.nested import leaves_of, num_rows


@dataclass(frozen=True)
class StepReply(Reply):
    """A client's smashed data and labels for one step."""

    client: common.Client
    server_round: common.Round
    step: Annotated[int, In("reply", 0)]
    # Activations at the cut layer, floating point, the batch in front: ``(b, ...)``; or all that
    # crosses, where that is more than one tensor
    smashed: common.SmashedField
    labels: common.Labels
    num_examples: common.Examples  # size of the client's training data
    num_steps: Annotated[int, In("metrics", 1)]  # how many steps the client has this round
    seconds: common.Seconds
    # Traces of what crosses that the client has not sent in this round, by digest
    traces: common.Traces = None
    # Whether the client needs no cut-layer gradient: nothing before the cut is trained
    frozen: common.Frozen = False
    # Steps that the client had done in the run when its round began; with less than it has done, it
    # has lost some of its state
    steps_before: common.StepsBefore = 0

    @cached_property
    def rows(self) -> int:
        """How many rows there are, 0 if the client sits the step out."""
        return num_rows(self.labels)

    def batches(self) -> list[Batch]:
        """Return the one batch, none of a client that sits the step out."""
        return [(self.smashed, self.labels)] if self.rows else []

    def legs(self, backward_rows: int, up_bytes: int) -> Iterable[Leg]:
        """Return the backward pass of the step before and the forward pass of this one."""
        yield Leg(
            forward_rows=self.rows,
            backward_rows=backward_rows,
            up_bytes=up_bytes,
            step=self.step if self.rows else None,
        )


@dataclass(frozen=True)
class StepRequest(Request):
    """Asks a client for the smashed data of ``step``, after the backward pass of the last one.

    ``plan`` (and, where needed, ``segment`` and ``optimizer``) begin a round and come with
    step 0 only. What the client was told to do stays on the server: ``num_steps`` and
    ``num_examples``, as far as they are known, and ``planned``, the plan of its round.
    """

    kind = STEP
    answer = StepReply
    echoed = ("server_round", "step", "num_steps", "num_examples")

    server_round: Annotated[int, In("step", 1)]
    step: Annotated[int, In("step", 0)]
    backward: common.Gradient = None
    plan: common.Plan = None
    segment: common.Segment = None
    optimizer: common.Optimizer = None
    num_steps: int | None = None
    num_examples: int | None = None
    planned: RoundPlan | None = None

    def check(self, reply: StepReply) -> None:
        """Check the number of steps, the smashed data and the labels."""
        if self.planned and self.num_examples is None:  # else both are echoed
            self.planned.check_steps(reply.num_steps, reply.num_examples)
        most = self.planned.rows_at(self.step) if self.planned else None
        check_batch(reply.smashed, reply.labels, reply.rows, most)
        if self.planned and self.planned.keeps_labels:
            refuse_labels(reply.labels)


@dataclass(frozen=True)
class FinishReply(Reply):
    """A client's end of a round, with its segment and optimizer state where they were asked for.

    ``clipped`` says whether a privacy mod clipped the segment, where one does.
    """

    client: common.Client
    server_round: common.Round
    num_examples: common.Examples
    seconds: common.Seconds
    segment: common.State = None
    optimizer: common.Optimizer = None
    clipped: common.Clipped = None

    ends_round = True

    def legs(self, backward_rows: int, up_bytes: int) -> Iterable[Leg]:
        """Return the last backward pass."""
        yield Leg(backward_rows=backward_rows, up_bytes=up_bytes)


@dataclass(frozen=True)
class FinishRequest(Request):
    """Ends a client's round: the last backward pass, and what to send back.

    What the client was told or has said before stays on the server: ``like``, the segment that
    what it hands over must fit, ``num_examples``, and ``planned``, the plan of its round.
    """

    kind = FINISH
    answer = FinishReply
    echoed = ("server_round", "num_examples")

    server_round: Annotated[int, In("finish", 1)]
    backward: common.Gradient = None
    upload_segment: Annotated[bool, In("finish")] = False
    upload_optimizer: Annotated[bool, In("finish")] = False
    like: SegmentArrays | None = None
    num_examples: int | None = None
    planned: RoundPlan | None = None

    def check(self, reply: FinishReply) -> None:
        """Check what is handed over."""
        if self.upload_optimizer and reply.optimizer is None:
            raise ProtocolError(
                "record 'optimizer' is missing, the optimizer's state was asked for"
            )
        if self.upload_optimizer:  # it goes on to the next client
            for place, value in leaves_of(reply.optimizer):
                if isinstance(value, Tensor) and not all_finite(value):
                    raise NonFiniteError(f"optimizer: {place} is NaN or infinite")
        if self.upload_segment:
            check_segment(reply.segment, self.like)
            check_clipped(reply.clipped, self.planned)
