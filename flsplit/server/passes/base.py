"""What all server passes have in common."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flsplit.errors import SegmentMismatchError, located
from flsplit.server.segment import Gradients, Loss, ServerSegment
from flsplit.server.step import ClientBatch, StepResult

PER_CLIENT_GRADIENTS = "per-client server gradients"
"""Each client's gradient of the server segment is in the result."""

GRADIENT_PRODUCTS = "inner products of per-client server gradients"
"""Per-client server gradients can be compared and combined, whether or not they are kept."""

SHARED_ROWS = "cut-layer gradient rows that clients share"
"""Clients share rows of their cut-layer gradients already."""


class ServerPass(ABC):
    """Computes a step's gradients.

    Attributes
    ----------
    provides : frozenset of str
        What gradient rules may need, or may be unable to work with, and this pass offers.
    leaves_server_gradients : bool
        Whether the server gradients are None until a rule combines the clients'.
    across_clients : bool
        Whether the pass needs several clients in a step.
    pools : bool
        Whether the clients' smashed data go through the segment together, and so must have rows of
        one shape.
    """

    provides: frozenset[str] = frozenset()
    leaves_server_gradients: bool = False
    across_clients: bool = False
    pools: bool = True

    @abstractmethod
    def __call__(
        self, segment: ServerSegment, batches: list[ClientBatch], weights: dict[str, float]
    ) -> StepResult:
        """Return the gradients of Σ_i weights[i] · L_i, L_i the mean loss of client i.

        Cut-layer gradients are divided by the client's weight: without BatchNorm across clients
        that is the gradient of its own mean loss, so that a client's learning rate means the
        same with 1 client and with 100.
        """

    def check_loss(self, loss: Loss) -> None:  # noqa: B027 - most take any loss
        """Raise ConfigError if the pass can't work with ``loss``, as far as that can be known."""


def named(batches: list[ClientBatch]) -> str:
    """Return whose batches these are, for an error."""
    names = ", ".join(repr(batch.client) for batch in batches)
    return f"client {names}" if len(batches) == 1 else f"clients {names}"


def pool(smashed: list[Tensor], batches: list[ClientBatch]) -> Tensor:
    """Return the clients' smashed data, concatenated.

    Raises
    ------
    SegmentMismatchError
        If one client's differs from another's in more than the number of rows.
    """
    for tensor, batch in zip(smashed, batches, strict=True):
        if tensor.shape[1:] != smashed[0].shape[1:]:
            raise SegmentMismatchError(
                f"the smashed data of client {batch.client!r} has shape {tuple(tensor.shape)}, "
                f"that of client {batches[0].client!r} {tuple(smashed[0].shape)}: do the clients' "
                "models and inputs differ?"
            )
    return torch.cat(smashed) if len(smashed) > 1 else smashed[0]


def client_loss(segment: ServerSegment, logits: Tensor, batch: ClientBatch) -> Tensor:
    """Return one client's mean loss; errors name the client."""
    with located(named([batch])):
        return segment.mean_loss(logits, batch.labels)


def weighted_sum(losses: list[Tensor], weights: list[float]) -> Tensor:
    """Return Σ weights[i] · losses[i]."""
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()


def own_gradient(gradient: Tensor | None, batch: ClientBatch, weights: dict[str, float]) -> Tensor:
    """Return the gradient of the client's own mean loss; zeros if that doesn't depend on it."""
    if gradient is None:
        return torch.zeros_like(batch.smashed)
    return gradient / weights[batch.client]


def add_scaled(total: Gradients, gradients: Gradients, factor: float) -> None:
    """Add ``factor`` times ``gradients`` to ``total``, in place."""
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            so_far = total[index]
            total[index] = (
                gradient * factor if so_far is None else so_far.add_(gradient, alpha=factor)
            )
