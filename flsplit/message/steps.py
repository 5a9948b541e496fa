"""The messages of training: what the server asks and what a client answers.

One message per client and step carries the cut-layer gradient of the step before and asks
for the smashed data of the next, so T mini-batches cost T+1 exchanges. ``docs/protocol.md``
writes the same down for people.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from flsplit.account.clock import Leg
from flsplit.errors import ProtocolError
from flsplit.message import request as common
from flsplit.message.fields import In
from flsplit.message.request import Batch, Reply, Request, check_batch, check_handed_over
from flsplit.message.round_plan import RoundPlan
from flsplit.message.types import FINISH, STEP


@dataclass(frozen=True)
class StepReply(Reply):
    """A client's smashed data and labels for one step.

    Attributes
    ----------
    client : str
        The client's name.
    server_round, step : int
        Which step this is.
    smashed : torch.Tensor
        Activations at the cut layer, floating point, the batch in front: ``(b, ...)``.
    labels : torch.Tensor
        Labels, ``(b, ...)``.
    num_examples : int
        Size of the client's training data.
    num_steps : int
        How many steps the client has this round.
    seconds : float
        Compute time since the message arrived.
    """

    client: common.Client
    server_round: common.Round
    step: Annotated[int, In("reply", 0)]
    smashed: common.Smashed
    labels: common.Labels
    num_examples: Annotated[int, In("metrics", 1)]
    num_steps: Annotated[int, In("metrics", 1)]
    seconds: common.Seconds

    def batches(self) -> list[Batch]:
        """Return the one batch, none of a client that sits the step out."""
        return [(self.smashed, self.labels)] if len(self.smashed) else []

    def legs(self, backward_rows: int, up_bytes: int) -> Iterable[Leg]:
        """Return the backward pass of the step before and the forward pass of this one."""
        yield Leg(
            forward_rows=len(self.smashed),
            backward_rows=backward_rows,
            up_bytes=up_bytes,
            step=self.step if len(self.smashed) else None,
        )


@dataclass(frozen=True)
class StepRequest(Request):
    """Asks a client for the smashed data of ``step``, after the backward pass of the last one.

    ``plan`` (and, where needed, ``segment`` and ``optimizer``) begin a round and come with
    step 0 only. What the client was told to do stays on the server: ``num_steps``, as far as
    that is known, and ``planned``, the plan of its round.
    """

    kind = STEP
    answer = StepReply
    echoed = ("server_round", "step", "num_steps")

    server_round: Annotated[int, In("step", 1)]
    step: Annotated[int, In("step", 0)]
    backward: common.Gradient = None
    plan: common.Plan = None
    segment: common.Segment = None
    optimizer: common.Optimizer = None
    num_steps: int | None = None
    planned: RoundPlan | None = None

    def check(self, reply: StepReply) -> None:
        """Check the smashed data and labels."""
        most = self.planned.rows_at(self.step) if self.planned else None
        check_batch(reply.smashed, reply.labels, most)


@dataclass(frozen=True)
class FinishReply(Reply):
    """A client's end of a round, with its segment and optimizer state where they were asked for."""

    client: common.Client
    server_round: common.Round
    num_examples: Annotated[int, In("metrics", 1)]
    seconds: common.Seconds
    segment: common.State = None
    optimizer: common.Optimizer = None

    def legs(self, backward_rows: int, up_bytes: int) -> Iterable[Leg]:
        """Return the last backward pass."""
        yield Leg(backward_rows=backward_rows, up_bytes=up_bytes)


@dataclass(frozen=True)
class FinishRequest(Request):
    """Ends a client's round: the last backward pass, and what to send back.

    ``like`` stays on the server: the segment that the client was given, which what it hands over
    must fit.
    """

    kind = FINISH
    answer = FinishReply

    server_round: Annotated[int, In("finish", 1)]
    backward: common.Gradient = None
    upload_segment: Annotated[bool, In("finish")] = False
    upload_optimizer: Annotated[bool, In("finish")] = False
    like: dict[str, Tensor] | None = None

    def check(self, reply: FinishReply) -> None:
        """Check what is handed over."""
        if self.upload_optimizer and reply.optimizer is None:
            raise ProtocolError(
                "record 'optimizer' is missing, the optimizer's state was asked for"
            )
        if self.upload_segment:
            check_handed_over(reply.segment, self.like, "arrays", "client segment")
