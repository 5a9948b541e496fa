"""The messages of federated evaluation: test data through a client's segment to the server's."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from flwr.app import RecordDict

from flsplit.errors import ProtocolError
from flsplit.message import request as common
from flsplit.message.fields import In
from flsplit.message.request import Batch, Reply, Request, check_batch, refuse_labels
from flsplit.message.round_plan import MOST_BATCHES
from flsplit.message.types import EVALUATE
from flsplit.nested import num_rows


@dataclass(frozen=True)
class EvaluateReply(Reply):
    """Smashed data ``(b, ...)`` and labels of one test batch, and how many batches there are.

    A client without test data has 0 batches and sends empty tensors.
    """

    categories: ClassVar[dict[str, str]] = Reply.categories | {
        "smashed-data": "evaluation-up",
        "labels": "evaluation-up",
    }

    client: common.Client
    server_round: Annotated[int, In("reply", 0)]
    batch: Annotated[int, In("reply", 0)]
    num_batches: Annotated[int, In("metrics", 0, most=MOST_BATCHES)]
    smashed: common.SmashedField
    labels: common.Labels
    seconds: common.Seconds
    traces: common.Traces = None

    def to_content(self) -> RecordDict:
        """Return the content of a message; how many rows it has is for people to read."""
        content = super().to_content()
        content.metric_records["metrics"]["num-examples"] = num_rows(self.labels)
        return content

    def batches(self) -> list[Batch]:
        """Return the one batch, none of a client without test data."""
        return [(self.smashed, self.labels)] if self.num_batches else []


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """Asks a client for the smashed data of test batch ``batch``, in evaluation mode.

    How many there are (``num_batches``) stays on the server, where it is known, and whether labels
    may not come.
    """

    kind = EVALUATE
    answer = EvaluateReply
    echoed = ("server_round", "batch", "num_batches")

    server_round: Annotated[int, In("config", 0)]
    batch: Annotated[int, In("config", 0)]
    batch_size: Annotated[int, In("config", 1)]
    segment_version: Annotated[int, In("config", 0)]
    segment: common.Segment = None
    num_batches: int | None = None
    keeps_labels: bool = False
    inputs: Annotated[str, In("config")] = ""

    def check(self, reply: EvaluateReply) -> None:
        """Check the smashed data and labels, if there are any; only the last batch may be short."""
        if not reply.num_batches:
            return
        rows = num_rows(reply.labels)
        check_batch(reply.smashed, reply.labels, rows, self.batch_size)
        if self.keeps_labels:
            refuse_labels(reply.labels)
        if self.batch + 1 < reply.num_batches and rows < self.batch_size:
            raise ProtocolError(
                f"smashed-data: test batch {self.batch} of {reply.num_batches} has {rows} rows, "
                f"expected {self.batch_size} in all but the last"
            )
