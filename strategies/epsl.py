"""EPSL."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.errors import ConfigError, DataError
from flsplit.losses import Loss, ModelLoss
from flsplit.run import ClientBatch, ParallelStrategy, Step, ceil_fraction
from flsplit.run.arguments import fraction, one_of
from flsplit.wireless.phases import Phase, Work, parallel_steps, server_passes

Aggregation = Literal["replay", "shared_delta"]

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


class EPSL(ParallelStrategy):
    r"""EPSL: PSL with the last layer's gradients aggregated over clients.

    The server aggregates last-layer gradients, a portion φ of them, and has less to
    back-propagate and to send; φ=0 is PSL. So much is in the paper's abstract [1]_ and, of φ, in
    others' summaries. All else is our reading, not checked against the paper's equations.

    Of the b positions of a mini-batch, m = ⌈φ·b⌉ are aggregated. With :math:`z_{i,j}` the gradient
    of client i's loss by its logits at position j, :math:`s_{i,j}` its smashed data and the shares
    λ, for :math:`j \le m`

    .. math:: \bar z_j = \sum_i \lambda_i z_{i,j}, \qquad
              \bar s_j = \sum_i \lambda_i s_{i,j}

    ``replay`` (E1)
        One pass over the m + C(b−m) rows :math:`[\bar s_1 … \bar s_m; s_{i,j}, j > m]` carries
        :math:`[\bar z_j / b; \lambda_i z_{i,j} / b]` back from the logits. All clients receive
        the cut-layer gradient of :math:`\bar s_j`, the other rows' go to their owners.
        BatchNorm's running statistics come from the first pass alone (the real rows).
    ``shared_delta`` (E2)
        :math:`\bar z_j` replaces :math:`z_{i,j}` in every client's row and goes back through that
        client's own Jacobian; the cut-layer gradients at a position are averaged afterwards.
        Nothing is saved on the server. An ablation of ours: it tells what mixing activations costs.

    Rows weigh :math:`a_i = \lambda_i / b_i`; position j stands for the rows j of all clients that
    have one, b being the largest batch of the step. Gradients have the magnitude of a gradient of
    the client's own mean loss. Each pass draws dropout masks of its own.

    Parameters
    ----------
    phi : float
        Aggregation ratio φ, 0 to 1.
    aggregation : {'replay', 'shared_delta'}
        The reading: E1, or E2, which computes all rows.
    **options
        See :class:`~flsplit.run.SplitOptions`. ``server_batchnorm`` must be ``pooled``.

    References
    ----------
    .. [1] Lin et al., Efficient Parallel Split Learning over Resource-constrained Wireless Edge
       Networks, https://arxiv.org/abs/2303.15991
    """

    def __init__(
        self, *, phi: float = 0.5, aggregation: Aggregation = "replay", **options: Any
    ) -> None:
        self.phi = fraction("phi", phi)
        self.aggregation = one_of("aggregation", aggregation, get_args(Aggregation))
        super().__init__(**options)
        if self.phi > 0:
            _check_loss(self.options.loss)
            if self.options.server_batchnorm != "pooled":
                raise ConfigError(
                    "server_batchnorm is 'per_client', but EPSL takes 'pooled' only: aggregated "
                    "rows belong to no client"
                )

    def step(self, step: Step) -> None:
        """Aggregate the gradients of the first positions at the logits, and carry them back."""
        m = ceil_fraction(self.phi, max(len(batch) for batch in step.batches))
        if m == 0:
            found = step.gradients()
            step.update(found)
            step.reply(found.cut_gradients)
        elif self.aggregation == "replay":
            self._replay(step, m)
        else:
            self._share_delta(step, m)

    def _replay(self, step: Step, m: int) -> None:
        batches, weights = step.batches, step.weights
        w = [weights[batch.client] for batch in batches]
        a = [weights[batch.client] / len(batch) for batch in batches]
        smashed = [batch.tensor for batch in batches]
        real = step.forward(step.pooled(), graph=False)
        z = _logit_gradients(step, real.outputs)

        total = weights_at_positions(batches, a, m, like=smashed[0])
        mean = sum_heads(smashed, a, m) / total
        rows = torch.cat([mean, *(s[m:] for s in smashed)])
        injected = torch.cat(
            [sum_heads(z, w, m), *(wi * zi[m:] for wi, zi in zip(w, z, strict=True))]
        )
        made_up = step.forward(rows, moves_buffers=False)
        server_gradients, by_rows = step.backward(made_up, injected)

        shared = by_rows[:m] / total
        own = torch.split(by_rows[m:], [max(len(batch) - m, 0) for batch in batches])
        step.update(server_gradients)
        self._reply(step, m, shared, dict(zip(step.clients, own, strict=True)))

    def _share_delta(self, step: Step, m: int) -> None:
        batches, weights = step.batches, step.weights
        w = [weights[batch.client] for batch in batches]
        a = [weights[batch.client] / len(batch) for batch in batches]
        real = step.forward(step.pooled())
        z = _logit_gradients(step, real.outputs)

        mean = sum_heads(z, w, m) / weights_at_positions(batches, a, m, like=z[0])
        injected = torch.cat(
            [
                torch.cat([ai * mean[: len(zi)], wi * zi[m:]])
                for ai, wi, zi in zip(a, w, z, strict=True)
            ]
        )
        server_gradients, by_rows = step.backward(real, injected)
        cut = torch.split(by_rows, [len(batch) for batch in batches])
        total = weights_at_positions(batches, a, m, like=cut[0])
        shared = sum_heads(cut, [1.0] * len(cut), m) / total
        step.update(server_gradients)
        own = {client: g[m:] for client, g in zip(step.clients, cut, strict=True)}
        self._reply(step, m, shared, own)

    def _reply(self, step: Step, m: int, shared: Tensor, own: Mapping[str, Tensor]) -> None:
        weights = step.weights
        step.reply(
            {
                b.client: torch.cat([shared[: len(b)] / len(b), own[b.client] / weights[b.client]])
                for b in step.batches
            },
            shared_rows={b.client: min(m, len(b)) for b in step.batches},
        )

    @classmethod
    def phases(
        cls, work: Work, *, phi: float = 0.5, aggregation: Aggregation = "replay", **arguments: Any
    ) -> tuple[Phase, ...]:
        r"""Return what a round sends and computes.

        Parallel steps with m = ⌈φ b⌉ shared rows. With n clients the server's passes are, in FLOPs,

        - forward :math:`n b F_s`, and for ``replay`` and m > 0 another :math:`r F_s`,
        - backward :math:`n b B_l + r (B_s - B_l)`,

        with :math:`r = m + n (b - m)` rows, and :math:`r = n b` for ``shared_delta``. The paper's
        equations, as we understand them, have r rows back and one forward pass.
        """
        rows = work.training.batch_size
        shared = ceil_fraction(phi, rows)
        replays = aggregation == "replay" and shared > 0
        back_rows = shared + work.num_devices * (rows - shared) if replays else work.rows
        server = server_passes(
            work,
            forward_rows=work.rows + replays * back_rows,
            backward_rows=back_rows,
            logit_rows=work.rows,
        )
        steps = parallel_steps(work, shared_rows=shared, server=server)
        return (*steps, *cls.aggregation_phases(work, **arguments))

    @classmethod
    def plan_note(
        cls, *, phi: float = 0.5, aggregation: Aggregation = "replay", **arguments: Any
    ) -> str:
        """Say which forward passes are charged."""
        if phi == 0.0 or aggregation != "replay":
            return ""
        return 'server forward has the second pass of aggregation = "replay"'


def _logit_gradients(step: Step, outputs: Any) -> list[Tensor]:
    """Return each client's gradient of its mean loss by its logits ``(b, C)``.

    DataError if these are not a classifier's logits and labels.
    """
    for batch in step.batches:
        labels = batch.labels
        if not (isinstance(outputs, Tensor) and isinstance(labels, Tensor)):
            raise DataError(
                f"client {batch.client!r}: EPSL aggregates a classifier's gradients, with logits "
                "(b, C) and class indices (b,), one tensor each; the model's output is a "
                f"{type(outputs).__name__}, the labels a {type(labels).__name__}"
            )
        if outputs.ndim != 2 or labels.ndim != 1 or labels.is_floating_point():
            error = DataError(
                f"client {batch.client!r}: EPSL aggregates a classifier's gradients, with logits "
                f"(b, C) and class indices (b,); these are logits "
                f"{(len(batch), *outputs.shape[1:])} and labels {tuple(labels.shape)} of "
                f"{labels.dtype}"
            )
            error.client = batch.client  # the others can go on
            raise error
    return list(step.logit_gradients(outputs).values())


def sum_heads(tensors: Sequence[Tensor], factors: Sequence[float], m: int) -> Tensor:
    """Return Σ_i factors[i] · tensors[i] over the first m rows; a row that is missing adds 0."""
    total = torch.zeros_like(tensors[0][:1]).expand(m, *tensors[0].shape[1:]).clone()
    for tensor, factor in zip(tensors, factors, strict=True):
        head = tensor[:m]
        total[: len(head)] += factor * head
    return total


def weights_at_positions(
    batches: Sequence[ClientBatch], factors: Sequence[float], m: int, like: Tensor
) -> Tensor:
    """Return Σ_i factors[i] over the clients that have a row at each position, to divide by."""
    ones = [torch.ones(len(b), dtype=like.dtype, device=like.device) for b in batches]
    return sum_heads(ones, factors, m).view(m, *[1] * (like.ndim - 1))


def _check_loss(loss: Loss) -> None:
    """Refuse torch's losses that take no class indices: aggregation is of classes' logits."""
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, ModelLoss):
        raise ConfigError("EPSL aggregates gradients of logits, which ModelLoss keeps in the model")
    kinds = tuple(one for one in _NOT_CLASSIFIERS if isinstance(one, type))
    if loss in _NOT_CLASSIFIERS or isinstance(loss, kinds):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ConfigError(
            f"EPSL aggregates gradients of class logits, but the loss is {name}; use a "
            "classifier's loss, or phi=0"
        )
