"""What a model costs on either side of every place where it can be cut."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from flsplit.cut import CutError, cuts

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
    saved_bytes: int  # bytes that the client keeps from the forward to the backward pass
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
        """Bytes of one sample's smashed data; its gradient has as many."""
        return self.activation_elements * self.element_bytes

    @property
    def client_bytes(self) -> int:
        """Bytes of the client segment's parameters."""
        return self.client_params * self.element_bytes

    @property
    def is_end(self) -> bool:
        """Whether this is the model's end, which leaves the server nothing: no place to cut."""
        return self.server_params == 0

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
    input_shape: tuple[int, ...]  # shape of one sample
    input_dtype: torch.dtype
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

        Raises
        ------
        CutError
            If there is none.
        """
        named = [place for place in self.places if f"{place.cut}.".startswith(f"{cut}.")]
        if named:
            return named[-1]
        known = ", ".join(place.cut for place in self.places)
        raise CutError(f"{self.model} can't be cut after {cut!r}, only after {known}")

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

    def rows(self, every: bool) -> tuple[Place, ...]:
        """Return `summary`, or, if ``every``, each place on its own, and the model's end."""
        return (*self.places, self.end) if every else self.summary()


def profile_model(
    model: nn.Module, example_input: Tensor | Sequence[int], name: str | None = None
) -> ModelProfile:
    """Profile a model without running it on data.

    Parameters
    ----------
    model : nn.Module
        The whole model; it is not changed.
    example_input : Tensor or sequence of int
        A batch, or the shape of one sample, as `flsplit.cut.cuts` takes it.
    name : str, optional
        What to call the model. Default: its class.

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
    points = cuts(model, example_input)
    if not points:
        raise CutError(f"{name} can't be cut anywhere: no single tensor crosses any place")
    if isinstance(example_input, Tensor):
        sample = torch.empty_like(example_input[0], device="meta")
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
    return ModelProfile(name, tuple(sample.shape), sample.dtype, places, end)


@dataclass(frozen=True)
class _Kept:
    """What autograd keeps for the backward pass, per sample, and where the model ends."""

    bytes_at: dict[str, int]
    total_bytes: int
    last_module: str
    output_shape: tuple[int, ...]


def _kept_for_backward(model: nn.Module, sample: Tensor, names: Sequence[str]) -> _Kept:
    """Run a forward pass in training mode on the *meta* device, where nothing is computed."""
    ghost = copy.deepcopy(model).to("meta").train()
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
    batch = torch.empty((_BATCH, *sample.shape), dtype=sample.dtype, device="meta")
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    try:
        with torch.device("meta"), saving:
            output = ghost(batch)
    except Exception as error:
        raise CutError(
            f"{type(model).__name__} can't be profiled in training mode on the meta device: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _Kept(bytes_at, kept(), entered[-1], tuple(output.shape[1:]))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
