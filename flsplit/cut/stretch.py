"""Runs one stretch of a model's forward: up to the cut, or from it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flsplit.cut.cut_errors import CrossingError, UnknownCutError
from flsplit.cut.partial_forward import PartialForward
from flsplit.cut.stand_ins import Absent, Replaying, Script
from flsplit.cut.survey import Passage
from flsplit.cut.trace import Trace, tensors_in
from flsplit.cut.watch import Recording


@dataclass(frozen=True)
class Crossing:
    """What goes from the client segment to the server segment.

    Attributes
    ----------
    values : dict of str to Tensor
        The smashed data by name. Names are the same for all batches with the same trace.
    trace : Trace
        What the calls before the cut returned, without values.
    aliases : set of str
        Names of tensors that share memory with another one.
    raw : set of str
        Names of inputs that are shared, and of what is made of them alone. It stays at the client.
    kept : dict of str to Tensor
        What the last layers of a U-shaped split need of the first ones, by name. It stays, too.
    """

    values: dict[str, Tensor]
    trace: Trace
    aliases: frozenset[str] = field(default_factory=frozenset)
    raw: frozenset[str] = field(default_factory=frozenset)
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def learning(self) -> list[str]:
        """Names of the tensors that need a gradient."""
        return [name for name, value in self.values.items() if value.requires_grad]

    def detached(self) -> "Crossing":
        """Return what is sent: without graph, collecting gradients where they are needed."""
        values = {k: v.detach().requires_grad_(v.requires_grad) for k, v in self.values.items()}
        return Crossing(values, self.trace, self.aliases)

    def to(self, device: torch.device) -> "Crossing":
        """Return the same on a device; leaves that collect gradients are new ones there."""
        if all(value.device == device for value in self.values.values()):
            return self
        values = {
            name: value.detach().to(device).requires_grad_(value.requires_grad)
            for name, value in self.values.items()
        }
        return Crossing(values, self.trace, self.aliases)

    def backward(
        self, gradients: Mapping[str, Tensor | None], of_kept: Mapping[str, Tensor] | None = None
    ) -> None:
        """Go on with the gradients that the server found, by name, and those of what was kept.

        CrossingError if a gradient has another shape than its tensor, or no tensor of that name
        needs one.
        """
        found = {name: g for name, g in gradients.items() if g is not None}
        for name, gradient in found.items():
            value = self.values.get(name)
            if value is None or not value.requires_grad or value.shape != gradient.shape:
                expected = tuple(value.shape) if value is not None else "none"
                raise CrossingError(
                    f"a gradient of shape {tuple(gradient.shape)} came for value {name!r}, "
                    f"expected {expected}; those that need one are {self.learning}"
                )
        values = [self.values[name] for name in found]
        values += [self.kept[name] for name in of_kept or ()]
        torch.autograd.backward(values, [*found.values(), *(of_kept or {}).values()])


@dataclass(frozen=True)
class Returning(Crossing):
    """What goes from the server segment of a U-shaped split to the client's last layers.

    All that needs a gradient are leaves, which collect it.

    ``name`` says which of the values came from the server.
    """

    name: str = ""

    @property
    def given(self) -> Tensor:
        """What came from the server."""
        return self.values[self.name]

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients of what the client had kept, by name."""
        return {
            name: value.grad
            for name, value in self.values.items()
            if name != self.name and value.grad is not None
        }


def run_to_layer(model: nn.Module, cut: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run a model up to its cut layer and return that layer's output; nothing is watched."""
    run = PartialForward(cut)
    run.run(model, args, kwargs)
    return run.output if run.passed else _not_reached(cut)


def run_to_cut(
    model: nn.Module,
    cut: str,
    args: Any,
    kwargs: Mapping[str, Any],
    passages: Iterable[Passage],
) -> tuple[Trace, dict[str, Tensor]]:
    """Run a model up to the cut.

    Return the trace, and the values that cross on any of the ways that forward may take.
    """
    known = list(passages)
    keys = {key for passage in known for key in (*passage.values, *passage.kept)}
    recording = Recording(keys, known[0].whole, cut)
    record(recording, model, cut, args, kwargs)
    return recording.trace, recording.held


def record(
    recording: Recording, model: nn.Module, cut: str, args: Any, kwargs: Mapping[str, Any]
) -> None:
    """Run a model up to the cut under a recording."""
    recording.write("the inputs", (), (args, dict(kwargs)))
    with recording:
        recording.run(model, args, kwargs)
    if not recording.passed:
        _not_reached(cut)


def script_for(given: Crossing) -> Script:
    """Return what can be made ready for all batches with the same trace."""
    device = next((v.device for v in given.values.values()), torch.device("cpu"))
    return Script(given.trace.calls, frozenset(given.values), device)


def run_from_cut(
    model: nn.Module,
    cut: str,
    given: Crossing,
    extra: Mapping[str, Any] | None = None,
    script: Script | None = None,
) -> Any:
    """Run a model from the cut and return its output; of two cuts, from one to the other.

    ``extra`` are arguments of the model that the server has itself, such as ``labels``.
    """
    run = Replaying(script or script_for(given), given.trace.numbers, given.values, cut)
    output = run.go_on(model, extra or {})
    if not run.passed:
        _not_reached(cut)
    if given.aliases and (changed := [key for key in given.aliases if run.changed(key)]):
        raise CrossingError(
            f"value {changed[0]} is changed in place after the cut, and shares memory with another "
            "value that crosses"
        )
    if type(output) is Tensor:
        return output
    for tensor in tensors_in(output):
        if isinstance(tensor, Absent):
            raise CrossingError(f"the model returned value {tensor.key}, which did not cross")
    return output


def tensor_at(item: int, output: Any) -> Tensor:
    """Return one of the tensors that a layer returned."""
    return output if type(output) is Tensor else tensors_in(output)[item]


def for_tail(passage: Passage, given: Tensor, head: Tensor | Crossing) -> Returning:
    """Return what crosses the second cut.

    ``passage`` is the way that the forward up to the first cut took, ``head`` what it returned,
    ``given`` what the server segment did.
    """
    assert passage.tail is not None  # there are two cuts
    kept, numbers = (head.kept, head.trace.numbers) if isinstance(head, Crossing) else ({}, ())
    values = {}
    for name in passage.tail.values:
        value = kept.get(name, given).detach()
        learns = name not in kept or kept[name].requires_grad
        values[name] = value.requires_grad_(learns and torch.is_grad_enabled())
    (name,) = values.keys() - kept.keys()
    found = passage.tail.trace  # with numbers that depend on nothing but shapes
    trace = Trace(found.calls, (*numbers, *found.numbers[len(numbers) :]))
    return Returning(values, trace, aliases(values), name=name)


def _not_reached(cut: str) -> NoReturn:
    raise UnknownCutError(f"forward ended before the cut {cut!r}")


def aliases(values: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names of the tensors that share memory with another one."""
    at: dict[int, list[str]] = {}
    for key, tensor in values.items():
        if tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested:
            at.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)
    return frozenset(key for keys in at.values() if len(keys) > 1 for key in keys)
