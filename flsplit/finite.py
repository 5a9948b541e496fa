"""Whether tensors are finite, and how long gradients are: asked in every step.

Gradients may be sparse, as an Embedding's are that says so.
"""

import cmath
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite.

    One element that is not finite makes the sum NaN or infinite, and the sum takes a twentieth of
    the time; only where it overflows are the elements looked at one by one.
    """
    if tensor.dtype.itemsize == 1:
        tensor = countable(tensor)
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(dense_values(tensor)).all())


def can_be_squared(tensor: Tensor) -> bool:
    """Return whether all elements are finite, and their squares, which norms and variances need.

    One larger value makes weights of a step that no later step can be computed with.
    """
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = countable(tensor)
    least, most = torch.aminmax(tensor.abs() if tensor.is_complex() else tensor)
    # float16 is added up in float32.
    largest = math.sqrt(torch.finfo(torch.promote_types(least.dtype, torch.float32)).max)
    return -largest < least.item() and most.item() < largest  # false of NaN


def countable(tensor: Tensor) -> Tensor:
    """Return a tensor that torch computes with: of float8, which it only stores, float32."""
    eight = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return tensor.float() if eight else tensor


def dense_values(tensor: Tensor) -> Tensor:
    """Return a dense tensor of all elements that aren't 0: of a sparse one, those it holds."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def total_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """Return the norm of all gradients together."""
    return torch.nn.utils.get_total_norm(
        [dense_values(g) if g.is_sparse else g for g in gradients if g is not None]
    )


def clip_gradients(parameters: Sequence[Tensor], norm: float) -> None:
    """Scale the parameters' gradients down to a total ``norm``, if they are longer."""
    total = total_norm(parameter.grad for parameter in parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters, norm, total)
