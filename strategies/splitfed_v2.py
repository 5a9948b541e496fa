"""SplitFed V2."""

import torch

from flsplit.message.request import Backward
from flsplit.seeds import generator
from flsplit.server.step import ClientBatch
from flsplit.strategies.base import backward_requests
from flsplit.strategies.parallel import ParallelStrategy
from flsplit.strategies.round import Round


class SplitFedV2(ParallelStrategy):
    """SplitFed V2: one server segment, stepped on one client's batch after the other.

    Clients compute in parallel; in every step the server goes through their smashed data in a
    random order and does an optimizer step for each, so that batches of different clients
    interleave. Client segments are averaged at the end of each round. Random order is our
    reading of the paper [1]_; FSL-SAGE's authors' code calls the method SplitFed-SS.

    Parameters
    ----------
    **options
        See :class:`~flsplit.strategies.options.SplitOptions`.

    References
    ----------
    .. [1] Thapa et al., SplitFed: When Federated Learning Meets Split Learning,
       https://arxiv.org/abs/2004.12088
    """

    aggregates = True
    one_by_one = True

    def server_step(
        self, round_: Round, step: int, steps: int, batches: list[ClientBatch]
    ) -> dict[str, Backward]:
        """Do a pass and an optimizer step for each client, in random order."""
        plan = round_.plan
        rng = generator(plan.seed, "interleave", plan.server_round, step)
        requests: dict[str, Backward] = {}
        for index in torch.randperm(len(batches), generator=rng).tolist():
            one = [batches[index]]
            result = self.segment_step(self.server, round_, step, steps, one)
            requests |= backward_requests(result, step, one)
        return requests
