"""Lists the places where a model can be cut, and what each costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flsplit.cut.cut_errors import CutError
from flsplit.cut.flops import BATCH, Profile, profile
from flsplit.cut.survey import Candidate, Survey


@dataclass(frozen=True)
class CutPoint:
    """A place to cut a model.

    Attributes
    ----------
    cut : str
        The cut layer's name, for `split`.
    client_params, server_params : int
        Numbers of parameters in the two segments.
    client_flops, server_flops : int
        FLOPs of one sample's forward pass in the two segments: two per multiply-accumulate of
        convolutions, matrix products and attention, nothing for the rest, as
        `torch.utils.flop_counter.FlopCounterMode` counts.
    smashed_shape : tuple of int
        Shape of one sample's smashed data, without the batch dimension.
    smashed_elements : int
        Number of elements of one sample's smashed data.
    smashed_dtype : torch.dtype
        Type of the smashed data's elements.
    """

    cut: str
    client_params: int
    server_params: int
    client_flops: int
    server_flops: int
    smashed_shape: tuple[int, ...]
    smashed_elements: int
    smashed_dtype: torch.dtype


def cuts(model: nn.Module, example_input: Tensor | Sequence[int]) -> list[CutPoint]:
    """Return every place where a model can be cut so that one tensor crosses.

    Parameters
    ----------
    model : nn.Module
        The whole model. It is not changed, and not run either: the FLOPs are counted on a copy
        without data, in eval mode.
    example_input : Tensor or sequence of int
        A batch, batch dimension first, or the shape of one sample. Only shape and dtype are
        used; a shape stands for numbers of the type of the model's parameters.

    Returns
    -------
    list of CutPoint
        In order of execution, at every depth. Where several modules end at the same place, such
        as ``layer1`` and ``layer1.1``, the innermost is listed; `split` takes every name.
        Left out are places where the smashed data is not of floating point, so has no
        gradient, or doesn't keep the batch dimension first.

    Raises
    ------
    CutError
        If the model can't be traced, or can't be profiled with such an input.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise CutError(f"{type(model).__name__} has lazy parameters: run it on one batch first")
    sample = _sample(model, example_input)
    candidates = Survey(model).candidates()
    names = [candidate.call.name for candidate in candidates]
    measured = profile(model, sample, names)
    points = [_cut_point(candidate, measured) for candidate in candidates]
    return [point for point in points if point is not None]


def _sample(model: nn.Module, example_input: Tensor | Sequence[int]) -> Tensor:
    if isinstance(example_input, Tensor):
        if example_input.dim() == 0 or len(example_input) == 0:
            raise CutError(
                f"example_input has shape {tuple(example_input.shape)}, expected a batch of at "
                "least one sample, batch dimension first"
            )
        return example_input[0]
    shape = tuple(example_input)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise CutError(f"example_input is {shape}, expected a batch or the shape of one sample")
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.empty(shape, dtype=next(floats, torch.get_default_dtype()), device="meta")


def _cut_point(candidate: Candidate, measured: Profile) -> CutPoint | None:
    name = candidate.call.name
    smashed = measured.outputs[name]
    if candidate.item is not None and isinstance(smashed, tuple | list):
        smashed = smashed[candidate.item]
    if not isinstance(smashed, Tensor) or not smashed.is_floating_point():
        return None
    if smashed.dim() == 0 or len(smashed) != BATCH:
        return None
    return CutPoint(
        cut=name,
        client_params=candidate.client_params,
        server_params=candidate.server_params,
        client_flops=measured.flops[name] // BATCH,
        server_flops=(measured.total_flops - measured.flops[name]) // BATCH,
        smashed_shape=tuple(smashed.shape[1:]),
        smashed_elements=smashed[0].numel(),
        smashed_dtype=smashed.dtype,
    )
