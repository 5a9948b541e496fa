"""The messages of local training: steps without the server, then what came of them.

``train.local`` asks a client for steps that it takes by itself, with the gradient that its
auxiliary model emulates, and for the smashed data of some of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from flsplit.errors import ProtocolError
from flsplit.message.arrays import from_record, to_array, to_record, to_tensor
from flsplit.message.fields import record, sizes, value
from flsplit.message.parts import SegmentArrays, reply_head
from flsplit.message.plan import RoundPlan

_MEMORY = ("segment", "activations", "auxiliary", "auxiliary-activations")


@dataclass(frozen=True, kw_only=True)
class AuxiliaryPlan:
    """Which auxiliary model a client works with in a round, and what it does with it.

    Attributes
    ----------
    kind : {'linear', 'first-stage', 'given'}
        How it is built.
    shape : tuple of int
        Shape of one row of the smashed data it takes.
    num_classes : int
        How many classes it tells apart.
    version : int
        Which of the server's versions the client must hold.
    train : bool
        Whether the client trains it on its own loss.
    lr : float
        The learning rate for that.
    """

    kind: str
    shape: tuple[int, ...]
    num_classes: int
    version: int
    train: bool
    lr: float

    def to_config(self) -> ConfigRecord:
        """Return the plan as the record ``auxiliary-config``."""
        return ConfigRecord(
            {
                "kind": self.kind,
                "shape": list(self.shape),
                "num-classes": self.num_classes,
                "version": self.version,
                "train": self.train,
                "lr": self.lr,
            }
        )

    @classmethod
    def from_config(cls, config: ConfigRecord) -> "AuxiliaryPlan":
        """Return the plan in a record; ProtocolError if it is malformed."""
        return cls(
            kind=value(config, "kind", str),
            shape=sizes(config, "shape"),
            num_classes=value(config, "num-classes", int, minimum=1),
            version=value(config, "version", int, minimum=0),
            train=value(config, "train", bool),
            lr=value(config, "lr", float, minimum=0.0),
        )


@dataclass(frozen=True, kw_only=True)
class LocalRequest:
    """Asks a client for local steps from ``step`` on.

    Attributes
    ----------
    server_round, step : int
        The round, and the first step to take.
    stop : int
        The first step not to take; 0 stands for the end of the client's round.
    upload_every : int
        Smashed data and labels of every step that this divides go up.
    upload_from : int
        Nothing of earlier steps goes up.
    peek : bool
        Take no step: send the smashed data of ``step`` only.
    upload_segment, upload_auxiliary : bool
        Whether to hand them over when the client's round ends.
    plan, auxiliary_plan : RoundPlan, AuxiliaryPlan
        Begin a round; they come with step 0 only.
    segment : SegmentArrays or None
        The client segment, for a client that doesn't hold it.
    auxiliary : dict of str to torch.Tensor or None
        The auxiliary model's state dict, likewise.
    auxiliary_held : bool
        Whether the client is believed to hold that auxiliary model. It stays on the server.
    like, auxiliary_like : dict of str to torch.Tensor or None
        What a segment and an auxiliary model that are handed over must fit. They stay on the
        server.
    num_steps : int or None
        How many steps the client has this round, as far as that is known. It stays on the server.
    """

    server_round: int
    step: int
    stop: int = 0
    upload_every: int = 1
    upload_from: int = 0
    peek: bool = False
    upload_segment: bool = False
    upload_auxiliary: bool = False
    plan: RoundPlan | None = None
    auxiliary_plan: AuxiliaryPlan | None = None
    segment: SegmentArrays | None = None
    auxiliary: dict[str, Tensor] | None = None
    auxiliary_held: bool = False
    like: dict[str, Tensor] | None = None
    auxiliary_like: dict[str, Tensor] | None = None
    num_steps: int | None = None

    def uploads(self, done: int) -> list[int]:
        """Return the steps whose smashed data goes up, if the client has done ``done`` steps."""
        if self.peek:
            return [self.step]
        first = max(self.step, self.upload_from)
        return [step for step in range(first, done) if step % self.upload_every == 0]

    def end(self, num_steps: int) -> int:
        """Return how many steps a client with ``num_steps`` has done afterwards."""
        if self.peek:
            return self.step
        return min(self.stop or num_steps, num_steps)

    def to_content(self) -> RecordDict:
        """Return the content of a ``train.local`` message."""
        content = RecordDict()
        content["local"] = ConfigRecord(
            {
                "server-round": self.server_round,
                "step": self.step,
                "stop": self.stop,
                "upload-every": self.upload_every,
                "upload-from": self.upload_from,
                "peek": self.peek,
                "upload-segment": self.upload_segment,
                "upload-auxiliary": self.upload_auxiliary,
            }
        )
        if self.plan:
            content["config"] = self.plan.to_config()
        if self.auxiliary_plan:
            content["auxiliary-config"] = self.auxiliary_plan.to_config()
        if self.segment:
            self.segment.put(content)
        if self.auxiliary is not None:
            content["auxiliary"] = to_record(self.auxiliary)
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> "LocalRequest":
        """Return the request in a ``train.local`` message; ProtocolError if it is malformed."""
        fields = record(content, "local", ConfigRecord)
        plan, auxiliary_plan = None, None
        if "config" in content:
            plan = RoundPlan.from_config(record(content, "config", ConfigRecord))
        if "auxiliary-config" in content:
            config = record(content, "auxiliary-config", ConfigRecord)
            auxiliary_plan = AuxiliaryPlan.from_config(config)
        return cls(
            server_round=value(fields, "server-round", int, minimum=1),
            step=value(fields, "step", int, minimum=0),
            stop=value(fields, "stop", int, minimum=0),
            upload_every=value(fields, "upload-every", int, minimum=1),
            upload_from=value(fields, "upload-from", int, minimum=0),
            peek=value(fields, "peek", bool),
            upload_segment=value(fields, "upload-segment", bool),
            upload_auxiliary=value(fields, "upload-auxiliary", bool),
            plan=plan,
            auxiliary_plan=auxiliary_plan,
            segment=SegmentArrays.get(content),
            auxiliary=_get_arrays(content, "auxiliary"),
        )


@dataclass(frozen=True, kw_only=True)
class LocalReply:
    """What came of a client's local steps.

    Attributes
    ----------
    client : str
        Whose reply it is.
    server_round, step : int
        Which request it answers.
    uploads : mapping of int to (torch.Tensor, torch.Tensor)
        Smashed data ``(b, ...)`` and labels ``(b, ...)`` by step.
    num_examples : int
        Size of the client's training data.
    num_steps, steps_done : int
        How many steps the client has this round, and how many it has done.
    rows : sequence of int
        How many rows each step that was asked for had, from ``step`` on.
    seconds : float
        Compute time.
    memory : mapping of str to int
        Measured bytes: ``segment`` and ``auxiliary`` (parameters, buffers, gradients, optimizer)
        and ``activations`` and ``auxiliary-activations`` (what a batch leaves for backward; 0
        where step 0 was not among the steps).
    segment, auxiliary : dict of str to torch.Tensor or None
        State dicts, where they were asked for and the client's round has ended.
    """

    client: str
    server_round: int
    step: int
    uploads: Mapping[int, tuple[Tensor, Tensor]]
    num_examples: int
    num_steps: int
    steps_done: int
    rows: Sequence[int]
    seconds: float
    memory: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(_MEMORY, 0))
    segment: dict[str, Tensor] | None = None
    auxiliary: dict[str, Tensor] | None = None

    def to_content(self) -> RecordDict:
        """Return the content of a reply to ``train.local``."""
        content = reply_head(self.client, self.server_round, step=self.step)
        uploads = self.uploads.items()
        content["smashed-data"] = ArrayRecord({str(n): to_array(s) for n, (s, _) in uploads})
        content["labels"] = ArrayRecord({str(n): to_array(y) for n, (_, y) in uploads})
        content["metrics"] = MetricRecord(
            {
                "num-examples": self.num_examples,
                "num-steps": self.num_steps,
                "steps-done": self.steps_done,
                "rows": list(self.rows),
                "seconds": self.seconds,
            }
        )
        content["memory"] = MetricRecord({name: self.memory[name] for name in _MEMORY})
        if self.segment is not None:
            content["arrays"] = to_record(self.segment)
        if self.auxiliary is not None:
            content["auxiliary"] = to_record(self.auxiliary)
        return content

    @classmethod
    def from_content(cls, content: RecordDict) -> "LocalReply":
        """Return the reply in a message; ProtocolError if it is malformed."""
        head = record(content, "reply", ConfigRecord)
        metrics = record(content, "metrics", MetricRecord)
        memory = record(content, "memory", MetricRecord)
        return cls(
            client=value(head, "client", str),
            server_round=value(head, "server-round", int, minimum=1),
            step=value(head, "step", int, minimum=0),
            uploads=_get_uploads(content),
            num_examples=value(metrics, "num-examples", int, minimum=1),
            num_steps=value(metrics, "num-steps", int, minimum=1),
            steps_done=value(metrics, "steps-done", int, minimum=0),
            rows=sizes(metrics, "rows"),
            seconds=value(metrics, "seconds", float, minimum=0.0),
            memory={name: value(memory, name, int, minimum=0) for name in _MEMORY},
            segment=_get_arrays(content, "arrays"),
            auxiliary=_get_arrays(content, "auxiliary"),
        )


def _get_arrays(content: RecordDict, key: str) -> dict[str, Tensor] | None:
    if key not in content:
        return None
    return from_record(record(content, key, ArrayRecord), field=key)


def _get_uploads(content: RecordDict) -> dict[int, tuple[Tensor, Tensor]]:
    smashed = record(content, "smashed-data", ArrayRecord)
    labels = record(content, "labels", ArrayRecord)
    if list(smashed) != list(labels):
        raise ProtocolError(
            f"smashed-data is of steps {list(smashed)}, labels of steps {list(labels)}"
        )
    uploads = {}
    for key in smashed:
        if not (key.isdecimal() and len(key) < 10 and str(int(key)) == key):
            raise ProtocolError(f"smashed-data: key is {key!r}, expected a step")
        uploads[int(key)] = (
            to_tensor(smashed[key], field=f"smashed-data[{key!r}]"),
            to_tensor(labels[key], field=f"labels[{key!r}]"),
        )
    return uploads
