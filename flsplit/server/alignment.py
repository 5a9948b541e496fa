"""Alignment: fitting a client's auxiliary model to the server's true cut-layer gradients."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flsplit.auxiliary import cosine, emulated_gradient, keeping_buffers
from flsplit.seeds import seeded
from flsplit.server.segment import ServerSegment


class Buffer:
    """A client's latest uploads, first in, first out.

    Parameters
    ----------
    size : int
        How many samples it keeps.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.smashed: Tensor | None = None
        self.labels: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return 0 if self.smashed is None else len(self.smashed)

    def add(self, smashed: Tensor, labels: Tensor) -> None:
        """Take a batch; forget the oldest samples where there are too many."""
        if self.smashed is not None and self.labels is not None:
            smashed = torch.cat([self.smashed, smashed])
            labels = torch.cat([self.labels, labels])
        self.smashed, self.labels = smashed[-self.size :], labels[-self.size :]


@dataclass(frozen=True)
class Alignment:
    """What an alignment came to.

    Attributes
    ----------
    cosine_before, cosine_after : float
        Between the emulated and the true gradient of the buffer.
    error_before, error_after : float
        Sum of squared errors between the two.
    diverged : bool
        Whether the result was thrown away: an error or a weight that is NaN or infinite, or an
        error larger than before.
    """

    cosine_before: float
    cosine_after: float
    error_before: float
    error_after: float
    diverged: bool


class AlignedAuxiliary:
    """The server's copy of one client's auxiliary model, changed by alignment alone.

    Parameters
    ----------
    module : nn.Module
        The auxiliary model, on the server's device.
    optimizer : callable
        Called as ``optimizer(parameters, lr=…)``; lives as long as the run.
    lr : float
        Its learning rate.
    buffer_size : int
        Samples that the buffer keeps.
    """

    def __init__(
        self, module: nn.Module, optimizer: Callable[..., Optimizer], lr: float, buffer_size: int
    ) -> None:
        self.module = module
        self.optimizer = optimizer([p for p in module.parameters() if p.requires_grad], lr=lr)
        self.buffer = Buffer(buffer_size)
        self.version = 0

    def emulate(self, smashed: Tensor, labels: Tensor) -> Tensor:
        """Return ĝ of a batch; nothing changes."""
        with keeping_buffers(self.module):
            return emulated_gradient(self.module, smashed, labels)

    def align(self, segment: ServerSegment, epochs: int, seed: int) -> Alignment:
        """Label the buffer with the server segment as it is now, and fit the model to that.

        The targets are the gradients of the mean loss over the whole buffer, and so is what they
        are compared with. An epoch is one optimizer step on the whole buffer. If it diverges the
        model and its optimizer are as before.
        """
        smashed, labels = self.buffer.smashed, self.buffer.labels
        if smashed is None or labels is None:
            raise ValueError("an empty buffer can't be aligned on")
        with seeded(seed, segment.device):
            targets = true_gradient(segment, smashed, labels)
            kept = copy.deepcopy((self.module.state_dict(), self.optimizer.state_dict()))
            before = self.emulate(smashed, labels)
            for _ in range(epochs):
                self._fit(smashed, labels, targets)
            after = self.emulate(smashed, labels)
        errors = [float((one - targets).pow(2).sum()) for one in (before, after)]
        tensors = [*self.module.parameters(), *self.module.buffers()]
        finite = all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
        diverged = not (finite and errors[1] <= errors[0])
        if diverged:
            self.module.load_state_dict(kept[0])
            self.optimizer.load_state_dict(kept[1])
            after = before
        else:
            self.version += 1
        return Alignment(
            cosine_before=cosine(before, targets),
            cosine_after=cosine(after, targets),
            error_before=errors[0],
            error_after=errors[1],
            diverged=diverged,
        )

    def _fit(self, smashed: Tensor, labels: Tensor, targets: Tensor) -> None:
        """Do one optimizer step on Σ ‖ĝ − target‖², differentiating ĝ itself."""
        gradient = emulated_gradient(self.module, smashed, labels, create_graph=True)
        error = (gradient - targets).pow(2).sum()
        self.optimizer.zero_grad(set_to_none=True)
        error.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def true_gradient(segment: ServerSegment, smashed: Tensor, labels: Tensor) -> Tensor:
    """Return the cut-layer gradient of the mean loss, in training mode; nothing changes."""
    leaf = smashed.detach().requires_grad_(True)
    segment.module.train()
    with segment.keeping_buffers():
        loss = segment.mean_loss(segment.forward(leaf.clone()), labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient
