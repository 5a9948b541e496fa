"""``query.shape``: asks a client what its inputs and its smashed data look like.

The server builds auxiliary models from the answer, and counts FLOPs.
"""

from dataclasses import dataclass

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from flsplit.message.arrays import dtype_name, dtype_of
from flsplit.message.fields import record, sizes, value
from flsplit.message.parts import reply_head


@dataclass(frozen=True)
class ShapeRequest:
    """Asks a client what its inputs and its smashed data look like."""

    server_round: int
    cut: str

    def to_content(self) -> RecordDict:
        """Return the content of a ``query.shape`` message."""
        config = ConfigRecord({"server-round": self.server_round, "cut": self.cut})
        return RecordDict({"config": config})

    @classmethod
    def from_content(cls, content: RecordDict) -> "ShapeRequest":
        """Return the request in a message; ProtocolError if it is malformed."""
        fields = record(content, "config", ConfigRecord)
        return cls(value(fields, "server-round", int, minimum=1), value(fields, "cut", str))


@dataclass(frozen=True)
class ShapeReply:
    """What one row of a client's data looks like.

    Attributes
    ----------
    client : str
        Whose reply it is.
    server_round : int
        The round asked for.
    shape : tuple of int
        Shape of a row of smashed data.
    input_shape, input_dtype : tuple of int, torch.dtype
        Shape and type of a row of the inputs; the shape may be empty.
    seconds : float
        Compute time.
    """

    client: str
    server_round: int
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    seconds: float

    def to_content(self) -> RecordDict:
        """Return the content of a reply to ``query.shape``."""
        content = reply_head(self.client, self.server_round)
        content["smashed-data"] = ConfigRecord({"shape": list(self.shape)})
        content["inputs"] = ConfigRecord(
            {"shape": list(self.input_shape), "dtype": dtype_name(self.input_dtype)}
        )
        content["metrics"] = MetricRecord({"seconds": self.seconds})
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> "ShapeReply":
        """Return the reply in a message; ProtocolError if it is malformed."""
        head = record(content, "reply", ConfigRecord)
        metrics = record(content, "metrics", MetricRecord)
        inputs = record(content, "inputs", ConfigRecord)
        return cls(
            client=value(head, "client", str),
            server_round=value(head, "server-round", int, minimum=1),
            shape=sizes(record(content, "smashed-data", ConfigRecord), "shape"),
            input_shape=sizes(inputs, "shape", least=0),
            input_dtype=dtype_of(value(inputs, "dtype", str), field="inputs"),
            seconds=value(metrics, "seconds", float, minimum=0.0),
        )
