"""What a model costs on either side of every place where it can be cut."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut import CutError, cuts
from flsplit.cut.examples import needs_values, with_values
from flsplit.cut.partial_forward import places_of
from flsplit.nested import as_arguments, map_tensors, tensors_of
from flsplit.seeds import seeded
from flsplit.untrained import copied

BACKWARD_PER_FORWARD = 2
"""FLOPs of a backward pass by those of the forward pass: one product for the inputs' gradient and
one for the weights'. PyTorch's own counter overcounts the backward pass of grouped convolutions."""

_BATCH = 2  # BatchNorm in training mode wants more than one sample


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place to cut a model and what it means for both sides. FLOPs and data are per sample."""

    cut: str
    client_params: int  # numbers of parameters on the two sides
    server_params: int
    # FLOPs of a forward pass, two per multiply-accumulate of convolutions and matrix products
    client_flops_forward: int
    server_flops_forward: int
    activation_shape: tuple[int, ...]
    activation_elements: int  # elements of one sample's smashed data, and of its gradient
    element_bytes: int
    shared_bytes: int = 0  # bytes of what else crosses for one sample and gets no gradient
    saved_bytes: int  # bytes that the client keeps from the forward to the backward pass
    # of a U-shaped split: the last layers' FLOPs, at the client, and elements of what comes back
    tail_flops_forward: int = 0
    output_elements: int = 0
    # the last of the layers that a row of the summary stands for; ``cut`` where it is one
    through: str

    @property
    def client_flops_backward(self) -> int:
        """FLOPs of the client's backward pass, by `BACKWARD_PER_FORWARD`."""
        return BACKWARD_PER_FORWARD * self.client_flops_forward

    @property
    def server_flops_backward(self) -> int:
        """FLOPs of the server's backward pass, by `BACKWARD_PER_FORWARD`."""
        return BACKWARD_PER_FORWARD * self.server_flops_forward

    @property
    def activation_bytes(self) -> int:
        """Bytes of all that crosses for one sample."""
        return self.gradient_bytes + self.shared_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradient that comes back for one sample."""
        return self.activation_elements * self.element_bytes

    @property
    def output_bytes(self) -> int:
        """Bytes of what the server returns of a sample in a U-shaped split, and of its gradient."""
        return self.output_elements * self.element_bytes

    @property
    def tail_flops(self) -> int:
        """FLOPs of a forward and a backward pass through the last layers of a U-shaped split."""
        return (1 + BACKWARD_PER_FORWARD) * self.tail_flops_forward

    @property
    def client_bytes(self) -> int:
        """Bytes of the client segment's parameters."""
        return self.client_params * self.element_bytes

    def client_memory_bytes(self, batch_size: int, optimizer_slots: int = 0) -> int:
        """Return the bytes that a client needs for training.

        ``(2 + optimizer_slots) * client_bytes + batch_size * saved_bytes``: parameters, their
        gradients, the optimizer's state (0 for SGD, 1 with momentum, 2 for Adam), and what is kept
        for the backward pass.
        """
        return (2 + optimizer_slots) * self.client_bytes + batch_size * self.saved_bytes


@dataclass(frozen=True)
class ModelProfile:
    """All places of a model, in order of execution."""

    model: str
    sample: Any  # a nesting of tensors without data and without a batch dimension
    places: tuple[Place, ...]  # where it can be cut
    end: Place  # the whole model

    @property
    def num_classes(self) -> int:
        """Elements of one sample's output, which are a classifier's classes."""
        return self.end.activation_elements

    @property
    def last_layer_flops_backward(self) -> int:
        """FLOPs (per sample) of the backward pass behind the last place to cut."""
        return self.places[-1].server_flops_backward

    def place(self, cut: str) -> Place:
        """Return the place that is called ``cut``, or where a module of that name ends.

        CutError if there is none.
        """
        first, second = places_of(cut)
        named = [
            place
            for place, (own, last) in ((one, places_of(one.cut)) for one in self.places)
            if f"{own}.".startswith(f"{first}.") and last == second
        ]
        if named:
            return named[-1]
        known = ", ".join(place.cut for place in self.places)
        raise CutError(f"{self.model} can't be cut after {cut!r}, only after {known}")

    def cut_twice(self, second: str) -> "ModelProfile":
        """Return the profile with the places of U-shaped splits whose second cut is this one.

        CutError if the model can't be cut there, or nowhere before.
        """
        last = self.place(second)
        before = [one for one in self.places if one.client_params < last.client_params]
        if not before:
            raise CutError(f"no place of {self.model} lies before the second cut {second!r}")
        return replace(self, places=tuple(self._between(first, last, second) for first in before))

    def _between(self, first: Place, last: Place, second: str) -> Place:
        return replace(
            first,
            cut=f"{first.cut},{second}",
            client_params=first.client_params + last.server_params,
            server_params=last.client_params - first.client_params,
            server_flops_forward=last.client_flops_forward - first.client_flops_forward,
            saved_bytes=first.saved_bytes + self.end.saved_bytes - last.saved_bytes,
            tail_flops_forward=last.server_flops_forward,
            output_elements=last.activation_elements,
            through=f"{first.cut},{second}",
        )

    def summary(self) -> tuple[Place, ...]:
        """Return the places that differ in what matters, and the model's end.

        A layer and what follows it without another FLOP or another size of the smashed data
        (normalisation, activation) are one row: it has the name of the first and the numbers of
        the last. What only prepares the last layer's input (pooling) has none of its own.
        """
        runs = groupby(self.places, lambda one: (one.client_flops_forward, one.activation_elements))
        rows = []
        for first, *more in (run for _, run in runs):
            last = more[-1] if more else first
            rows.append(replace(last, cut=first.cut, through=last.cut))
        servers = [(row.server_params, row.server_flops_forward) for row in rows]
        return (*rows[: servers.index(servers[-1]) + 1], self.end)

    def batch(self, size: int) -> Any:
        """Return a batch of ``size`` made-up samples."""
        return map_tensors(lambda one: with_values(one.expand(size, *one.shape)), self.sample)

    def rows(self, every: bool) -> tuple[Place, ...]:
        """Return `summary`, or, if ``every``, each place on its own, and the model's end."""
        return (*self.places, self.end) if every else self.summary()


def profile_model(
    model: nn.Module,
    example_input: Any,
    name: str | None = None,
    *,
    share: Iterable[str] = (),
    several: bool = False,
) -> ModelProfile:
    """Profile a model without running it on data.

    Parameters
    ----------
    model : nn.Module
        The whole model; it is not changed.
    example_input : Tensor, sequence of int, tuple or dict
        A batch, or the shape of one sample, as `flsplit.cut.cuts` takes it.
    name : str, optional
        What to call the model. Default: its class.
    share : iterable of str
        Inputs that the server may see, as in `flsplit.cut.cuts`.
    several : bool
        Whether to look at places, too, where several tensors cross.

    Returns
    -------
    ModelProfile
        Its places.

    Raises
    ------
    CutError
        If the model can't be traced, can't be profiled, or can't be cut anywhere.
    """
    name = name or type(model).__name__
    points = cuts(model, example_input, share=share, several=several)
    if not points:
        raise CutError(
            f"{name} can't be cut anywhere: no single tensor crosses any place. Several may with "
            "several=True, inputs with share=(…); weights that both ends use have to be untied or "
            "frozen"
        )
    if tensors_of(example_input):
        sample = map_tensors(lambda one: torch.empty_like(one[0], device="meta"), example_input)
    else:
        shape, dtype = tuple(example_input), points[0].smashed_dtype
        sample = torch.empty(shape, dtype=dtype, device="meta")
    kept = _kept_for_backward(model, sample, [point.cut for point in points])
    places = tuple(
        Place(
            cut=point.cut,
            client_params=point.client_params,
            server_params=point.server_params,
            client_flops_forward=point.client_flops,
            server_flops_forward=point.server_flops,
            activation_shape=point.smashed_shape,
            activation_elements=point.smashed_elements,
            element_bytes=point.smashed_dtype.itemsize,
            shared_bytes=point.smashed_bytes - point.gradient_bytes,
            saved_bytes=kept.bytes_at[point.cut],
            through=point.cut,
        )
        for point in points
    )
    last = places[-1]
    end = Place(
        cut=kept.last_module,
        client_params=last.client_params + last.server_params,
        server_params=0,
        client_flops_forward=last.client_flops_forward + last.server_flops_forward,
        server_flops_forward=0,
        activation_shape=kept.output_shape,
        activation_elements=torch.Size(kept.output_shape).numel(),
        element_bytes=last.element_bytes,
        saved_bytes=kept.total_bytes,
        through=kept.last_module,
    )
    return ModelProfile(name, sample, places, end)


@dataclass(frozen=True)
class _Kept:
    """What autograd keeps for the backward pass, per sample, and where the model ends."""

    bytes_at: dict[str, int]
    total_bytes: int
    last_module: str
    output_shape: tuple[int, ...]


def _kept_for_backward(model: nn.Module, sample: Any, names: Sequence[str]) -> _Kept:
    """Run a forward pass in training mode on the *meta* device, where nothing is computed.

    A model that asks tensors for values runs on the CPU.
    """
    batch = map_tensors(lambda one: one.new_empty(_BATCH, *one.shape), sample)
    try:
        try:
            return _kept_on("meta", model, batch, names)
        except Exception as error:
            if not needs_values(error):
                raise
            return _kept_on("cpu", model, map_tensors(with_values, batch), names)
    except Exception as error:
        raise CutError(
            f"{type(model).__name__} can't be profiled in training mode on a made-up batch: "
            f"{type(error).__name__}: {error}"
        ) from error


def _kept_on(device: str, model: nn.Module, batch: Any, names: Sequence[str]) -> _Kept:
    ghost = copied(model).to(device).train()
    # Each storage counts once, parameters not at all. A storage's identity holds while it lives.
    known: dict[int, Tensor] = {_storage(one): one for one in ghost.parameters()}
    own = len(known)
    entered, bytes_at = [""], dict[str, int]()

    def keep(tensor: Tensor) -> Tensor:
        known.setdefault(_storage(tensor), tensor)
        return tensor

    def kept() -> int:
        saved = list(known.values())[own:]
        return sum(tensor.untyped_storage().nbytes() for tensor in saved) // _BATCH

    for name, module in ghost.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: entered.append(name))
    for name in names:
        module = ghost.get_submodule(name)
        module.register_forward_hook(
            lambda module, args, output, name=name: bytes_at.update({name: kept()})
        )
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    args, kwargs = as_arguments(batch)
    with torch.device(device), seeded(0), saving:
        output = tensors_of(ghost(*args, **kwargs))[0]
    return _Kept(bytes_at, kept(), entered[-1], tuple(output.shape[1:]))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
