"""All clients' rows through the server segment at once."""

import torch

from flsplit.errors import located
from flsplit.server.passes.base import (
    ServerPass,
    client_loss,
    named,
    own_gradient,
    pool,
    weighted_sum,
)
from flsplit.server.segment import ServerSegment, split_rows
from flsplit.server.step import ClientBatch, StepResult


class Pooled(ServerPass):
    """One forward and one backward pass over the concatenated smashed data of all clients."""

    def __call__(
        self, segment: ServerSegment, batches: list[ClientBatch], weights: dict[str, float]
    ) -> StepResult:
        """See :class:`ServerPass`."""
        leaves = [batch.smashed.detach().requires_grad_() for batch in batches]
        pooled = pool(leaves, batches)
        with located(named(batches)):
            logits = split_rows(segment.forward(pooled), [len(batch) for batch in batches])
        losses = [client_loss(segment, z, b) for z, b in zip(logits, batches, strict=True)]
        total = weighted_sum(losses, [weights[batch.client] for batch in batches])
        gradients = torch.autograd.grad(total, [*segment.parameters, *leaves], allow_unused=True)
        cut = gradients[len(segment.parameters) :]
        return StepResult(
            losses={b.client: loss.item() for b, loss in zip(batches, losses, strict=True)},
            logits={b.client: z.detach() for b, z in zip(batches, logits, strict=True)},
            server_gradients=list(gradients[: len(segment.parameters)]),
            cut_gradients={
                b.client: own_gradient(g, b, weights) for b, g in zip(batches, cut, strict=True)
            },
            rows=len(pooled),
        )
