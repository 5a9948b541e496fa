"""The messages of a U-shaped split: the server segment's outputs down, their gradient up.

The client has the last layers, the labels and the loss. Labels, and what is computed from them but
that gradient, stay with it; of an evaluation, sums over all test data go up at its end.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from flwr.app import ArrayRecord
from torch import Tensor

from flsplit.account.clock import Leg
from flsplit.errors import NonFiniteError, ProtocolError
from flsplit.finite import all_finite
from flsplit.message import request as common
from flsplit.message.fields import In, Records, Slot, Written, record
from flsplit.message.request import Reply, Request
from flsplit.message.types import EVALUATE_TAIL, TAIL

OUTPUTS, OUTPUT_GRADIENT = "outputs", "output-gradient"


def _one_tensor(key: str) -> Slot:
    def put(records: Written, found: object) -> None:
        raise TypeError(f"{key} is {found!r}, expected a tensor")

    def get(records: Records) -> Tensor:
        record(records, key, ArrayRecord)
        raise ProtocolError(f"record {key!r} holds several arrays or none, expected one")

    return Slot(key, put, get, required=True, alone=True)


@dataclass(frozen=True)
class TailReply(Reply):
    """The gradient of a client's own mean loss by the server segment's outputs."""

    categories: ClassVar[dict[str, str]] = {OUTPUT_GRADIENT: "output-gradients-up"}
    packed = OUTPUT_GRADIENT

    client: common.Client
    server_round: common.Round
    step: Annotated[int, In("reply", 0)]
    gradient: Annotated[Tensor, _one_tensor(OUTPUT_GRADIENT)]  # of the outputs' shape
    seconds: common.Seconds

    def legs(self, backward_rows: int, up_bytes: int) -> Iterable[Leg]:
        """Return the passes through the last layers."""
        yield Leg(tail_rows=len(self.gradient), up_bytes=up_bytes, step=self.step)


@dataclass(frozen=True)
class TailRequest(Request):
    """Asks a client for the gradient of its loss by what the server segment gave for its rows."""

    kind = TAIL
    answer = TailReply
    echoed = ("server_round", "step")
    categories: ClassVar[dict[str, str]] = {OUTPUTS: "outputs-down"}
    packed = OUTPUTS

    server_round: Annotated[int, In("step", 1)]
    step: Annotated[int, In("step", 0)]
    outputs: Annotated[Tensor, _one_tensor(OUTPUTS)]

    def check(self, reply: TailReply) -> None:
        """Check the gradient."""
        found, expected = tuple(reply.gradient.shape), tuple(self.outputs.shape)
        if found != expected:
            raise ProtocolError(f"{OUTPUT_GRADIENT}: shape is {found}, expected {expected}")
        if reply.gradient.dtype != self.outputs.dtype:
            raise ProtocolError(
                f"{OUTPUT_GRADIENT}: dtype is {reply.gradient.dtype}, expected {self.outputs.dtype}"
            )
        if not all_finite(reply.gradient):
            raise NonFiniteError(f"{OUTPUT_GRADIENT}: there are values that are NaN or infinite")


@dataclass(frozen=True)
class EvaluateTailReply(Reply):
    """What a client's test data give, at the end of an evaluation; zeros before that."""

    client: common.Client
    server_round: Annotated[int, In("reply", 0)]
    batch: Annotated[int, In("reply", 0)]
    loss: Annotated[float, In("metrics")]  # sum of the loss, and of what counts in its mean
    weight: Annotated[float, In("metrics", 0.0)]
    correct: Annotated[int, In("metrics", 0)]  # right predictions, of how many, and test examples
    classified: Annotated[int, In("metrics", 0)]
    num_examples: Annotated[int, In("metrics", 0, most=common.MOST_EXAMPLES)]
    seconds: common.Seconds


@dataclass(frozen=True)
class EvaluateTailRequest(Request):
    """Hands a client what the server segment gave for test batch ``batch``.

    ``last`` asks for the sums over all batches. How many ``rows`` there were in them stays on the
    server.
    """

    kind = EVALUATE_TAIL
    answer = EvaluateTailReply
    echoed = ("server_round", "batch")
    categories: ClassVar[dict[str, str]] = {OUTPUTS: "evaluation-down"}

    server_round: Annotated[int, In("config", 0)]
    batch: Annotated[int, In("config", 0)]
    batch_size: Annotated[int, In("config", 1)]
    last: Annotated[bool, In("config")]
    outputs: Annotated[Tensor, _one_tensor(OUTPUTS)]
    rows: int = 0

    def check(self, reply: EvaluateTailReply) -> None:
        """Check that the sums are of the rows that there were."""
        if not self.last:
            return
        if reply.num_examples != self.rows:
            raise ProtocolError(
                f"reply: num-examples is {reply.num_examples}, expected {self.rows}, the rows that "
                "were evaluated"
            )
        if not reply.correct <= reply.classified:
            raise ProtocolError(
                f"reply: correct is {reply.correct}, of {reply.classified} classified"
            )
