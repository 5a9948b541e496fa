"""Accuracy of every client's model, on everybody's test examples and on its own kind of them."""

from typing import Any

import torch
from torch import Tensor

GLOBAL, OWN = "global", "own"


class Everyone:
    """A metric that keeps clients apart; its interface is that of torchmetrics.

    All are evaluated on the same examples, batch by batch and in their order, so a batch's place
    tells whose it is. A client's own accuracy is that on test examples of the classes that it
    trains on, weighted by how often it has them.

    Parameters
    ----------
    shares : Tensor
        Which share of a client's training examples is of each class: (clients, classes).
    models : int
        How many models are evaluated: 1 where all clients have the same, else all clients'.
    """

    def __init__(self, shares: Tensor, models: int) -> None:
        self.shares = shares
        self.right = torch.zeros(models, shares.shape[1], dtype=torch.float64)
        self.seen = torch.zeros_like(self.right)
        self.batches = 0

    def to(self, device: Any) -> "Everyone":
        """Stay: counting is done on the CPU."""
        return self

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch of the next model."""
        model = self.batches % len(self.right)
        self.batches += 1
        right = labels[logits.argmax(1) == labels]
        for counts, found in ((self.right, right), (self.seen, labels)):
            counts[model] += torch.bincount(found.cpu(), minlength=counts.shape[1])

    def compute(self) -> dict[str, Tensor]:
        """Return each client's accuracy, (clients,), on all examples and on its own kind."""
        if self.batches % len(self.right):
            raise RuntimeError(
                f"{self.batches} batches of {len(self.right)} clients: one is missing"
            )
        clients = len(self.shares)
        by_class = (self.right / self.seen.clamp(min=1)).expand(clients, -1)
        overall = (self.right.sum(1) / self.seen.sum(1)).expand(clients)
        tested = self.shares * (self.seen > 0)
        own = (tested * by_class).sum(1) / tested.sum(1)  # NaN: none of its classes is tested
        return {GLOBAL: overall, OWN: own}
