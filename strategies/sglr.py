"""SGLR."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flsplit.cut.smashed import CutGradient, value_by_value
from flsplit.errors import ConfigError, SegmentMismatchError
from flsplit.run import ParallelStrategy, Round, Step, ceil_fraction
from flsplit.run.arguments import fraction, number, one_of
from flsplit.run.options import at_round

Averaging = Literal["position_mean", "position_sum", "batch_mean"]


class SGLR(ParallelStrategy):
    r"""SGLR: PSL with SplitAvg (averaged cut-layer gradients) and SplitLr (a scaled server rate).

    In each step of C clients, :math:`C_a` being ⌈φ·C⌉ of them drawn anew (equations 15 and 17 of
    [1]_, and its section 3):

    .. math::
        w_s &\leftarrow w_s - \eta_c C^\alpha g_s, \qquad
            g_s \text{ of one mean loss over all rows} \\
        w_{c,i} &\leftarrow w_{c,i} - \eta_c \begin{cases}
            BP(\text{average of } g_k, k \in C_a) & i \in C_a \\ BP(g_i) & \text{else}
        \end{cases}

    The paper leaves open what the average is; three readings:

    ``position_mean``
        The unweighted mean at each in-batch position, as the authors' code computes it (it does
        so for all clients; the draw of a fraction is in the paper only).
    ``position_sum``
        Without dividing by the number of active clients, as equation 15 is printed.
    ``batch_mean``
        One gradient for every position: the mean over all rows of all active clients. Its
        payload, one sample's size, is that of the paper's Table 6.

    Our readings: the clients' gradients are those of their own mean loss, as in all of flsplit's
    methods, and not 1/C of it, which one mean loss over all rows would give. C counts the clients
    *in this step*. *Batches of different size*: what is averaged is the gradient per sample,
    :math:`b_k g_{k,j}` for client k's mean loss over :math:`b_k` rows; at a position that only
    some active clients have, over those; and client i receives the first :math:`b_i` positions,
    divided by :math:`b_i`. With equal batches all of this is the plain formula.

    Parameters
    ----------
    phi : float
        Fraction φ of the step's clients that share a gradient; 0 leaves SplitAvg out. With 1 for a
        whole run and many clients the paper sees training diverge; see ``phases``.
    alpha : float
        Exponent α of SplitLr, at least 0; 0 leaves it out. The paper takes 0.5 to 1 with Adam.
    averaging : {'position_mean', 'position_sum', 'batch_mean'}
        What the average is.
    phases : (float, float)
        Average only while the run's progress is in this interval [start, end) of 0 … 1: ``(0.0,
        0.6)`` is the first, ``(0.6, 1.0)`` the last part of the run (Table 3 of the paper).
    **options
        See :class:`~flsplit.run.SplitOptions`. ``client_lr`` (or else ``server_lr``) is
        :math:`\eta_c`, which ``train_config`` can't change; ``shares`` is ``batch`` by default.

    References
    ----------
    .. [1] Pal et al., Server-Side Local Gradient Averaging and Learning Rate Acceleration for
       Scalable Split Learning, https://arxiv.org/abs/2112.05929
    """

    keeps_labels = True
    several_cuts = True

    def __init__(
        self,
        *,
        phi: float = 0.5,
        alpha: float = 0.5,
        averaging: Averaging = "position_mean",
        phases: Sequence[float] = (0.0, 1.0),
        **options: Any,
    ) -> None:
        self.phi, self.alpha = fraction("phi", phi), number("alpha", alpha, minimum=0.0)
        self.averaging = one_of("averaging", averaging, get_args(Averaging))
        self._phases = _interval(phases)  # ``phases`` itself is what a round sends and computes
        options.setdefault("shares", "batch")
        super().__init__(**_one_rate(options))

    def step(self, step: Step) -> None:
        """Update with a scaled rate, average the active clients' gradients, reply."""
        found = step.gradients()
        active = self._draw(step)
        step.record({"cut-gradient-averaging.active": float(len(active))})
        rows = {batch.client: len(batch) for batch in step.batches}
        shared: dict[str, CutGradient] = {}
        for group in step.groups:  # gradients at different cuts have no average
            shared |= self._shared({c: found.cut_gradients[c] for c in group}, active, rows)
        factor = len(step.clients) ** self.alpha
        step.record({"split-lr.factor": factor})
        step.update(found, lr_factor=factor)
        step.reply(
            found.cut_gradients | shared,
            shared_rows={client: rows[client] for client in shared},
            repeated=active if self.averaging == "batch_mean" else (),
        )

    def _shared(
        self, gradients: Mapping[str, CutGradient], active: list[str], rows: Mapping[str, int]
    ) -> dict[str, CutGradient]:
        active = [client for client in active if client in gradients]
        return value_by_value(lambda one: averaged(one, active, self.averaging), gradients, rows)

    def _draw(self, step: Step) -> list[str]:
        """Return the step's active clients, in their order; none outside the phase."""
        start, end = self._phases
        count = ceil_fraction(self.phi, len(step.clients))
        if count == 0 or not start <= step.progress < end:
            return []
        chosen = step.rng.choice(len(step.clients), size=count, replace=False)
        return [step.clients[index] for index in sorted(chosen.tolist())]

    def begin_round(self, round_: Round) -> None:
        """Refuse a learning rate of the clients that the server's doesn't follow.

        Raises
        ------
        ConfigError
            If ``train_config`` has another.
        """
        plan, rate = round_.plan, at_round(self.options.server_lr, round_.plan.server_round)
        if plan.lr != rate:
            raise ConfigError(
                f"train_config: lr is {plan.lr!r} and SGLR's client_lr {rate!r}: the server's "
                "learning rate is client_lr · C**alpha; leave lr out and give client_lr, which may "
                "be a function of the round"
            )


def averaged(
    gradients: Mapping[str, Tensor], active: Sequence[str], averaging: Averaging | str
) -> dict[str, Tensor]:
    """Return the gradient that each active client receives instead of its own.

    Parameters
    ----------
    gradients : mapping of str to torch.Tensor
        Cut-layer gradients ``(b_i, ...)`` of the clients' own mean losses.
    active : sequence of str
        The clients that share one.
    averaging : {'position_mean', 'position_sum', 'batch_mean'}
        What the average is; see :class:`SGLR`.

    Raises
    ------
    SegmentMismatchError
        If rows of two clients have different shapes.
    """
    if not active:
        return {}
    own = _of(active, gradients)
    common = _AVERAGES[averaging]({client: len(g) * g for client, g in own.items()})
    found = {}
    for client, gradient in own.items():
        b = len(gradient)
        rows = common[:b] if averaging != "batch_mean" else common.repeat_interleave(b, 0)
        found[client] = rows / b
    return found


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


def _of(active: Sequence[str], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _one_rate(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with η_c as the server's learning rate, too."""
    client_lr, server_lr = options.get("client_lr"), options.get("server_lr")
    if client_lr is None:
        return options
    if server_lr is not None and server_lr != client_lr:
        raise ConfigError(
            f"server_lr is {server_lr!r} and client_lr {client_lr!r}: SGLR's server learning rate "
            "is client_lr · C**alpha; give client_lr only"
        )
    return options | {"server_lr": client_lr}
