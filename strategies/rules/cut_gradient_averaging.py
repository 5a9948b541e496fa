"""SGLR's averaging of cut-layer gradients."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from flsplit.errors import ConfigError, SegmentMismatchError
from flsplit.server.arguments import fraction, one_of
from flsplit.server.passes import SHARED_ROWS
from flsplit.server.passes.positions import ceil_fraction
from flsplit.server.rules import GradientRule
from flsplit.server.step import StepContext, StepResult

Averaging = Literal["position_mean", "position_sum", "batch_mean"]


class CutGradientAveraging(GradientRule):
    r"""SplitAvg: a part of the clients step with one common cut-layer gradient.

    In every step ⌈φ·C⌉ of the C clients that are to step are drawn anew. They all receive

    .. math:: \bar g = \text{average over } k \in C_a \text{ of } g_k,

    the others their own gradient (equations 15 and 17 of SGLR [1]_). The paper leaves open what
    the average is; three readings:

    ``position_mean``
        The unweighted mean at each in-batch position, as the authors' code computes it (it does
        so for all clients; the draw of a fraction is in the paper only).
    ``position_sum``
        Without dividing by the number of active clients, as equation 15 is printed.
    ``batch_mean``
        One gradient for every position: the mean over all rows of all active clients. Its
        payload, one sample's size, is that of the paper's Table 6.

    *Batches of different size* are our reading. What is averaged is the gradient per sample,
    :math:`b_k g_{k,j}` for client k's mean loss over :math:`b_k` rows; at a position that only
    some active clients have, over those; and client i receives the first :math:`b_i` positions,
    divided by :math:`b_i` to be of the size of a gradient of its own mean loss. With equal
    batches all of this is the plain formula.

    Parameters
    ----------
    phi : float
        The fraction φ of the clients that are active, 0 to 1. With 1 for a whole run and many
        clients the paper sees training diverge; see ``phases``.
    averaging : {'position_mean', 'position_sum', 'batch_mean'}
        The reading.
    phases : (float, float)
        Average only while the run's progress is in this interval [start, end) of 0 … 1: ``(0.0,
        0.6)`` is the first, ``(0.6, 1.0)`` the last part of the run (Table 3 of the paper).

    Raises
    ------
    ConfigError
        If an argument is out of range.

    References
    ----------
    .. [1] Pal et al., Server-Side Local Gradient Averaging and Learning Rate Acceleration for
       Scalable Split Learning, https://arxiv.org/abs/2112.05929
    """

    across_clients = True
    only_once = True

    def __init__(
        self,
        phi: float = 0.5,
        averaging: Averaging = "position_mean",
        phases: Sequence[float] = (0.0, 1.0),
    ) -> None:
        self.phi = fraction("phi", phi)
        self.averaging = one_of("averaging", averaging, get_args(Averaging))
        self.phases = _interval(phases)
        if averaging != "position_mean":
            self.refuses = {
                SHARED_ROWS: f"averaging={averaging!r} would mix rows that all clients share "
                "already with their own ones; averaging='position_mean' leaves those as they are"
            }

    def __call__(self, context: StepContext, result: StepResult) -> StepResult:
        """Replace the active clients' cut-layer gradients by their average."""
        active = self._draw(context, result)
        result.metrics["cut-gradient-averaging.active"] = float(len(active))
        if active:
            per_sample = {c: len(g) * g for c, g in _of(active, result.cut_gradients).items()}
            common = _AVERAGES[self.averaging](per_sample)
            for client in active:
                b = len(result.cut_gradients[client])
                rows = (
                    common[:b] if self.averaging != "batch_mean" else common.repeat_interleave(b, 0)
                )
                result.cut_gradients[client] = rows / b
                result.shared_rows[client] = b
            if self.averaging == "batch_mean":
                result.repeated |= set(active)
        return result

    def _draw(self, context: StepContext, result: StepResult) -> list[str]:
        """Return the step's active clients, in their order; none outside the phase."""
        names = [name for name in context.client_ids if name not in result.skipped]
        start, end = self.phases
        count = ceil_fraction(self.phi, len(names))
        if count == 0 or not start <= context.progress < end:
            return []
        chosen = context.rng.choice(len(names), size=count, replace=False)
        return [names[index] for index in sorted(chosen.tolist())]


def position_sum(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the sum at each position, as long as the longest batch."""
    longest = max(gradients.values(), key=len)
    total = torch.zeros_like(longest)
    for gradient in gradients.values():
        total[: len(gradient)] += gradient
    return total


def position_mean(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the mean at each position over the clients that have one there."""
    total = position_sum(gradients)
    counts = [sum(len(g) > j for g in gradients.values()) for j in range(len(total))]
    return total / torch.tensor(counts).to(total).view(-1, *[1] * (total.ndim - 1))


def batch_mean(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over all rows of all clients, as one row ``(1, ...)``."""
    return torch.cat(list(gradients.values())).mean(0, keepdim=True)


_AVERAGES = {
    "position_mean": position_mean,
    "position_sum": position_sum,
    "batch_mean": batch_mean,
}


def _of(active: list[str], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the active clients' gradients.

    Raises
    ------
    SegmentMismatchError
        If a client's differs from the first one's in more than the number of rows.
    """
    first = gradients[active[0]]
    for client in active:
        if gradients[client].shape[1:] != first.shape[1:]:
            raise SegmentMismatchError(
                f"the cut-layer gradient of client {client!r} has shape "
                f"{tuple(gradients[client].shape)}, that of client {active[0]!r} "
                f"{tuple(first.shape)}: they can't be averaged"
            )
    return {client: gradients[client] for client in active}


def _interval(phases: Sequence[float]) -> tuple[float, float]:
    if isinstance(phases, str) or not isinstance(phases, Sequence) or len(phases) != 2:
        raise ConfigError(f"phases is {phases!r}, expected a pair (start, end)")
    start, end = (
        fraction(f"phases, {name}", p) for name, p in zip(("start", "end"), phases, strict=True)
    )
    if start >= end:
        raise ConfigError(f"phases is {phases!r}, expected a start before the end")
    return start, end
