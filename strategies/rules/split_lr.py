"""SGLR's scaling of the server's learning rate with the number of clients."""

from flsplit.server.arguments import number
from flsplit.server.rules import GradientRule
from flsplit.server.step import StepContext, StepResult


class SplitLr(GradientRule):
    r"""SplitLr: the server's learning rate grows with the clients in the step.

    .. math:: \eta_s = \eta_c \, C^\alpha

    for C clients with equal batches, as in section 3 of SGLR [1]_; :math:`\eta_c` is the
    strategy's ``server_lr``, which :class:`~flsplit.strategies.SGLR` sets to the clients'. That
    C counts the clients *in this step*, so that the rate falls when clients drop out, is our
    reading. Where every server step is one client's, C would always be 1: the rule is refused
    there.

    Parameters
    ----------
    alpha : float
        The exponent α, at least 0; with 0 the rate stays as it is.

    References
    ----------
    .. [1] Pal et al., Server-Side Local Gradient Averaging and Learning Rate Acceleration for
       Scalable Split Learning, https://arxiv.org/abs/2112.05929
    """

    across_clients = True
    only_once = True

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = number("alpha", alpha, minimum=0.0)

    def __call__(self, context: StepContext, result: StepResult) -> StepResult:
        """Scale the step's learning rate."""
        result.server_lr_factor *= len(context.client_ids) ** self.alpha
        result.metrics["split-lr.factor"] = result.server_lr_factor
        return result
