"""What all requests and replies have in common, and what several of them carry."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import Tensor

from flsplit.account.clock import Leg
from flsplit.cut import Trace
from flsplit.cut.smashed import CutGradient, Smashed, gradients_in, learning_in
from flsplit.errors import NonFiniteError, ProtocolError
from flsplit.finite import all_finite, can_be_squared, countable
from flsplit.message.arrays import check_like, from_record, to_record
from flsplit.message.crossings import FROZEN, TRACES, Unresolved, one_gradient, one_smashed
from flsplit.message.fields import (
    Content,
    In,
    Records,
    Slot,
    Written,
    nested,
    read_fields,
    record,
    value,
)
from flsplit.message.nestings import nesting
from flsplit.message.optimizer_state import OptimizerState, indexed
from flsplit.message.round_plan import RoundPlan
from flsplit.nested import shapes_of, tensors_of

Batch = tuple[Smashed, Any]
"""Smashed data ``(b, ...)`` and labels ``(b, ...)``, a nesting of tensors."""


@dataclass(frozen=True)
class SegmentArrays:
    """A client segment sent by the server, and which one it is.

    ``version`` counts the aggregated segments; a client remembers the last it was given, and
    the server sends a segment only to clients that don't hold it yet. Those that hold an earlier
    one have the ``frozen`` tensors already, which never change: they travel once, and not back.
    ``buffers`` are those that a forward may give another shape.
    """

    version: int
    tensors: dict[str, Tensor]
    frozen: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()

    def changing(self) -> "SegmentArrays":
        """Return the same without what never changes."""
        if not self.frozen:
            return self
        tensors = {name: one for name, one in self.tensors.items() if name not in self.frozen}
        return SegmentArrays(self.version, tensors, buffers=self.buffers)

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a client handed over, with what never changes."""
        return {
            name: one if name in self.frozen else tensors[name]
            for name, one in self.tensors.items()
        }


@dataclass(frozen=True)
class Backward:
    """The cut-layer gradient of one step, on its way to a client.

    Attributes
    ----------
    step : int
        The step whose smashed data this is the gradient of.
    gradient : torch.Tensor, dict of str to torch.Tensor or None
        Gradient of the client's own mean loss, of the smashed data's shape; where several values
        cross, by their names. None if the client is not to step.
    shared_rows : int
        How many of the leading rows other clients of this step receive, too. It stays on the
        server, where a broadcast row is counted once.
    repeated : bool
        Whether the shared rows are one and the same row.
    """

    step: int
    gradient: CutGradient | None
    shared_rows: int = 0
    repeated: bool = False

    @property
    def shared_bytes(self) -> int:
        """Bytes of the shared rows."""
        if self.gradient is None or not self.shared_rows:
            return 0
        return sum(one[: self.shared_rows].nbytes for one in gradients_in(self.gradient))

    @property
    def broadcast_bytes(self) -> int:
        """What the shared rows take on a broadcast channel; a repeated row is sent once."""
        return self.shared_bytes // (self.shared_rows if self.repeated else 1)


class Reply(Content):
    """Base of what a client answers."""

    categories: ClassVar[dict[str, str]] = {
        "smashed-data": "activations-up",
        "labels": "labels-up",
        "arrays": "client-segments-up",
        "optimizer": "optimizer-up",
        "auxiliary": "auxiliary-up",
    }
    """Under which of the ledger's categories the bytes of a record are counted."""
    packed: ClassVar[str] = "smashed-data"
    """The record that client parts may compress."""
    ends_round = False
    """Whether it is a client's last one of a round's training."""

    client: str
    server_round: int
    seconds: float  # compute time since the message arrived
    num_steps: int | None
    num_examples: int | None
    steps_before: int | None
    traces: Mapping[str, Trace] | None
    smashed: Smashed | Unresolved | None

    def __getattr__(self, name: str) -> None:
        """Return None for these, where a reply has no such field."""
        if name not in ("num_steps", "num_examples", "steps_before", "traces", "smashed"):
            raise AttributeError(name)

    def resolved(self, traces: Mapping[str, Trace]) -> Self:
        """Return the reply with its crossings' traces, which came by their digests."""
        if isinstance(self.smashed, Unresolved):
            return replace(self, smashed=self.smashed.resolved(traces))  # type: ignore[type-var]
        return self

    def batches(self) -> list[Batch]:
        """Return the smashed data and labels that the server segment is to take."""
        return []

    def legs(self, backward_rows: int, up_bytes: int) -> Iterable[Leg]:
        """Return what the client did for this reply, for a clock."""
        return ()


class Request(Content):
    """Base of what a client is asked.

    A field that is no part of one kind of request is None in all its objects.
    """

    kind: ClassVar[str]
    """Flower's message type."""
    answer: ClassVar[type[Reply]]
    """How a client answers."""
    echoed: ClassVar[tuple[str, ...]] = ("server_round",)
    """Fields that the reply must repeat, where they aren't None."""
    categories: ClassVar[dict[str, str]] = {
        "arrays": "client-segments-down",
        "optimizer": "optimizer-down",
        "auxiliary": "auxiliary-down",
        "cut-gradient": "gradients-down-unicast",
    }
    """Under which of the ledger's categories the bytes of a record are counted."""
    packed: ClassVar[str] = "cut-gradient"
    """The record that client parts may compress."""

    server_round: int
    step: int | None
    plan: RoundPlan | None
    backward: Backward | None
    segment: SegmentArrays | None
    auxiliary: dict[str, Tensor] | None

    def __getattr__(self, name: str) -> None:
        """Return None for the above, where a kind of request has no such field.

        A default in the class would become that of the dataclasses' own fields.
        """
        if name not in Request.__annotations__:
            raise AttributeError(name)

    def check(self, reply: Any) -> None:
        """Check what a reply holds; whose it is has been checked, and its plain fields.

        ProtocolError if it isn't what was asked for, or its tensors can't be used.
        SegmentMismatchError if the client handed over another segment than it was given.
        NonFiniteError if smashed data or a segment handed over is NaN or infinite.
        """


def check_batch(smashed: Smashed, labels: Any, rows: int, most: int | None = None) -> None:
    """Check smashed data and labels of a step that may have up to ``most`` rows, if that is known.

    A client that sits a step out sends none. How many ``rows`` there are the labels tell: values
    that cross may have them in any dimension.
    """
    if isinstance(smashed, Tensor):
        if not (smashed.is_floating_point() or smashed.is_complex()):
            raise ProtocolError(f"smashed-data: dtype is {smashed.dtype}, expected floating point")
        if smashed.ndim == 0 or (len(smashed) == 0 and most != 0):
            raise ProtocolError(
                f"smashed-data: shape is {tuple(smashed.shape)}, expected one row or more"
            )
        if len(smashed) != rows:
            raise ProtocolError(
                f"labels: shape is {shapes_of(labels)}, expected {len(smashed)} rows as in the "
                f"smashed data {tuple(smashed.shape)}"
            )
    elif not rows:
        raise ProtocolError(f"labels: shape is {shapes_of(labels)}, expected one row or more")
    if most is not None and rows > most:
        raise ProtocolError(f"smashed-data: {rows} rows came, at most {most} were planned")
    # Among several values there may be scores that a mask has made as small as can be, and a mask
    # that crosses may be -inf on purpose; what the client computed may not.
    if isinstance(smashed, Tensor) and can_be_squared(smashed):
        return
    computed = [smashed] if isinstance(smashed, Tensor) else learning_in(smashed)
    for tensor in computed:
        if not all_finite(tensor):
            raise NonFiniteError("smashed-data: there are values that are NaN or infinite")
    if isinstance(smashed, Tensor):
        raise NonFiniteError("smashed-data: there are values whose squares overflow")


def refuse_labels(labels: Any) -> None:
    """Refuse labels that should have stayed at the client, and are none ``(b, 0)`` then."""
    if any(tensor.numel() for tensor in tensors_of(labels)):
        raise ProtocolError(
            f"labels: shape is {shapes_of(labels)}, but the client has the last layers, and keeps "
            "its labels"
        )


def check_segment(state: Mapping[str, Tensor] | None, given: SegmentArrays | None) -> None:
    """Check a client segment that was asked for against the one that the client was given."""
    rest = given.changing() if given else SegmentArrays(0, {})
    like = rest.tensors if given else None
    check_handed_over(state, like, "arrays", "client segment", free=rest.buffers)


def check_clipped(clipped: bool | None, planned: RoundPlan | None) -> None:
    """Check that a client says whether it clipped its segment, where its plan asks for that."""
    if planned and planned.norm_bit and clipped is None:
        raise ProtocolError("record 'clipping' is missing, the plan asks for the norm bit")


def check_handed_over(
    state: Mapping[str, Tensor] | None,
    like: Mapping[str, Tensor] | None,
    key: str,
    what: str,
    free: Collection[str] = (),
) -> None:
    """Check the state dict in the record ``key`` that was asked for against what was given."""
    if state is None:
        raise ProtocolError(f"record {key!r} is missing, the {what} was asked for")
    if like is None:
        return
    for name, tensor in check_like(state, like, what=what, free=free).items():
        # A buffer may be infinite on purpose (a mask): only what became so is wrong.
        old, new = countable(like[name]), countable(tensor)
        before = torch.isfinite(old) if new.shape == old.shape else True
        if bool((~torch.isfinite(new) & before).any()):
            raise NonFiniteError(f"{what}: {name!r} has values that are NaN or infinite")


# --- how fields travel -----------------------------------------------------------------------


def state_dict(key: str) -> Slot:
    """Return how a state dict travels."""

    def put(records: Written, tensors: dict[str, Tensor]) -> None:
        records[key] = to_record(tensors)

    return Slot(key, put, lambda records: from_record(record(records, key, ArrayRecord), field=key))


_GRADIENT, _ARRAYS = one_gradient("cut-gradient"), state_dict("arrays")


def _put_segment(records: Written, segment: SegmentArrays) -> None:
    _ARRAYS.put(records, segment.tensors)
    records["segment"] = ConfigRecord({"version": segment.version})


def _get_segment(records: Records) -> SegmentArrays:
    version = value(record(records, "segment", ConfigRecord), "version", int, minimum=0)
    return SegmentArrays(version, _ARRAYS.get(records))


class _BackwardFields(Content):
    step: Annotated[int, In("backward", 0)]
    update: Annotated[bool, In("backward")]


def _put_clipped(records: Written, clipped: bool) -> None:
    records["clipping"] = ConfigRecord({"clipped": clipped})


def _get_clipped(records: Records) -> bool:
    return value(record(records, "clipping", ConfigRecord), "clipped", bool)


def _put_backward(records: Written, backward: Backward) -> None:
    update = backward.gradient is not None
    records["backward"] = ConfigRecord, {"step": backward.step, "update": update}
    if update:
        _GRADIENT.put(records, backward.gradient)


def _get_backward(records: Records) -> Backward:
    fields = read_fields(records, _BackwardFields._groups)
    return Backward(fields["step"], _GRADIENT.get(records) if fields["update"] else None)


MOST_EXAMPLES = 10**12
"""Examples that a client can say it has."""
MOST_BYTES = 2**50
"""Bytes of memory that a client can say it holds."""

Client = Annotated[str, In("reply")]
Round = Annotated[int, In("reply", 1)]
Seconds = Annotated[float, In("metrics", 0.0, most=1e9)]
Examples = Annotated[int, In("metrics", 1, most=MOST_EXAMPLES)]
SmashedField = Annotated[Smashed, one_smashed("smashed-data")]
Labels = Annotated[Any, nesting("labels")]
Traces = Annotated[Mapping[str, Trace] | None, TRACES]
Frozen = Annotated[bool, FROZEN]
StepsBefore = Annotated[int, In("metrics", 0)]
Segment = Annotated[SegmentArrays | None, Slot("arrays", _put_segment, _get_segment)]
State = Annotated[dict[str, Tensor] | None, _ARRAYS]
Clipped = Annotated[bool | None, Slot("clipping", _put_clipped, _get_clipped)]
Gradient = Annotated[Backward | None, Slot("backward", _put_backward, _get_backward)]
Optimizer = Annotated[OptimizerState | None, indexed("optimizer")]
Plan = Annotated[RoundPlan | None, nested("config", RoundPlan)]
