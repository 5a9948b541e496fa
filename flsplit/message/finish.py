"""The messages at the end of a client's round."""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from flsplit.message.arrays import from_record, to_record
from flsplit.message.fields import record, value
from flsplit.message.optimizer import OptimizerState
from flsplit.message.parts import Backward, get_optimizer, put_optimizer, reply_head


@dataclass(frozen=True)
class FinishRequest:
    """Ends a client's round: the last backward pass, and what to send back.

    ``like`` stays on the server: the segment that the client was given, which what it hands over
    must fit.
    """

    server_round: int
    backward: Backward | None = None
    upload_segment: bool = False
    upload_optimizer: bool = False
    like: dict[str, Tensor] | None = None

    def to_content(self) -> RecordDict:
        """Return the content of a ``train.finish`` message."""
        content = RecordDict()
        content["finish"] = ConfigRecord(
            {
                "server-round": self.server_round,
                "upload-segment": self.upload_segment,
                "upload-optimizer": self.upload_optimizer,
            }
        )
        if self.backward:
            self.backward.put(content)
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> "FinishRequest":
        """Return the request in a ``train.finish`` message; ProtocolError if it is malformed."""
        fields = record(content, "finish", ConfigRecord)
        return cls(
            server_round=value(fields, "server-round", int, minimum=1),
            backward=Backward.get(content),
            upload_segment=value(fields, "upload-segment", bool),
            upload_optimizer=value(fields, "upload-optimizer", bool),
        )


@dataclass(frozen=True)
class FinishReply:
    """A client's end of a round, with its segment and optimizer state where they were asked for."""

    client: str
    server_round: int
    num_examples: int
    seconds: float
    segment: dict[str, Tensor] | None = None
    optimizer: OptimizerState | None = None

    def to_content(self) -> RecordDict:
        """Return the content of a reply to ``train.finish``."""
        content = reply_head(self.client, self.server_round)
        content["metrics"] = MetricRecord(
            {"num-examples": self.num_examples, "seconds": self.seconds}
        )
        if self.segment is not None:
            content["arrays"] = to_record(self.segment)
        put_optimizer(content, self.optimizer)
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> "FinishReply":
        """Return the reply in a message; ProtocolError if it is malformed."""
        head = record(content, "reply", ConfigRecord)
        metrics = record(content, "metrics", MetricRecord)
        segment = None
        if "arrays" in content:
            segment = from_record(record(content, "arrays", ArrayRecord), field="arrays")
        return cls(
            client=value(head, "client", str),
            server_round=value(head, "server-round", int, minimum=1),
            num_examples=value(metrics, "num-examples", int, minimum=1),
            seconds=value(metrics, "seconds", float, minimum=0.0),
            segment=segment,
            optimizer=get_optimizer(content),
        )
