"""GAPSL."""

from typing import Any

from flsplit.errors import ConfigError
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
        Compute gradients twice instead of keeping all of them. Refused beside a ``server_pass``.
    **options
        See :class:`~flsplit.strategies.options.SplitOptions`. ``shares`` is ``equal`` by default:
        the paper's sum has no weights. ``server_batchnorm`` is refused: BatchNorm sees one client
        at a time, as the gradients are each client's own.

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
        _check_pass(low_memory, options)
        if options.get("server_pass") is None:
            options["server_pass"] = PerClientProducts() if low_memory else PerClientFactored()
        super().__init__(**options)


def _check_pass(low_memory: bool, options: dict[str, Any]) -> None:
    """Refuse what would say how the server computes, and have no effect."""
    if low_memory and options.get("server_pass") is not None:
        raise ConfigError(
            "low_memory chooses the server pass PerClientProducts, but there is a server_pass, "
            "too: give one of them"
        )
    if "server_batchnorm" in options:
        raise ConfigError(
            f"server_batchnorm is {options['server_batchnorm']!r}, but GAPSL takes none: it needs "
            "each client's own gradients, so BatchNorm sees one client at a time"
        )
