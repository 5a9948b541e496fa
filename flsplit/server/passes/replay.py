"""EPSL, reading E1: aggregated positions are replayed with their mean activation."""

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


class Replay(AggregatingPass):
    r"""EPSL's last-layer gradient aggregation, each aggregated position as one row (E1).

    The first pass, without a graph, gives all logits and their gradients :math:`z_{i,j}`. Then
    for the positions :math:`j \le m = \lceil \varphi b \rceil`

    .. math:: \bar z_j = \sum_i \lambda_i z_{i,j}, \qquad \bar s_j = \sum_i \lambda_i s_{i,j}

    and one pass over the m + C(b−m) rows :math:`[\bar s_1 … \bar s_m; s_{i,j}, j > m]` carries
    :math:`[\bar z_j / b; \lambda_i z_{i,j} / b]` back from the logits. All clients receive the
    cut-layer gradient of :math:`\bar s_j`, at the magnitude of a gradient of their own mean loss.

    EPSL's abstract [1]_ says that last-layer activations' gradients are aggregated; summaries by
    others, that φ is the ratio and φ=0 gives PSL. The rest is our reading and has not been
    checked against the paper's equations:

    * aggregation at the logits, by in-batch position, of the first ⌈φ·b⌉ positions;
    * the shares λ as weights;
    * one row back through the clients' *mean activation* for an aggregated position;
    * its cut-layer gradient for all clients, the other rows' for their owners, both at the
      magnitude of a gradient of the client's own mean loss;
    * BatchNorm: running statistics come from the first pass alone (the real rows), the second
      normalises with the statistics of its own rows;
    * dropout: a mask of its own in each pass.

    References
    ----------
    .. [1] Lin et al., Efficient Parallel Split Learning over Resource-constrained Wireless Edge
       Networks, https://arxiv.org/abs/2303.15991
    """

    def __call__(
        self, segment: ServerSegment, batches: list[ClientBatch], weights: dict[str, float]
    ) -> StepResult:
        """See :class:`~flsplit.server.passes.ServerPass`."""
        m = self.num_positions(batches)
        if m == 0:
            return Pooled()(segment, batches, weights)
        smashed = [batch.smashed.detach() for batch in batches]
        with located(named(batches)), torch.no_grad():
            pooled = pool(smashed, batches)
            logits = split_rows(segment.forward(pooled), [len(batch) for batch in batches])
        losses, z = logit_gradients(segment, logits, batches)

        a, w = row_weights(batches, weights), [weights[batch.client] for batch in batches]
        total = weights_at_positions(batches, a, m, like=smashed[0])
        mean = sum_heads(smashed, a, m) / total
        rows = torch.cat([mean, *(s[m:] for s in smashed)]).requires_grad_()
        injected = torch.cat(
            [sum_heads(z, w, m), *(wi * zi[m:] for wi, zi in zip(w, z, strict=True))]
        )
        with located(named(batches)), segment.keeping_buffers():
            gradients = torch.autograd.grad(
                segment.forward(rows),
                [*segment.parameters, rows],
                grad_outputs=injected,
                allow_unused=True,
                materialize_grads=False,
            )
        by_rows = torch.zeros_like(rows) if gradients[-1] is None else gradients[-1]
        shared = by_rows[:m] / total
        own = split_rows(by_rows[m:], [max(len(batch) - m, 0) for batch in batches])
        return StepResult(
            losses=losses,
            logits={b.client: o for b, o in zip(batches, logits, strict=True)},
            server_gradients=list(gradients[:-1]),
            cut_gradients={
                b.client: torch.cat([shared[: len(b)] / len(b), g / weights[b.client]])
                for b, g in zip(batches, own, strict=True)
            },
            rows=len(rows),
            shared_rows={b.client: min(m, len(b)) for b in batches},
        )
