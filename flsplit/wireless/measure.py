"""Measures a model on this device."""

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from flsplit.nested import as_arguments, tensors_of, to_device
from flsplit.wireless.profile import ModelProfile


@dataclass(frozen=True)
class Measured:
    """What a client segment's passes take on this device in training mode, per sample (s)."""

    forward_s: float
    backward_s: float


def measure(
    model: nn.Module, profile: ModelProfile, batch_size: int = 8, repeats: int = 3
) -> dict[str, Measured]:
    """Train the whole model on random data and note when each place is reached, by cut.

    The model's end is among the cuts. The model is trained on the device on which it lies; its
    buffers change, its gradients are cleared. Of ``repeats`` passes after a first one, which
    doesn't count, the fastest of each place does.
    """
    device = next(model.parameters()).device
    args, kwargs = as_arguments(to_device(profile.batch(batch_size), device))
    forward, backward = dict[str, float](), dict[str, float]()  # when a place was last reached

    def returned(name: str, module: nn.Module, args: object, output: object) -> None:
        forward[name] = _now()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: backward.update({name: _now()}))  # type: ignore[no-untyped-call]

    def train() -> dict[str, Measured]:
        backward.clear()
        start = _now()
        output = tensors_of(model(*args, **kwargs))[0]
        middle = _now()
        output.sum().backward()  # type: ignore[no-untyped-call]
        finish = _now()
        found = {
            name: Measured(at - start, finish - backward.get(name, finish))
            for name, at in forward.items()
        }
        return found | {profile.end.cut: Measured(middle - start, finish - middle)}

    names = [place.cut for place in profile.places]
    handles = [
        model.get_submodule(name).register_forward_hook(partial(returned, name)) for name in names
    ]
    model.train()
    try:
        passes = [train() for _ in range(repeats + 1)][1:]
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return {
        cut: Measured(
            min(one[cut].forward_s for one in passes) / batch_size,
            min(one[cut].backward_s for one in passes) / batch_size,
        )
        for cut in passes[0]
    }


def effective_flops(profile: ModelProfile, measured: dict[str, Measured]) -> float:
    """Return the speed (FLOP/s) that the whole model reached, for a fleet's ``compute``."""
    end, took = profile.end, measured[profile.end.cut]
    flops = end.client_flops_forward + end.client_flops_backward
    return flops / (took.forward_s + took.backward_s)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
