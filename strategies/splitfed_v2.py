"""SplitFed V2."""

from typing import Any, Literal, get_args

import torch

from flsplit.run import ParallelStrategy, Step
from flsplit.run.arguments import one_of
from flsplit.wireless.phases import Phase, Work, parallel_steps

Order = Literal["random", "fixed"]


class SplitFedV2(ParallelStrategy):
    """SplitFed V2: one server segment, stepped on one client's batch after the other.

    Clients compute in parallel; in every step the server goes through their smashed data one after
    the other and does an optimizer step for each, so that batches of different clients
    interleave. Client segments are averaged at the end of each round. Random order is our
    reading of the paper [1]_; FSL-SAGE's authors' code calls the method SplitFed-SS.

    Parameters
    ----------
    order : {'random', 'fixed'}
        Whether the order of the clients is drawn anew in every step, or is always that of their
        names.
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

    def __init__(self, *, order: Order = "random", **options: Any) -> None:
        self.order = one_of("order", order, get_args(Order))
        super().__init__(**options)

    @classmethod
    def phases(cls, work: Work, **arguments: Any) -> tuple[Phase, ...]:
        """Return what a round sends and computes: SplitFed V1's, but for the last layers.

        Those of a U-shaped split are asked for in turn, as the server goes from client to client.
        """
        steps = parallel_steps(work, tails_in_turn=True)
        return (*steps, *cls.aggregation_phases(work, **arguments))

    def step(self, step: Step) -> None:
        """Do a pass and an optimizer step for each client, in its turn."""
        order = list(range(len(step.batches)))
        if self.order == "random":
            drawn = torch.randperm(len(order), generator=step.generator("interleave"))
            order = drawn.tolist()
        for index in order:
            found = step.gradients([step.batches[index]])
            step.update(found)
            step.reply(found.cut_gradients)
