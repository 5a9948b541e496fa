"""EPSL, reading E2: all rows are kept, those of an aggregated position share their gradient."""

import torch

from flsplit.errors import located
from flsplit.server.passes.base import named, pool
from flsplit.server.passes.pooled import Pooled
from flsplit.server.passes.positions import (
    AggregatingPass,
    logit_gradients,
    row_weights,
    sum_heads,
    weights_at_positions,
)
from flsplit.server.segment import ServerSegment, split_rows
from flsplit.server.step import ClientBatch, StepResult


class SharedDelta(AggregatingPass):
    r"""EPSL's last-layer gradient aggregation without mixing activations (E2).

    As in :class:`~flsplit.server.passes.Replay`, :math:`\bar z_j = \sum_i \lambda_i z_{i,j}` for
    :math:`j \le m`; but it replaces :math:`z_{i,j}` in every client's row, goes back through that
    client's own Jacobian, and the cut-layer gradients at a position are averaged over the
    clients afterwards. Nothing is saved on the server (all C·b rows are back-propagated); the
    downlink is EPSL's. An ablation of ours: it tells what mixing activations costs.
    """

    def __call__(
        self, segment: ServerSegment, batches: list[ClientBatch], weights: dict[str, float]
    ) -> StepResult:
        """See :class:`~flsplit.server.passes.ServerPass`."""
        m = self.num_positions(batches)
        if m == 0:
            return Pooled()(segment, batches, weights)
        leaves = [batch.smashed.detach().requires_grad_() for batch in batches]
        with located(named(batches)):
            pooled = pool(leaves, batches)
            outputs = segment.forward(pooled)
        logits = split_rows(outputs.detach(), [len(batch) for batch in batches])
        losses, z = logit_gradients(segment, logits, batches)

        a, w = row_weights(batches, weights), [weights[batch.client] for batch in batches]
        mean = sum_heads(z, w, m) / weights_at_positions(batches, a, m, like=z[0])
        injected = torch.cat(
            [
                torch.cat([ai * mean[: len(zi)], wi * zi[m:]])
                for ai, wi, zi in zip(a, w, z, strict=True)
            ]
        )
        gradients = torch.autograd.grad(
            outputs,
            [*segment.parameters, *leaves],
            grad_outputs=injected,
            allow_unused=True,
        )
        cut = [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(leaves, gradients[len(segment.parameters) :], strict=True)
        ]
        total = weights_at_positions(batches, a, m, like=cut[0])
        shared = sum_heads(cut, [1.0] * len(cut), m) / total
        return StepResult(
            losses=losses,
            logits={b.client: o for b, o in zip(batches, logits, strict=True)},
            server_gradients=list(gradients[: len(segment.parameters)]),
            cut_gradients={
                b.client: torch.cat([shared[: len(b)] / len(b), g[m:] / weights[b.client]])
                for b, g in zip(batches, cut, strict=True)
            },
            rows=len(pooled),
            shared_rows={b.client: min(m, len(b)) for b in batches},
        )
