"""Copies of a model of which some tensors have no data, or made-up ones."""

from typing import Any

import torch
from torch import Tensor, nn

from flsplit.cut.partial_forward import uninstrument
from flsplit.cut.scripted import plain_copy

AWAY = "_away"
"""In a module of one side: the names of the tensors that are the other side's, and whether each is
a persistent buffer; None for parameters."""


def one_side(model: nn.Module, mine: frozenset[str]) -> nn.Module:
    """Return a copy of a model that shares one side's tensors and has the others without data.

    The others can still be reached by the attributes that forward reads. The other side's buffers
    keep their values, which are few: positions and masks, which a look at a new batch needs.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                memo[id(value)] = value if value.is_leaf else value.detach()
    for state in (*model.parameters(), *model.buffers()):
        own = names.get(id(state), ())
        memo[id(state)] = state if not own or not mine.isdisjoint(own) else _ghost(state)
    side = plain_copy(model, memo)
    for path, module in side.named_modules():
        away: dict[str, bool | None] = {}
        for kind in (module._parameters, module._buffers):
            for name, held in list(kind.items()):
                if held is not None and f"{path}.{name}".lstrip(".") not in mine:
                    lasting = name not in module._non_persistent_buffers_set
                    away[name] = None if kind is module._parameters else lasting
                    del kind[name]
                    vars(module)[name] = held
        if away:
            vars(module)[AWAY] = away
    return side


def without_data(model: nn.Module) -> nn.Module:
    """Copy a model to the *meta* device without copying its weights on the way."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = vars(module).values()
        for value in (*own, *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = _ghost(value)
    return plain_copy(model, memo)


def _ghost(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def filled(side: nn.Module, device: torch.device) -> nn.Module:
    """Return a whole model that shares a side's parameters, with made-up weights for the other's.

    Buffers are copies.
    """
    numbers = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {id(parameter): parameter for parameter in side.parameters()}
    for module in side.modules():
        for name in vars(module).get(AWAY, ()):
            value = vars(module)[name]
            memo[id(value)] = _made_up(value, numbers, device)
    model = plain_copy(side, memo)
    for module in model.modules():
        uninstrument(module)
        for name, lasting in vars(module).pop(AWAY, {}).items():
            tensor = vars(module).pop(name)
            if lasting is None:
                module.register_parameter(name, tensor)
            else:
                module.register_buffer(name, tensor, persistent=lasting)
    return model


def _made_up(value: Tensor, numbers: torch.Generator, device: torch.device) -> Tensor:
    if not value.is_meta:
        return value.to(device)
    filled = torch.empty(value.shape, dtype=torch.float32).normal_(0, 0.02, generator=numbers)
    return nn.Parameter(filled.to(device, value.dtype), requires_grad=value.requires_grad)
