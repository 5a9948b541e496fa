"""EPSL's aggregation of in-batch positions, as far as its two readings have it in common."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.errors import ConfigError, DataError
from flsplit.server.arguments import fraction
from flsplit.server.passes.base import SHARED_ROWS, ServerPass, client_loss, named
from flsplit.server.segment import Loss, ServerSegment
from flsplit.server.step import ClientBatch

_NOT_CLASSIFIERS = (
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.gaussian_nll_loss,
    functional.poisson_nll_loss,
    functional.kl_div,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.GaussianNLLLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
)


class AggregatingPass(ServerPass):
    r"""Base of the passes that aggregate the last layer's gradients position by position.

    With rows weighted by :math:`a_i = \lambda_i / b_i` (``weights[i]`` over the client's rows),
    position j of m = ⌈φ·b⌉ stands for the rows j of all clients that have one, b being the
    largest batch of the step: a client whose batch is smaller takes part up to its end. With
    equal batches this is the plain λ-weighted mean.

    Parameters
    ----------
    phi : float
        Fraction φ of the in-batch positions that are aggregated, 0 to 1. With 0 the pass is
        :class:`~flsplit.server.passes.Pooled`.

    Raises
    ------
    ConfigError
        If ``phi`` is out of range.
    """

    def __init__(self, phi: float) -> None:
        self.phi = fraction("phi", phi)
        self.across_clients = self.phi > 0
        self.provides = frozenset({SHARED_ROWS} if self.phi > 0 else ())

    def num_positions(self, batches: list[ClientBatch]) -> int:
        """Return m = ⌈φ·b⌉."""
        return ceil_fraction(self.phi, max(len(batch) for batch in batches))

    def check_loss(self, loss: Loss) -> None:
        """Refuse torch's losses that take no class indices: aggregation is of classes' logits."""
        while isinstance(loss, partial):
            loss = loss.func
        kinds = tuple(one for one in _NOT_CLASSIFIERS if isinstance(one, type))
        if self.phi > 0 and (loss in _NOT_CLASSIFIERS or isinstance(loss, kinds)):
            name = getattr(loss, "__name__", type(loss).__name__)
            raise ConfigError(
                f"{type(self).__name__} aggregates gradients of class logits, but the loss is "
                f"{name}; use a classifier's loss, or phi=0"
            )


def ceil_fraction(share: float, count: int) -> int:
    """Return ⌈share·count⌉, not misled by 0.1 · 30 being a little more than 3."""
    return math.ceil(share * count - 1e-9)


def logit_gradients(
    segment: ServerSegment, logits: Sequence[Tensor], batches: list[ClientBatch]
) -> tuple[dict[str, float], list[Tensor]]:
    """Return each client's mean loss, and its gradient by that client's logits ``(b, C)``.

    Raises
    ------
    DataError
        If these are not a classifier's logits and labels.
    """
    losses, gradients = {}, []
    for own, batch in zip(logits, batches, strict=True):
        if own.ndim != 2 or batch.labels.ndim != 1 or batch.labels.is_floating_point():
            raise DataError(
                f"{named([batch])}: EPSL aggregates a classifier's gradients, with logits (b, C) "
                f"and class indices (b,); these are logits {tuple(own.shape)} and labels "
                f"{tuple(batch.labels.shape)} of {batch.labels.dtype}"
            )
        leaf = own.detach().requires_grad_()
        loss = client_loss(segment, leaf, batch)
        losses[batch.client] = loss.item()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    return losses, gradients


def row_weights(batches: list[ClientBatch], weights: dict[str, float]) -> list[float]:
    """Return a_i: what one row of each client weighs in the server's loss."""
    return [weights[batch.client] / len(batch) for batch in batches]


def sum_heads(tensors: Sequence[Tensor], factors: Sequence[float], m: int) -> Tensor:
    """Return Σ_i factors[i] · tensors[i] over the first m rows; a row that is missing adds 0."""
    total = torch.zeros_like(tensors[0][:1]).expand(m, *tensors[0].shape[1:]).clone()
    for tensor, factor in zip(tensors, factors, strict=True):
        head = tensor[:m]
        total[: len(head)] += factor * head
    return total


def weights_at_positions(
    batches: list[ClientBatch], factors: Sequence[float], m: int, like: Tensor
) -> Tensor:
    """Return Σ_i factors[i] over the clients that have a row at each position, to divide by."""
    ones = [torch.ones(len(b), dtype=like.dtype, device=like.device) for b in batches]
    return sum_heads(ones, factors, m).view(m, *[1] * (like.ndim - 1))
