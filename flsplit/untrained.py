"""What of a module's state isn't trained: frozen parameters, buffers, and what is made of weights.

Buffers are put back to what they were, and a forward may have changed their shapes: observers of
quantisation-aware training, for one, get their size in the first forward.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@torch.no_grad()
def put(buffer: Tensor, value: Tensor) -> None:
    """Give a buffer a value, of another shape where it must be; it stays the same object."""
    if buffer.shape != value.shape:
        buffer.data = torch.empty_like(value, dtype=buffer.dtype, device=buffer.device)
    buffer.copy_(value)


def put_all(buffers: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Give buffers their values, one by one."""
    for buffer, value in zip(buffers, values, strict=True):
        put(buffer, value)


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load a state dict into a module, whose buffers take the shapes that they have there."""
    own = dict(state)
    for name, buffer in module.named_buffers():
        if name in own:
            if own[name].shape != buffer.shape:
                put(buffer, own[name])
            # Some modules keep what they are given, and resize it later: NumPy's memory can't be.
            own[name] = own[name].clone()
    module.load_state_dict(own, strict=strict)


def names_of_buffers(module: nn.Module) -> frozenset[str]:
    """Return the names of a module's buffers."""
    return frozenset(name for name, _ in module.named_buffers())


def names_of_frozen(module: nn.Module) -> frozenset[str]:
    """Return the names of a module's parameters that nobody trains; tied ones have several."""
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(name for name, p in named if not p.requires_grad)


class Buffers:
    """The buffers of a module and of those in it, found without a walk over all modules.

    What is remembered is where they are: modules may put other tensors in their place.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = [one._buffers for one in module.modules()]

    def __iter__(self) -> Iterator[Tensor]:
        """Go over the buffers that are there now, as ``module.buffers()`` does."""
        found = {}
        for own in self._owners:
            for buffer in own.values():
                if buffer is not None:
                    found[id(buffer)] = buffer
        return iter(found.values())


class _Detaching(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a module, also of one that keeps what it has computed.

    Pruning and torch's older weight and spectral norms keep a weight that they compute anew before
    each forward, others keep features; torch refuses to copy what is no leaf of a graph.
    """
    with _Detaching():
        return copy.deepcopy(module, memo)


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Put the buffers back to what they were at the end of the block."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        put_all(module.buffers(), before)
