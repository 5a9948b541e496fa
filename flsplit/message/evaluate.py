"""The messages of federated evaluation: test data through a client's segment to the server's."""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from flsplit.message.arrays import to_array, to_tensor
from flsplit.message.fields import only_array, record, value
from flsplit.message.parts import SegmentArrays


@dataclass(frozen=True)
class EvaluateRequest:
    """Asks a client for the smashed data of test batch ``batch``, in evaluation mode."""

    server_round: int
    batch: int
    batch_size: int
    segment_version: int
    segment: SegmentArrays | None = None

    def to_content(self) -> RecordDict:
        """Return the content of an ``evaluate.step`` message."""
        content = RecordDict()
        content["config"] = ConfigRecord(
            {
                "server-round": self.server_round,
                "batch": self.batch,
                "batch-size": self.batch_size,
                "segment-version": self.segment_version,
            }
        )
        if self.segment:
            self.segment.put(content)
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> "EvaluateRequest":
        """Return the request in a message; ProtocolError if it is malformed."""
        fields = record(content, "config", ConfigRecord)
        return cls(
            server_round=value(fields, "server-round", int, minimum=0),
            batch=value(fields, "batch", int, minimum=0),
            batch_size=value(fields, "batch-size", int, minimum=1),
            segment_version=value(fields, "segment-version", int, minimum=0),
            segment=SegmentArrays.get(content),
        )


@dataclass(frozen=True)
class EvaluateReply:
    """Smashed data ``(b, ...)`` and labels of one test batch, and how many batches there are.

    A client without test data has 0 batches and sends empty tensors.
    """

    client: str
    server_round: int
    batch: int
    num_batches: int
    smashed: Tensor
    labels: Tensor
    seconds: float

    def to_content(self) -> RecordDict:
        """Return the content of a reply to ``evaluate.step``."""
        head = {"client": self.client, "server-round": self.server_round, "batch": self.batch}
        return RecordDict(
            {
                "reply": ConfigRecord(head),  # type: ignore[arg-type]
                "smashed-data": ArrayRecord({"0": to_array(self.smashed)}),
                "labels": ArrayRecord({"0": to_array(self.labels)}),
                "metrics": MetricRecord(
                    {
                        "num-examples": len(self.labels),
                        "num-batches": self.num_batches,
                        "seconds": self.seconds,
                    }
                ),
            }
        )

    @classmethod
    def from_content(cls, content: RecordDict) -> "EvaluateReply":
        """Return the reply in a message; ProtocolError if it is malformed."""
        head = record(content, "reply", ConfigRecord)
        metrics = record(content, "metrics", MetricRecord)
        return cls(
            client=value(head, "client", str),
            server_round=value(head, "server-round", int, minimum=0),
            batch=value(head, "batch", int, minimum=0),
            num_batches=value(metrics, "num-batches", int, minimum=0),
            smashed=to_tensor(only_array(content, "smashed-data"), field="smashed-data"),
            labels=to_tensor(only_array(content, "labels"), field="labels"),
            seconds=value(metrics, "seconds", float, minimum=0.0),
        )
