"""SGLR."""

from collections.abc import Sequence
from typing import Any

from flsplit.errors import ConfigError
from flsplit.message.steps import FinishReply
from flsplit.strategies.options import at_round
from flsplit.strategies.psl import PSL
from flsplit.strategies.round import Round
from flsplit.strategies.rules.cut_gradient_averaging import Averaging, CutGradientAveraging
from flsplit.strategies.rules.split_lr import SplitLr


class SGLR(PSL):
    r"""SGLR: PSL with SplitAvg (averaged cut-layer gradients) and SplitLr (a scaled server rate).

    In each step of C clients, :math:`C_a` being φ·C of them drawn anew [1]_:

    .. math::
        w_s &\leftarrow w_s - \eta_c C^\alpha g_s, \qquad
            g_s \text{ of one mean loss over all rows} \\
        w_{c,i} &\leftarrow w_{c,i} - \eta_c \begin{cases}
            BP(\text{average of } g_k, k \in C_a) & i \in C_a \\ BP(g_i) & \text{else}
        \end{cases}

    The rules :class:`~flsplit.strategies.rules.CutGradientAveraging` and
    :class:`~flsplit.strategies.rules.SplitLr` say what in them is the paper's and what our
    reading. One reading is here: the clients' gradients are those of their own mean loss, as in
    all of flsplit's methods, and not 1/C of it, which one mean loss over all rows would give.

    Parameters
    ----------
    phi : float
        Fraction φ of the step's clients that share a gradient; 0 leaves SplitAvg out.
    alpha : float
        Exponent α of SplitLr; 0 leaves it out. The paper takes 0.5 to 1 with Adam.
    averaging : {'position_mean', 'position_sum', 'batch_mean'}
        What the average is.
    phases : (float, float)
        Part of the run's progress in which gradients are averaged.
    **options
        See :class:`~flsplit.strategies.options.SplitOptions`. ``client_lr`` (or else
        ``server_lr``) is :math:`\eta_c`, which ``train_config`` can't change; ``shares`` is
        ``batch`` by default. ``rules`` come after SGLR's own.

    References
    ----------
    .. [1] Pal et al., Server-Side Local Gradient Averaging and Learning Rate Acceleration for
       Scalable Split Learning, https://arxiv.org/abs/2112.05929
    """

    def __init__(
        self,
        *,
        phi: float = 0.5,
        alpha: float = 0.5,
        averaging: Averaging = "position_mean",
        phases: Sequence[float] = (0.0, 1.0),
        **options: Any,
    ) -> None:
        rules = [CutGradientAveraging(phi, averaging, phases), SplitLr(alpha)]
        options["rules"] = [*rules, *options.get("rules", ())]
        options.setdefault("shares", "batch")
        super().__init__(**_one_rate(options))

    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """See :class:`~flsplit.strategies.parallel.ParallelStrategy`.

        Raises
        ------
        ConfigError
            If the clients were given a learning rate that the server's doesn't follow.
        """
        plan, rate = round_.plan, at_round(self.options.server_lr, round_.plan.server_round)
        if plan.lr != rate:
            raise ConfigError(
                f"train_config: lr is {plan.lr!r} and SGLR's client_lr {rate!r}: the server's "
                "learning rate is client_lr · C**alpha; leave lr out and give client_lr, which may "
                "be a function of the round"
            )
        return super().train_round(round_)


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
