"""SplitFed V2."""

import torch

from flsplit.run import ParallelStrategy, Step


class SplitFedV2(ParallelStrategy):
    """SplitFed V2: one server segment, stepped on one client's batch after the other.

    Clients compute in parallel; in every step the server goes through their smashed data in a
    random order and does an optimizer step for each, so that batches of different clients
    interleave. Client segments are averaged at the end of each round. Random order is our
    reading of the paper [1]_; FSL-SAGE's authors' code calls the method SplitFed-SS.

    Parameters
    ----------
    **options
        See :class:`~flsplit.run.SplitOptions`.

    References
    ----------
    .. [1] Thapa et al., SplitFed: When Federated Learning Meets Split Learning,
       https://arxiv.org/abs/2004.12088
    """

    aggregates = True
    keeps_labels = True
    several_cuts = True
    pools = False

    def step(self, step: Step) -> None:
        """Do a pass and an optimizer step for each client, in random order."""
        order = torch.randperm(len(step.batches), generator=step.generator("interleave"))
        for index in order.tolist():
            found = step.gradients([step.batches[index]])
            step.update(found)
            step.reply(found.cut_gradients)
