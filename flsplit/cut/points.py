"""Lists the places where a model can be cut, and what each costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flsplit.cut.clean_cuts import clean, shared_inputs
from flsplit.cut.closures import check_functions
from flsplit.cut.cut_errors import CutError
from flsplit.cut.flops import BATCH, CountedSurvey
from flsplit.cut.survey import Call, Value
from flsplit.cut.trace import tensors_in
from flsplit.cut.whose_state import divided
from flsplit.nested import as_arguments


@dataclass(frozen=True)
class SmashedValue:
    """A tensor that crosses: its shape without the batch dimension, if it has one, and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int  # of one sample
    learns: bool  # whether a gradient comes back


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
    smashed : tuple of SmashedValue
        What crosses, that with a gradient first.
    """

    cut: str
    client_params: int
    server_params: int
    client_flops: int
    server_flops: int
    smashed: tuple[SmashedValue, ...]

    @property
    def smashed_shape(self) -> tuple[int, ...]:
        """Shape of one sample's smashed data, without the batch dimension; the first one's."""
        return self.smashed[0].shape

    @property
    def smashed_dtype(self) -> torch.dtype:
        """Type of the smashed data's elements; of the first one's."""
        return self.smashed[0].dtype

    @property
    def smashed_elements(self) -> int:
        """Number of elements of one sample's smashed data, of all that get a gradient."""
        return sum(one.nbytes // one.dtype.itemsize for one in self.smashed if one.learns)

    @property
    def smashed_bytes(self) -> int:
        """Bytes of all that crosses for one sample."""
        return sum(one.nbytes for one in self.smashed)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that come back for one sample."""
        return sum(one.nbytes for one in self.smashed if one.learns)


def cuts(
    model: nn.Module, example_input: Any, *, share: Iterable[str] = (), several: bool = False
) -> list[CutPoint]:
    """Return every place where a model can be cut so that one tensor crosses.

    Parameters
    ----------
    model : nn.Module
        The whole model. It is not changed, and not run either: the FLOPs are counted on a copy
        without data, in eval mode; or, if forward asks tensors for values, on a copy on the CPU.
    example_input : Tensor, sequence of int, tuple or dict
        A batch, batch dimension first, or the shape of one sample; for a model with several
        inputs a tuple or dict of them. Only shapes and dtypes are used; a shape stands for numbers
        of the type of the model's parameters.
    share : iterable of str
        Inputs that the server may see, as for `split`: a mask, say. What is made of them may cross
        beside the one tensor.
    several : bool
        Whether to list places, too, where several tensors cross.

    Returns
    -------
    list of CutPoint
        In order of execution, at every depth. Where several modules end at the same place, such
        as ``layer1`` and ``layer1.1``, the innermost is listed; `split` takes every name.
        Left out are places where the smashed data is not of floating point, so has no
        gradient, or doesn't keep the batch dimension first (of several, one has to).

    Raises
    ------
    CutError
        If the model can't be profiled with such an input.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise CutError(f"{type(model).__name__} has lazy parameters: run it on one batch first")
    check_functions(model)
    args, kwargs, rows = _batch(model, example_input)
    survey = CountedSurvey(model, args, kwargs)
    found = clean(survey, shared_inputs(model, share), several=several)
    points = [_cut_point(survey, rows, call, values) for call, values in found]
    return [point for point in points if point is not None]


def _batch(model: nn.Module, example_input: Any) -> tuple[Any, dict[str, Any], int]:
    several = isinstance(example_input, Mapping | tuple | list)
    if several and (tensors := tensors_in(as_arguments(example_input))):
        args, kwargs = as_arguments(example_input)
        return args, kwargs, len(tensors[0]) if tensors[0].dim() else 1
    sample = _sample(model, example_input)
    return (torch.empty((BATCH, *sample.shape), dtype=sample.dtype, device="meta"),), {}, BATCH


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


def _smashed(value: Value, rows: int) -> SmashedValue:
    assert value.spec is not None  # it is a tensor
    shape, dtype = value.spec.shape, value.spec.dtype
    of_rows = shape[:1] == (rows,)
    elements = torch.Size(shape).numel() // rows
    learns = value.learnt and (dtype.is_floating_point or dtype.is_complex)
    return SmashedValue(shape[of_rows:], dtype, elements * dtype.itemsize, learns and of_rows)


def _cut_point(
    survey: CountedSurvey, rows: int, call: Call, values: Sequence[Value]
) -> CutPoint | None:
    smashed = sorted((_smashed(one, rows) for one in values), key=lambda one: not one.learns)
    if not smashed[0].learns:
        return None
    # The parameters of the client: those used before the cut, unused ones where they lie.
    client, server = divided(survey, call)
    flops = survey.flops[call.name]
    return CutPoint(
        cut=call.name,
        client_params=_count(survey, client),
        server_params=_count(survey, server),
        client_flops=flops // rows,
        server_flops=(survey.total_flops - flops) // rows,
        smashed=tuple(smashed),
    )


def _count(survey: CountedSurvey, names: frozenset[str]) -> int:
    return sum(
        state.tensor.numel()
        for state in survey.state.values()
        if isinstance(state.tensor, nn.Parameter) and not names.isdisjoint(state.names)
    )
