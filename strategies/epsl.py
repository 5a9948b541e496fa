"""EPSL."""

from typing import Any, Literal, get_args

from flsplit.errors import ConfigError
from flsplit.server.arguments import one_of
from flsplit.server.passes import Replay, SharedDelta
from flsplit.server.passes.positions import ceil_fraction
from flsplit.strategies.psl import PSL
from flsplit.wireless.phases import Phase, Work, parallel_steps, server_passes

Aggregation = Literal["replay", "shared_delta"]
_PASSES = {"replay": Replay, "shared_delta": SharedDelta}


class EPSL(PSL):
    r"""EPSL: PSL with the last layer's gradients aggregated over clients.

    The server aggregates last-layer gradients, a portion φ of them, and has less to
    back-propagate and to send; φ=0 is PSL. So much is in the paper's abstract [1]_ and, of φ, in
    others' summaries.

    All else is our reading, not checked against the paper's equations. Of the b positions of a
    mini-batch, m = ⌈φ·b⌉ are aggregated: their gradients at the logits, summed over the clients
    with the shares λ, are back-propagated once, and the cut-layer gradient is broadcast to all
    clients. The other b − m rows of each client are treated as in PSL. So m + C(b − m) rows go
    back through the server segment instead of C·b. How an aggregated gradient is
    back-propagated: :class:`~flsplit.server.passes.Replay` (E1) or
    :class:`~flsplit.server.passes.SharedDelta` (E2).

    Parameters
    ----------
    phi : float
        Aggregation ratio φ, 0 to 1.
    aggregation : {'replay', 'shared_delta'}
        The reading: E1, or E2, which computes all rows.
    **options
        See :class:`~flsplit.strategies.options.SplitOptions`. A ``server_pass`` is refused: EPSL
        is one.

    References
    ----------
    .. [1] Lin et al., Efficient Parallel Split Learning over Resource-constrained Wireless Edge
       Networks, https://arxiv.org/abs/2303.15991
    """

    def __init__(
        self, *, phi: float = 0.5, aggregation: Aggregation = "replay", **options: Any
    ) -> None:
        if options.get("server_pass") is not None:
            raise ConfigError(
                "EPSL is a server pass itself and takes no server_pass; PSL takes one"
            )
        kind = _PASSES[one_of("aggregation", aggregation, get_args(Aggregation))]
        self.phi = phi
        self.aggregation = aggregation
        super().__init__(**options | {"server_pass": kind(phi)})

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
