"""Inner products and combinations of the clients' server gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flsplit.server.linear import Factors
from flsplit.server.segment import Gradients
from flsplit.server.step import GradientProducts, StepResult

BLOCK = 1 << 15
"""So many elements of every client's gradient are in float64 at a time."""

KeptGradient = Tensor | Factors | None
"""One client's gradient of one parameter."""


class KeptProducts:
    """Of gradients that are all in memory.

    Parameters
    ----------
    gradients : sequence of sequences of Tensor, Factors or None
        One client after the other, a gradient per parameter.
    """

    def __init__(self, gradients: Sequence[Sequence[KeptGradient]]) -> None:
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


def layer_gram(layer: Sequence[KeptGradient]) -> Tensor:
    """Return the inner products of one layer's gradients ``(S, S)``; None counts as zeros."""
    if factors := _all_factors(layer):
        return _factors_gram(factors)
    return _tensors_gram([_tensor(one) for one in layer])


def _all_factors(layer: Sequence[KeptGradient]) -> list[Factors]:
    """Return the layer's factors, if that is what all clients have."""
    factors = [one for one in layer if isinstance(one, Factors)]
    return factors if len(factors) == len(layer) else []


def _tensor(gradient: KeptGradient) -> Tensor | None:
    return gradient.tensor() if isinstance(gradient, Factors) else gradient


def _factors_gram(factors: list[Factors]) -> Tensor:
    r"""Return :math:`\langle D_i^T X_i, D_j^T X_j \rangle`.

    That is the sum over rows p of i and q of j of :math:`(D_p \cdot D_q)(X_p \cdot X_q)`.
    """
    outputs = _tensors_gram(list(torch.cat([one.outputs for one in factors])))
    inputs = _tensors_gram(list(torch.cat([one.inputs for one in factors])))
    owner = torch.tensor([i for i, one in enumerate(factors) for _ in one.inputs])
    sums = torch.zeros(len(factors), len(owner), dtype=torch.float64)
    sums.index_add_(0, owner, outputs * inputs)
    total = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    return total.index_add_(1, owner, sums)


def _tensors_gram(layer: Sequence[Tensor | None]) -> Tensor:
    """Return the inner products in float64, block by block."""
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
    layer: Sequence[KeptGradient], coefficients: Sequence[float], out: Tensor | None
) -> Tensor | None:
    if factors := _all_factors(layer):
        return _combine_factors(factors, coefficients)
    pairs = zip(coefficients, map(_tensor, layer), strict=True)
    terms = [(c, g) for c, g in pairs if g is not None and c]
    if not terms:
        return None if out is None else out.zero_()
    (first, gradient), *rest = terms
    total = torch.mul(gradient, first, out=out)
    for coefficient, gradient in rest:
        total.add_(gradient, alpha=coefficient)
    return total


def _combine_factors(factors: list[Factors], coefficients: Sequence[float]) -> Tensor | None:
    """Return Σ_i c_i · Dᵢᵀ Xᵢ by one matrix product over the rows of all clients that count."""
    terms = [(c, one) for c, one in zip(coefficients, factors, strict=True) if c]
    if not terms:
        return None
    outputs = torch.cat([c * one.outputs for c, one in terms])
    return Factors(outputs, torch.cat([one.inputs for _, one in terms])).tensor()
