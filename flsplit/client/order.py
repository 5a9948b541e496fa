"""Which examples a client's mini-batches are made of."""

import torch
from torch import Tensor

from flsplit.client.samplers import OwnSampler
from flsplit.errors import DataError, located
from flsplit.message.round_plan import RoundPlan
from flsplit.seeds import derive_seed, generator


def steps_per_round(num_examples: int, plan: RoundPlan, client: str) -> int:
    """Return how many mini-batches a client has this round, those it sits out included.

    DataError if there are none.
    """
    if num_examples == 0:
        raise DataError(f"client {client!r} has no training examples: its partition is empty")
    if not plan.batch_sizes and plan.drop_last and num_examples < plan.batch_size:
        raise DataError(
            f"client {client!r} has {num_examples} examples, fewer than batch-size = "
            f"{plan.batch_size}, and drop-last leaves none"
        )
    return plan.steps_of(num_examples)


def begun_anew(drawn: int, before: int, now: int) -> int:
    """Return how many examples of ``now`` are drawn if ``drawn`` of ``before`` were.

    Data that have grown or shrunk begin with a new epoch; the epochs' numbers go on.
    """
    if before == now or before == 0:
        return drawn
    return -(-drawn // before) * now


class Order:
    """In which order a client goes over its examples: a new permutation every epoch.

    It is drawn from the run's seed, the client's name and the epoch's number, and depends on
    nothing else; so does the batch after so many examples ``drawn`` since the run began. Where
    the user gave a sampler, it is this that draws.
    """

    def __init__(
        self, num_examples: int, seed: int, client: str, sampler: OwnSampler | None = None
    ) -> None:
        self.num_examples, self.seed, self.client = num_examples, seed, client
        self._sampler = sampler
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, plan: RoundPlan, step: int, drawn: int) -> tuple[list[int], int]:
        """Return the examples of a step, and how many were drawn after it."""
        epoch, offset = divmod(drawn, self.num_examples)
        if plan.batch_sizes:
            rows = plan.rows_at(step)
            return self._exactly(plan, rows, epoch, offset), drawn + rows
        if plan.drop_last and self.num_examples - offset < plan.batch_size:
            epoch, offset = epoch + 1, 0
        order = self._order if epoch == self._epoch else self._of(plan, epoch)
        chosen: list[int] = order[offset : offset + plan.batch_size].tolist()
        return chosen, epoch * self.num_examples + offset + len(chosen)

    def _exactly(self, plan: RoundPlan, rows: int, epoch: int, offset: int) -> list[int]:
        """Return as many examples as planned; what an epoch lacks comes from the next."""
        chosen: list[int] = []
        while len(chosen) < rows:
            order = self._of(plan, epoch)
            chosen += order[offset : offset + rows - len(chosen)].tolist()
            epoch, offset = epoch + 1, 0
        return chosen

    def _of(self, plan: RoundPlan, epoch: int) -> Tensor:
        if epoch != self._epoch:
            labels = ("data", self.client, epoch)
            if self._sampler is None:
                rng = generator(self.seed, *labels)
                order = torch.randperm(self.num_examples, generator=rng)
            else:
                seed = derive_seed(self.seed, *labels)
                with located(f"client {self.client!r}"):
                    order = self._sampler.draw(seed, epoch, plan.experiment)
                self._check_length(order)
            self._epoch, self._order = epoch, order
        return self._order

    def _check_length(self, order: Tensor) -> None:
        if len(order) != self.num_examples:
            raise DataError(
                f"client {self.client!r} began the round with {self.num_examples} examples, its "
                f"sampler now yields {len(order)}: data may grow or shrink between rounds only"
            )
