"""What goes into the server's part of one step, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from flsplit.server.segment import Gradients, ServerSegment

Shares = Literal["examples", "batch", "equal"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class ClientBatch:
    """One client's mini-batch at the cut layer, on the server's device.

    Attributes
    ----------
    client : str
        Whose it is.
    smashed : torch.Tensor
        Smashed data ``(b, ...)``.
    labels : torch.Tensor
        Labels ``(b, ...)``.
    num_examples : int
        Size of the client's training data.
    """

    client: str
    smashed: Tensor
    labels: Tensor
    num_examples: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.smashed)

    def to(self, segment: ServerSegment) -> "ClientBatch":
        """Return the batch on the segment's device, the smashed data in its dtype."""
        return replace(
            self, smashed=segment.receive(self.smashed), labels=self.labels.to(segment.device)
        )


@dataclass(frozen=True)
class StepContext:
    """Where in the run a step is; what gradient rules may depend on.

    Attributes
    ----------
    client_ids : tuple of str
        The clients in the step, in their fixed order.
    shares : dict of str to float
        Their shares λ, which sum to 1 over the step.
    round, num_rounds : int
        The round (from 1) and how many there are.
    step : int
        The step in the round (from 0).
    progress : float
        From 0 at the run's first step towards 1 at its end.
    rng : numpy.random.Generator
        Random numbers for this step, from the run's seed.
    """

    client_ids: tuple[str, ...]
    shares: dict[str, float]
    round: int
    num_rounds: int
    step: int
    progress: float
    rng: np.random.Generator


class GradientProducts(Protocol):
    """Compares and combines per-client server gradients :math:`g_i`, in the clients' order."""

    def gram(self) -> Tensor:
        """Return the float64 matrix ``(S, S)`` of inner products, on the CPU."""
        ...

    def combine(self, coefficients: Sequence[float], into: Gradients) -> Gradients:
        """Return Σ_i coefficients[i] · g_i; the tensors in ``into`` may be overwritten."""
        ...


@dataclass
class StepResult:
    """What a server pass computed, before the optimizer steps; gradient rules edit it.

    Attributes
    ----------
    losses : dict of str to float
        Each client's mean loss.
    logits : dict of str to torch.Tensor
        Each client's logits ``(b, C)``, detached.
    server_gradients : Gradients
        Gradient of the weighted loss by the server segment's parameters.
    client_server_gradients : dict of str to Gradients
        The same of each client's own mean loss; empty unless the pass keeps them.
    cut_gradients : dict of str to torch.Tensor
        Gradient of each client's own mean loss by its smashed data, of that shape.
    rows : int
        Rows that were back-propagated through the server segment.
    skipped : set of str
        Clients that are not to step.
    shared_rows : dict of str to int
        How many leading rows of a client's gradient it shares with others of the step.
    repeated : set of str
        Clients whose shared rows are all one row, which goes over a broadcast channel once.
    server_lr_factor : float
        What the server's learning rate is multiplied with in this step.
    products : GradientProducts or None
        Compares and combines per-client server gradients that are not kept.
    metrics : dict of str to float
        What a rule wants to see in the ledger.
    """

    losses: dict[str, float]
    logits: dict[str, Tensor]
    server_gradients: Gradients
    cut_gradients: dict[str, Tensor]
    rows: int
    client_server_gradients: dict[str, Gradients] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    shared_rows: dict[str, int] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    server_lr_factor: float = 1.0
    products: GradientProducts | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def client_shares(batches: list[ClientBatch], shares: Shares) -> dict[str, float]:
    """Return the clients' shares λ, renormalised over those in the step so that they sum to 1.

    ``examples`` weighs a client by the size of its training data, ``batch`` by its rows in this
    step (the mean over the concatenated batch), ``equal`` gives all the same.
    """
    sizes = {
        "examples": [batch.num_examples for batch in batches],
        "batch": [len(batch) for batch in batches],
        "equal": [1] * len(batches),
    }[shares]
    total = sum(sizes)
    return {batch.client: size / total for batch, size in zip(batches, sizes, strict=True)}


def loss_weights(shares: dict[str, float], reduction: Reduction) -> dict[str, float]:
    """Return what each client's mean loss is multiplied with in the server's loss.

    ``mean`` gives Σ λ_i L_i. ``sum`` gives S times that, for S clients: with equal shares Σ L_i.
    """
    factor = 1 if reduction == "mean" else len(shares)
    return {client: share * factor for client, share in shares.items()}


def count_correct(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Return how many rows are classified correctly, and how many there are to classify.

    There are none unless logits are ``(b, C)`` and labels ``(b,)`` class indices.
    """
    if logits.ndim != 2 or labels.ndim != 1 or labels.is_floating_point():
        return 0, 0
    return int((logits.argmax(1) == labels).sum()), len(labels)
