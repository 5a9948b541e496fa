"""Parallel split learning."""

from flsplit.run import ParallelStrategy, Step


class PSL(ParallelStrategy):
    r"""Parallel split learning: one server segment, trained on all clients' smashed data at once.

    Each client keeps a segment of its own and steps with its own cut-layer gradient; client
    segments are never averaged, unless a ``client_strategy`` is passed. With FedAvg that is close
    to what GAPSL's and SGLR's papers call SFL: it averages every round, SGLR's every step, and
    GAPSL's at an interval that its paper doesn't report.

    In each step, with shares :math:`\delta_i = |D_i| / |D|` (equations 4 to 6 of [1]_):

    .. math:: w_s \leftarrow w_s - \eta_s \sum_i \delta_i g_{s,i}, \qquad
              w_{c,i} \leftarrow w_{c,i} - \eta_c g_{c,i}

    Parameters
    ----------
    **options
        See :class:`~flsplit.run.SplitOptions`.

    References
    ----------
    .. [1] Pal et al., Server-Side Local Gradient Averaging and Learning Rate Acceleration for
       Scalable Split Learning, https://arxiv.org/abs/2112.05929
    """

    keeps_labels = True
    several_cuts = True
    pools = False  # rows of several shapes go through the server segment client by client

    def step(self, step: Step) -> None:
        """Do one pass over all clients' smashed data and one optimizer step."""
        found = step.gradients()
        step.update(found)
        step.reply(found.cut_gradients)
