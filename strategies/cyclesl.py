"""CycleSL."""

from typing import Any

from flsplit.run import ParallelStrategy, Step
from flsplit.run.arguments import whole
from flsplit.wireless.phases import Phase, Work, parallel_steps, server_passes


class CycleSL(ParallelStrategy):
    r"""CycleSL: the server first trains on everybody's pooled rows, then gives gradients.

    In each step, as in the authors' code [1]_: the clients' smashed data is a data set
    :math:`H = \cup_i h_i` of the server's, on which it takes mini-batch steps for E epochs, rows
    of all clients mixed anew; then with the new :math:`w` fixed, client i receives

    .. math:: g_i = \partial \ell(w; h_i) / \partial h_i

    of its original batch. Client segments stay apart, as in PSL; with ``client_strategy=FedAvg()``
    they are averaged. The learning rate of a mini-batch step is ``server_lr``; in the last pass
    BatchNorm sees one client at a time. Both are our reading.

    Parameters
    ----------
    server_epochs : int
        E, at least 1: how often the server goes over the pooled rows in each step.
    server_batch_size : int
        Rows in its mini-batches, at least 1.
    **options
        See :class:`~flsplit.run.SplitOptions`.

    References
    ----------
    .. [1] CycleSL: Server-Client Cyclical Update Driven Scalable Split Learning,
       https://arxiv.org/abs/2511.18611
    """

    needs_labels = "its server trains on the mixed rows of all clients"

    def __init__(
        self, *, server_epochs: int = 1, server_batch_size: int = 32, **options: Any
    ) -> None:
        self.server_epochs = whole("server_epochs", server_epochs, 1)
        self.server_batch_size = whole("server_batch_size", server_batch_size, 1)
        super().__init__(**options)

    def step(self, step: Step) -> None:
        """Train the server on pooled, mixed rows; then freeze it and reply."""
        for _ in range(self.server_epochs):
            for rows in step.shuffled_rows(self.server_batch_size):
                step.update(step.gradients(rows))
        step.reply(step.gradients(per_client=True).cut_gradients)

    @classmethod
    def phases(cls, work: Work, *, server_epochs: int = 1, **arguments: Any) -> tuple[Phase, ...]:
        """Return parallel steps in which the server's passes are E + 1 times those of PSL."""
        rows = (server_epochs + 1) * work.rows
        server = server_passes(work, forward_rows=rows, backward_rows=rows)
        return (*parallel_steps(work, server=server), *cls.aggregation_phases(work, **arguments))
