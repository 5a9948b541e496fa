"""The private names of torch that cutting needs, all in one place.

A segment runs the model's own forward, of which only one stretch computes. For that, calls are
watched (`TorchFunctionMode`, public) and tensors stand in for others (`swap_tensors`, public).
Eight things have no public name: a tensor without data that takes part in no dispatch, a block in
which the watching rests, the stack of watchers, what `torch.vmap` has wrapped, whether there are
hooks for all modules, for what autograd saves, and of a tensor, and what `torch.cond` is. Tried
with torch 2.6 to 2.13. Where one of them changes, this module is what has to.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunction, _disabled_torch_function_impl
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._ops import HigherOrderOperator
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

__all__ = [
    "HigherOrderOperator",
    "Unseen",
    "bare",
    "gradient_hooks",
    "has_any_global_hook",
    "has_saving_hooks",
    "is_innermost",
    "no_torch_function",
    "tree_leaves",
    "wrapper",
]

Unseen = DisableTorchFunction
"""A block whose calls no watcher sees."""

has_any_global_hook = _has_any_global_hook
"""Tell whether somebody registered a hook for the calls of all modules."""

no_torch_function = _disabled_torch_function_impl
"""The ``__torch_function__`` of a class whose tensors are treated as plain ones."""


def has_saving_hooks() -> bool:
    """Tell whether anybody takes what autograd saves for the backward pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def wrapper(cls: type, spec: Any, device: torch.device) -> Any:
    """Return a tensor of class `cls` that has a shape and no data."""
    return Tensor._make_wrapper_subclass(
        cls,
        spec.shape,
        strides=spec.stride,
        dtype=spec.dtype,
        device=device,
        requires_grad=spec.grad,
    )


def bare(tensor: Tensor) -> Tensor:
    """Return what `torch.vmap` and the like have wrapped."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def gradient_hooks(tensor: Tensor) -> list[str]:
    """Return by which of a tensor's methods somebody has registered hooks of its gradient."""
    kinds = {
        "register_hook": tensor._backward_hooks,
        "register_post_accumulate_grad_hook": tensor._post_accumulate_grad_hooks,
    }
    return [name for name, hooks in kinds.items() if hooks]


def is_innermost(mode: object) -> bool:
    """Tell whether `mode` was entered last and not left yet."""
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return bool(stack) and stack[-1] is mode
