"""What a model costs on either side of every place where it can be cut."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from flsplit.cut import CutError, CutPoint, cuts

BACKWARD_PER_FORWARD = 2
"""FLOPs of a backward pass by those of the forward pass: one product for the inputs' gradient and
one for the weights'. PyTorch's own counter overcounts the backward pass of grouped convolutions."""

_BATCH = 2  # BatchNorm in training mode wants more than one sample


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place to cut a model and what it means for both sides. FLOPs and data are per sample.

    Attributes
    ----------
    cut : str
        The cut layer's name.
    client_params, server_params : int
        Numbers of parameters on the two sides.
    client_flops_forward, server_flops_forward : int
        FLOPs of a forward pass, two per multiply-accumulate of convolutions and matrix products.
    activation_shape : tuple of int
        Shape of one sample's smashed data.
    activation_elements : int
        Elements of one sample's smashed data, and of its gradient.
    element_bytes : int
        Bytes per element.
    saved_bytes : int
        Bytes that the client keeps from the forward to the backward pass.
    through : str
        The last of the layers that a row of the summary stands for; ``cut`` where it is one.
    """

    cut: str
    client_params: int
    server_params: int
    client_flops_forward: int
    server_flops_forward: int
    activation_shape: tuple[int, ...]
    activation_elements: int
    element_bytes: int
    saved_bytes: int
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
        gradients, the optimizer's state, and what is kept for the backward pass.

        Parameters
        ----------
        batch_size : int
            Samples per batch.
        optimizer_slots : int
            Numbers that the optimizer keeps per parameter: 0 for SGD, 1 with momentum, 2 for Adam.
        """
        return (2 + optimizer_slots) * self.client_bytes + batch_size * self.saved_bytes


@dataclass(frozen=True)
class ModelProfile:
    """All places of a model, in order of execution.

    Attributes
    ----------
    model : str
        What the model is called.
    input_shape : tuple of int
        Shape of one sample.
    input_dtype : torch.dtype
        Its dtype.
    places : tuple of Place
        Where it can be cut.
    end : Place
        The whole model.
    """

    model: str
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    places: tuple[Place, ...]
    end: Place

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
        rows = [_merged(list(run)) for _, run in groupby(self.places, key=_what_matters)]
        head = next(i for i, row in enumerate(rows) if _same_server(row, rows[-1]))
        return (*rows[: head + 1], self.end)

    def rows(self, every: bool) -> tuple[Place, ...]:
        """Return `summary`, or, if ``every``, each place on its own, and the model's end."""
        return (*self.places, self.end) if every else self.summary()


def _what_matters(place: Place) -> tuple[int, int]:
    return place.client_flops_forward, place.activation_elements


def _same_server(place: Place, other: Place) -> bool:
    mine = (place.server_params, place.server_flops_forward)
    return mine == (other.server_params, other.server_flops_forward)


def _merged(run: list[Place]) -> Place:
    return replace(run[-1], cut=run[0].cut, through=run[-1].cut)


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
    sample = _sample(example_input, points[0].smashed_dtype)
    kept = _kept_for_backward(model, sample, [point.cut for point in points])
    places = tuple(_place(point, kept.bytes_at[point.cut]) for point in points)
    last = points[-1]
    end = Place(
        cut=kept.last_module,
        client_params=last.client_params + last.server_params,
        server_params=0,
        client_flops_forward=last.client_flops + last.server_flops,
        server_flops_forward=0,
        activation_shape=kept.output_shape,
        activation_elements=torch.Size(kept.output_shape).numel(),
        element_bytes=last.smashed_dtype.itemsize,
        saved_bytes=kept.total_bytes,
        through=kept.last_module,
    )
    return ModelProfile(name, tuple(sample.shape), sample.dtype, places, end)


def _sample(example_input: Tensor | Sequence[int], dtype: torch.dtype) -> Tensor:
    if isinstance(example_input, Tensor):
        return torch.empty_like(example_input[0], device="meta")
    return torch.empty(tuple(example_input), dtype=dtype, device="meta")


def _place(point: CutPoint, saved_bytes: int) -> Place:
    return Place(
        cut=point.cut,
        client_params=point.client_params,
        server_params=point.server_params,
        client_flops_forward=point.client_flops,
        server_flops_forward=point.server_flops,
        activation_shape=point.smashed_shape,
        activation_elements=point.smashed_elements,
        element_bytes=point.smashed_dtype.itemsize,
        saved_bytes=saved_bytes,
        through=point.cut,
    )


# ------------------------------------------------------------------------------------------------
# What autograd keeps


@dataclass(frozen=True)
class _Kept:
    bytes_at: dict[str, int]
    total_bytes: int
    last_module: str
    output_shape: tuple[int, ...]


class _Keeper:
    """Adds up the tensors that autograd saves, each storage once, parameters not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.nbytes = 0
        self._known = {_storage(parameter) for parameter in model.parameters()}
        self._alive: list[Tensor] = []  # a storage's identity holds while it lives

    def __call__(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._known:
            self._known.add(_storage(tensor))
            self._alive.append(tensor)
            self.nbytes += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kept_for_backward(model: nn.Module, sample: Tensor, names: Sequence[str]) -> _Kept:
    """Run a forward pass in training mode on the *meta* device, where nothing is computed."""
    ghost = copy.deepcopy(model).to("meta").train()
    keeper, entered, bytes_at = _Keeper(ghost), [""], dict[str, int]()

    def enter(name: str) -> None:
        entered.append(name)

    def leave(name: str) -> None:
        bytes_at[name] = keeper.nbytes // _BATCH

    for name, module in ghost.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: enter(name))
    for name in names:
        module = ghost.get_submodule(name)
        module.register_forward_hook(lambda module, args, output, name=name: leave(name))
    batch = torch.empty((_BATCH, *sample.shape), dtype=sample.dtype, device="meta")
    saving = torch.autograd.graph.saved_tensors_hooks(keeper, lambda tensor: tensor)
    try:
        with torch.device("meta"), saving:
            output = ghost(batch)
    except Exception as error:
        raise CutError(
            f"{type(model).__name__} can't be profiled in training mode on the meta device: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _Kept(bytes_at, keeper.nbytes // _BATCH, entered[-1], tuple(output.shape[1:]))
