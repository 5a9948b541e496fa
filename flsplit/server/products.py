"""Inner products and combinations of the clients' server gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flsplit.server.segment import Gradients
from flsplit.server.step import GradientProducts, StepResult

BLOCK = 1 << 15
"""So many elements of every client's gradient are in float64 at a time."""


class KeptProducts:
    """Of gradients that are all in memory.

    Parameters
    ----------
    gradients : sequence of Gradients
        One client after the other.
    """

    def __init__(self, gradients: Sequence[Gradients]) -> None:
        self.gradients = gradients

    def gram(self) -> Tensor:
        """Return the matrix of inner products, accumulated layer by layer, block by block."""
        size = len(self.gradients)
        total = torch.zeros(size, size, dtype=torch.float64)
        for layer in zip(*self.gradients, strict=True):
            total += layer_gram(layer)
        return total

    def combine(self, coefficients: Sequence[float], into: Gradients) -> Gradients:
        """Return Σ_i coefficients[i] · g_i, in the tensors of ``into`` where there are any."""
        return [
            _combine_layer(layer, coefficients, out)
            for layer, out in zip(zip(*self.gradients, strict=True), into, strict=True)
        ]


def products_of(result: StepResult) -> GradientProducts:
    """Return the products that a pass which provides GRADIENT_PRODUCTS left in its result."""
    if result.products is not None:
        return result.products
    return KeptProducts(list(result.client_server_gradients.values()))


def layer_gram(layer: Sequence[Tensor | None]) -> Tensor:
    """Return the inner products of one layer's gradients ``(S, S)``; None counts as zeros."""
    size = len(layer)
    total = torch.zeros(size, size, dtype=torch.float64)
    present = [index for index, gradient in enumerate(layer) if gradient is not None]
    if not present:
        return total
    flat = [g.reshape(-1) for g in layer if g is not None]
    columns, device = flat[0].numel(), flat[0].device
    found = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=device)
    exact = torch.empty(len(flat), min(BLOCK, columns), dtype=torch.float64, device=device)
    for start in range(0, columns, BLOCK):
        block = exact[:, : columns - start]
        for row, gradient in zip(block, flat, strict=True):
            row.copy_(gradient[start : start + BLOCK])
        found.addmm_(block, block.T)
    index = torch.tensor(present)
    total[index[:, None], index] = found.cpu()
    return total


def _combine_layer(
    layer: Sequence[Tensor | None], coefficients: Sequence[float], out: Tensor | None
) -> Tensor | None:
    terms = [(c, g) for c, g in zip(coefficients, layer, strict=True) if g is not None and c]
    if not terms:
        return None if out is None else out.zero_()
    (first, gradient), *rest = terms
    total = torch.mul(gradient, first, out=out)
    for coefficient, gradient in rest:
        total.add_(gradient, alpha=coefficient)
    return total
