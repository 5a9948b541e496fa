"""GAPSL."""

from typing import Any

from flsplit.server.passes import PerClientFactored, PerClientProducts
from flsplit.server.step import Reduction
from flsplit.strategies.psl import PSL
from flsplit.strategies.rules.leader_alignment import (
    Active,
    Excluded,
    LeaderAlignment,
    Module,
    Single,
)


class GAPSL(PSL):
    r"""GAPSL: PSL whose server steps only with gradients that point the way of a leader gradient.

    In each step [1]_: a gradient of the server segment per client; a leader gradient, the mean of
    those that agree most with the others (LGI); and the sum of the gradients whose angle to it is
    below a threshold (GDA). Clients receive their own cut-layer gradients, so the traffic is
    PSL's. :class:`~flsplit.strategies.rules.LeaderAlignment` has the formulas, the meaning of
    the parameters, and what is our reading.

    Memory: at most S + 2 times the server segment for S clients (gradients, their combination,
    the weights), beside optimizer and activations; large Linear layers need less.
    ``low_memory`` needs about half the gradients and another backward pass.

    Parameters
    ----------
    eta, k_min, k_max, lam, loss_reduction, excluded_clients, lgi, gda, active_alignment, single_client
        See :class:`~flsplit.strategies.rules.LeaderAlignment`.
    low_memory : bool
        Compute gradients twice instead of keeping all of them.
    **options
        See :class:`~flsplit.strategies.options.SplitOptions`. ``shares`` is ``equal`` by default:
        the paper's sum has no weights.

    References
    ----------
    .. [1] Lin et al., GAPSL: A Gradient-Aligned Parallel Split Learning on Heterogeneous Data,
       https://arxiv.org/abs/2603.18540
    """  # noqa: E501

    def __init__(
        self,
        *,
        eta: float = 0.0,
        k_min: float = 20.0,
        k_max: float = 80.0,
        lam: float = 5e-4,
        loss_reduction: Reduction = "sum",
        excluded_clients: Excluded = "own_gradient",
        lgi: Module = "on",
        gda: Module = "on",
        active_alignment: Active = "none",
        single_client: Single = "error",
        low_memory: bool = False,
        **options: Any,
    ) -> None:
        alignment = LeaderAlignment(
            eta=eta,
            k_min=k_min,
            k_max=k_max,
            lam=lam,
            loss_reduction=loss_reduction,
            excluded_clients=excluded_clients,
            lgi=lgi,
            gda=gda,
            active_alignment=active_alignment,
            single_client=single_client,
        )
        options["rules"] = [alignment, *options.get("rules", ())]
        options.setdefault("shares", "equal")
        if options.get("server_pass") is None:
            options["server_pass"] = PerClientProducts() if low_memory else PerClientFactored()
        super().__init__(**options)
