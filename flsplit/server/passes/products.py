"""Per-client server gradients that are compared and combined without all being in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flsplit.errors import ConfigError, located
from flsplit.server.passes.base import (
    GRADIENT_PRODUCTS,
    ServerPass,
    client_loss,
    named,
    own_gradient,
    weighted_sum,
)
from flsplit.server.products import layer_gram
from flsplit.server.segment import Gradients, ServerSegment
from flsplit.server.step import ClientBatch, StepResult


class PerClientProducts(ServerPass):
    """What :class:`~flsplit.server.passes.PerClient` computes, in less memory and more time.

    The clients' graphs stay alive (the activations that ``Pooled`` keeps, too). Their gradients
    are computed for one group of layers at a time, compared, and thrown away, so that S/groups
    times the segment is in memory instead of S times. The groups go from the last layers to the
    first, so all but one of these backward passes are partial; when the combination is known,
    one more backward pass computes it.

    Parameters
    ----------
    groups : int
        Into how many groups of about equal size the segment's parameters are divided.

    Raises
    ------
    ConfigError
        If ``groups`` isn't at least 1.
    """

    provides = frozenset({GRADIENT_PRODUCTS})
    leaves_server_gradients = True
    pools = False

    def __init__(self, groups: int = 2) -> None:
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ConfigError(f"groups is {groups!r}, expected a whole number of at least 1")
        self.groups = groups

    def __call__(
        self, segment: ServerSegment, batches: list[ClientBatch], weights: dict[str, float]
    ) -> StepResult:
        """See :class:`~flsplit.server.passes.ServerPass`.

        ``server_gradients`` are left to the rule that combines.
        """
        leaves: list[Tensor] = []
        losses: list[Tensor] = []
        logits: list[Tensor] = []
        for batch in batches:
            leaf = batch.smashed.detach().requires_grad_()
            with located(named([batch])):
                own = segment.forward(leaf)
            leaves.append(leaf)
            losses.append(client_loss(segment, own, batch))
            logits.append(own.detach())
        gram, cut = self._gram_and_cut(segment, losses, leaves)
        ones = {batch.client: 1.0 for batch in batches}
        return StepResult(
            losses={b.client: loss.item() for b, loss in zip(batches, losses, strict=True)},
            logits={b.client: one for b, one in zip(batches, logits, strict=True)},
            server_gradients=[None] * len(segment.parameters),
            cut_gradients={
                b.client: own_gradient(g, b, ones) for b, g in zip(batches, cut, strict=True)
            },
            rows=sum(len(batch) for batch in batches),
            products=_GraphProducts(segment.parameters, losses, gram),
        )

    def _gram_and_cut(
        self, segment: ServerSegment, losses: list[Tensor], leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the inner products, and the gradients by ``leaves`` from the last backward."""
        total = torch.zeros(len(losses), len(losses), dtype=torch.float64)
        cut: list[Tensor | None] = []
        groups = grouped(segment.parameters, self.groups)
        for number, group in enumerate(groups):
            gradients: list[tuple[Tensor | None, ...]] = []
            for loss, leaf in zip(losses, leaves, strict=True):
                last = [leaf] * (number == len(groups) - 1)
                found = torch.autograd.grad(
                    loss, [*group, *last], retain_graph=True, allow_unused=True
                )
                gradients.append(found[: len(group)])
                cut += found[len(group) :]
            for layer in zip(*gradients, strict=True):
                total += layer_gram(layer)
        return total, cut


class _GraphProducts:
    """Inner products that are known, and the graphs to compute a combination from."""

    def __init__(self, parameters: Sequence[Tensor], losses: list[Tensor], gram: Tensor) -> None:
        self._parameters = parameters
        self._losses = losses
        self._gram = gram

    def gram(self) -> Tensor:
        """Return the float64 matrix ``(S, S)`` of inner products."""
        return self._gram

    def combine(self, coefficients: Sequence[float], into: Gradients) -> Gradients:
        """Return Σ_i coefficients[i] · g_i by one backward pass; the graphs are gone then."""
        pairs = [(c, loss) for c, loss in zip(coefficients, self._losses, strict=True) if c]
        self._losses = []
        if not pairs:
            return [None] * len(self._parameters)
        total = weighted_sum([loss for _, loss in pairs], [c for c, _ in pairs])
        return list(torch.autograd.grad(total, self._parameters, allow_unused=True))


def grouped(parameters: Sequence[Tensor], groups: int) -> list[list[Tensor]]:
    """Return the parameters in groups of about equal size, the last layers first."""
    target = sum(p.numel() for p in parameters) / groups
    found: list[list[Tensor]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if found[-1] and size >= target * len(found) and len(found) < groups:
            found.append([])
        found[-1].append(parameter)
        size += parameter.numel()
    return found
