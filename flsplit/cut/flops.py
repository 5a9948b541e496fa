"""Counts what the modules of a model compute and return, without computing it."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flsplit.cut.cut_errors import CutError

# More than one sample, because BatchNorm may want that, and to recognise the batch dimension.
BATCH = 2


@dataclass
class Profile:
    """What one forward pass of `BATCH` samples did.

    Attributes
    ----------
    total_flops : int
        FLOPs of the whole pass.
    flops : dict of str to int
        FLOPs of the pass up to the return of a module, by the module's name.
    outputs : dict of str to object
        What the modules returned: tensors on the *meta* device, which have no data.
    """

    total_flops: int = 0
    flops: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, object] = field(default_factory=dict)


def profile(model: nn.Module, sample: Tensor, names: Iterable[str]) -> Profile:
    """Profile one forward pass in eval mode on the *meta* device.

    There, and not on the CPU, FlopCounterMode sees what attention computes.

    Parameters
    ----------
    model : nn.Module
        The whole model; a copy of it is run.
    sample : Tensor
        One sample, of which shape and dtype are used.
    names : iterable of str
        The modules to record; each must be called once.

    Returns
    -------
    Profile
        Their FLOPs and outputs.

    Raises
    ------
    CutError
        If the model can't run on the *meta* device or on such a sample.
    """
    recorded = Profile()
    counter = FlopCounterMode(display=False)
    batch = torch.empty((BATCH, *sample.shape), dtype=sample.dtype, device="meta")
    try:
        ghost = _without_data(model).eval()
        for name in names:
            _record(ghost.get_submodule(name), name, counter, recorded)
        # Tensors that a forward makes without saying where must be on the same device.
        with torch.device("meta"), torch.no_grad(), counter:
            ghost(batch)
    except Exception as error:
        raise CutError(
            f"{type(model).__name__} can't be profiled on {BATCH} samples of shape "
            f"{tuple(sample.shape)} and type {sample.dtype}, on the meta device, where tensors "
            f"have shapes but no data: {type(error).__name__}: {error}"
        ) from error
    recorded.total_flops = counter.get_total_flops()
    return recorded


def forward_flops(module: nn.Module, row: Tensor) -> int:
    """Return the FLOPs of one row's forward pass through a module; see `profile`."""
    return profile(module, row, ()).total_flops // BATCH


def _record(module: nn.Module, name: str, counter: FlopCounterMode, recorded: Profile) -> None:
    def hook(module: nn.Module, args: object, output: object) -> None:
        recorded.flops[name] = counter.get_total_flops()
        recorded.outputs[name] = output

    module.register_forward_hook(hook)


def _without_data(model: nn.Module) -> nn.Module:
    """Copy a model to the *meta* device without copying its weights on the way."""
    plain = (value for module in model.modules() for value in vars(module).values())
    attributes = (value for value in plain if isinstance(value, Tensor))
    tensors = chain(model.parameters(), model.buffers(), attributes)
    return copy.deepcopy(model, {id(tensor): _ghost(tensor) for tensor in tensors})


def _ghost(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
