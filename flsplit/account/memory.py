"""What training a part of a model takes: its state, and what a batch leaves for backward."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flsplit.nested import tensors_of
from flsplit.optimizers import UserOptimizer


@dataclass
class Activations:
    """Bytes of what autograd keeps for a backward pass, every storage counted once."""

    seen: dict[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes."""
        return sum(self.seen.values())


@contextmanager
def measuring_activations(
    found: Activations, module: nn.Module, *, active: bool = True
) -> Iterator[None]:
    """Count in ``found`` what autograd keeps inside the block, but for the module's own tensors.

    Nothing is counted unless ``active``.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found.seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks if active else nullcontext():
        yield


def state_bytes(module: nn.Module, optimizer: UserOptimizer | None) -> int:
    """Return the bytes of parameters, buffers, gradients and the optimizer's state."""
    kept: list[Tensor] = [*module.parameters(), *module.buffers()]
    if optimizer is not None:
        kept += [p for group in optimizer.torch.param_groups for p in group["params"]]  # gradients
        kept += tensors_of(optimizer.state())
    return sum(tensor.nbytes for tensor in kept)
