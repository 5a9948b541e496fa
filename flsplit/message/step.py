"""The messages of a training step: what the server asks and what a client answers.

One message per client and step carries the cut-layer gradient of the step before and asks
for the smashed data of the next, so T mini-batches cost T+1 exchanges. ``docs/protocol.md``
writes the same down for people.
"""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from flsplit.message.arrays import to_array, to_tensor
from flsplit.message.fields import only_array, record, value
from flsplit.message.optimizer import OptimizerState
from flsplit.message.parts import Backward, SegmentArrays, get_optimizer, put_optimizer, reply_head
from flsplit.message.plan import RoundPlan


@dataclass(frozen=True)
class StepRequest:
    """Asks a client for the smashed data of ``step``, after the backward pass of the last one.

    ``plan`` (and, where needed, ``segment`` and ``optimizer``) begin a round and come with
    step 0 only. ``num_steps`` stays on the server: how many steps the client has this round, as
    far as that is known.
    """

    server_round: int
    step: int
    backward: Backward | None = None
    plan: RoundPlan | None = None
    segment: SegmentArrays | None = None
    optimizer: OptimizerState | None = None
    num_steps: int | None = None

    def to_content(self) -> RecordDict:
        """Return the content of a ``train.step`` message."""
        content = RecordDict()
        content["step"] = ConfigRecord({"server-round": self.server_round, "step": self.step})
        if self.plan:
            content["config"] = self.plan.to_config()
        if self.segment:
            self.segment.put(content)
        put_optimizer(content, self.optimizer)
        if self.backward:
            self.backward.put(content)
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> "StepRequest":
        """Return the request in a ``train.step`` message; ProtocolError if it is malformed."""
        fields = record(content, "step", ConfigRecord)
        return cls(
            server_round=value(fields, "server-round", int, minimum=1),
            step=value(fields, "step", int, minimum=0),
            backward=Backward.get(content),
            plan=_get_plan(content),
            segment=SegmentArrays.get(content),
            optimizer=get_optimizer(content),
        )


@dataclass(frozen=True)
class StepReply:
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

    client: str
    server_round: int
    step: int
    smashed: Tensor
    labels: Tensor
    num_examples: int
    num_steps: int
    seconds: float

    def to_content(self) -> RecordDict:
        """Return the content of a reply to ``train.step``."""
        content = reply_head(self.client, self.server_round, step=self.step)
        content["smashed-data"] = ArrayRecord({"0": to_array(self.smashed)})
        content["labels"] = ArrayRecord({"0": to_array(self.labels)})
        content["metrics"] = MetricRecord(
            {
                "num-examples": self.num_examples,
                "num-steps": self.num_steps,
                "seconds": self.seconds,
            }
        )
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> "StepReply":
        """Return the reply in a message; ProtocolError if it is malformed."""
        head = record(content, "reply", ConfigRecord)
        metrics = record(content, "metrics", MetricRecord)
        return cls(
            client=value(head, "client", str),
            server_round=value(head, "server-round", int, minimum=1),
            step=value(head, "step", int, minimum=0),
            smashed=to_tensor(only_array(content, "smashed-data"), field="smashed-data"),
            labels=to_tensor(only_array(content, "labels"), field="labels"),
            num_examples=value(metrics, "num-examples", int, minimum=1),
            num_steps=value(metrics, "num-steps", int, minimum=1),
            seconds=value(metrics, "seconds", float, minimum=0.0),
        )


def _get_plan(content: RecordDict) -> RoundPlan | None:
    if "config" not in content:
        return None
    return RoundPlan.from_config(record(content, "config", ConfigRecord))
