"""SFL-GA."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flsplit.cut.smashed import value_by_value
from flsplit.run import ParallelStrategy, Step
from flsplit.wireless.phases import Phase, Work, parallel_steps


class SFLGA(ParallelStrategy):
    r"""SFL-GA: all clients step with one aggregate of the cut-layer gradients, which is broadcast.

    In each step, with the shares λ over its clients [1]_:

    .. math::
        w_s &\leftarrow w_s - \eta_s \sum_i \lambda_i g_{s,i} \\
        w_{c,i} &\leftarrow w_{c,i} - \eta_c \, BP(\bar g), \qquad \bar g = \sum_k \lambda_k g_k

    :math:`g_k` is the gradient of client k's own mean loss by its smashed data. This is known from
    the paper's abstract; its choice of the cut and of resources is not built. Our reading is that
    in-batch positions are aggregated one by one, and what happens to batches of different size:
    what is averaged is the gradient per sample, :math:`b_k g_{k,j}`, at a position j over the
    clients that have one there; client i takes the first :math:`b_i` positions, over :math:`b_i`.

    Parameters
    ----------
    **options
        See :class:`~flsplit.run.SplitOptions`.

    References
    ----------
    .. [1] Communication-and-Computation Efficient Split Federated Learning: Gradient Aggregation
       and Resource Management, https://arxiv.org/abs/2501.01078
    """

    keeps_labels = True

    def step(self, step: Step) -> None:
        """Update as PSL does; reply with the λ-weighted mean of the cut-layer gradients."""
        found = step.gradients()
        step.update(found)
        rows = {batch.client: len(batch) for batch in step.batches}
        step.reply(
            value_by_value(lambda own: broadcast_mean(own, step.shares), found.cut_gradients, rows),
            shared_rows=rows,
        )

    @classmethod
    def phases(cls, work: Work, **arguments: Any) -> tuple[Phase, ...]:
        """Return parallel steps whose cut-layer gradients are all broadcast."""
        steps = parallel_steps(work, shared_rows=work.training.batch_size)
        return (*steps, *cls.aggregation_phases(work, **arguments))


def broadcast_mean(
    gradients: Mapping[str, Tensor], shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the λ-weighted mean at each position, for each client as long as its batch.

    The gradients ``(b_i, ...)`` are those of the clients' own mean losses.
    """
    longest = max(gradients.values(), key=len)
    total, weight = torch.zeros_like(longest), torch.zeros(len(longest)).to(longest)
    for client, gradient in gradients.items():
        b, share = len(gradient), shares[client]
        total[:b] += share * b * gradient
        weight[:b] += share
    mean = total / weight.view(-1, *[1] * (longest.ndim - 1))
    return {client: mean[: len(own)] / len(own) for client, own in gradients.items()}
