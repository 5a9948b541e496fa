"""What several messages have in common: a segment, a gradient, an optimizer's state."""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from flsplit.message.arrays import from_record, to_array, to_record, to_tensor
from flsplit.message.fields import only_array, record, value
from flsplit.message.optimizer import OptimizerState, state_from_records, state_to_records


@dataclass(frozen=True)
class SegmentArrays:
    """A client segment sent by the server, and which one it is.

    ``version`` counts the aggregated segments; a client remembers the last it was given, and
    the server sends a segment only to clients that don't hold it yet.
    """

    version: int
    tensors: dict[str, Tensor]

    def put(self, content: RecordDict) -> None:
        """Write the segment into a message's content."""
        content["arrays"] = to_record(self.tensors)
        content["segment"] = ConfigRecord({"version": self.version})

    @classmethod
    def get(cls, content: RecordDict) -> "SegmentArrays | None":
        """Return the segment in a message's content, None if there is none."""
        if "arrays" not in content:
            return None
        version = value(record(content, "segment", ConfigRecord), "version", int, minimum=0)
        return cls(version, from_record(record(content, "arrays", ArrayRecord), field="arrays"))


@dataclass(frozen=True)
class Backward:
    """The cut-layer gradient of one step, on its way to a client.

    Attributes
    ----------
    step : int
        The step whose smashed data this is the gradient of.
    gradient : torch.Tensor or None
        Gradient of the client's own mean loss, of the smashed data's shape. None if the
        client is not to step.
    shared_rows : int
        How many of the leading rows other clients of this step receive, too. It stays on the
        server, where a broadcast row is counted once.
    repeated : bool
        Whether the shared rows are one and the same row.
    """

    step: int
    gradient: Tensor | None
    shared_rows: int = 0
    repeated: bool = False

    def put(self, content: RecordDict) -> None:
        """Write the gradient into a message's content."""
        content["backward"] = ConfigRecord({"step": self.step, "update": self.gradient is not None})
        if self.gradient is not None:
            content["cut-gradient"] = ArrayRecord({"0": to_array(self.gradient)})

    @classmethod
    def get(cls, content: RecordDict) -> "Backward | None":
        """Return the gradient in a message's content, None if there is none."""
        if "backward" not in content:
            return None
        fields = record(content, "backward", ConfigRecord)
        step, gradient = value(fields, "step", int, minimum=0), None
        if value(fields, "update", bool):
            gradient = to_tensor(only_array(content, "cut-gradient"), field="cut-gradient")
        return cls(step, gradient)


def put_optimizer(content: RecordDict, state: OptimizerState | None) -> None:
    """Write an optimizer's state, if there is one, into a message's content."""
    if state is not None:
        content["optimizer"], content["optimizer-numbers"] = state_to_records(state)


def get_optimizer(content: RecordDict) -> OptimizerState | None:
    """Return the optimizer's state in a message's content, None if there is none."""
    if "optimizer" not in content:
        return None
    return state_from_records(
        record(content, "optimizer", ArrayRecord),
        record(content, "optimizer-numbers", ConfigRecord),
    )


def reply_head(client: str, server_round: int, **more: int) -> RecordDict:
    """Return content that says whose reply it is and to what."""
    return RecordDict(
        {"reply": ConfigRecord({"client": client, "server-round": server_round, **more})}
    )
