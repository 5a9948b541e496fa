"""Measures a model on this device."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flsplit.wireless.profile import ModelProfile


@dataclass(frozen=True)
class Measured:
    """What a place took on this device, per sample.

    Attributes
    ----------
    forward_s, backward_s : float
        Time (s) of the client segment's passes in training mode, per sample.
    """

    forward_s: float
    backward_s: float


def measure(
    model: nn.Module, profile: ModelProfile, batch_size: int = 8, repeats: int = 3
) -> dict[str, Measured]:
    """Train the whole model on random data and note when each place is reached.

    Parameters
    ----------
    model : nn.Module
        The profiled model, on the device to measure. Its buffers change, its gradients are
        cleared.
    profile : ModelProfile
        Its profile.
    batch_size : int
        Samples per batch.
    repeats : int
        Passes after a first one that doesn't count; the fastest of each place does.

    Returns
    -------
    dict of str to Measured
        By cut; the model's end is among them.
    """
    watch = _Watch(model, [place.cut for place in profile.places])
    device = next(model.parameters()).device
    batch = torch.rand((batch_size, *profile.input_shape), device=device)
    batch = batch.to(profile.input_dtype)  # zeros, where samples are indices
    model.train()
    try:
        passes = [watch.run(batch, profile.end.cut) for _ in range(repeats + 1)][1:]
    finally:
        watch.remove()
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


class _Watch:
    """Notes when modules return, and when their outputs' gradients are there."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._model = model
        self._forward: dict[str, float] = {}
        self._backward: dict[str, float] = {}
        self._handles = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self._returned(name, output)
            )
            for name in names
        ]

    def _returned(self, name: str, output: object) -> None:
        self._forward[name] = _now()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: self._arrived(name))  # type: ignore[no-untyped-call]

    def _arrived(self, name: str) -> None:
        self._backward[name] = _now()

    def run(self, batch: Tensor, end: str) -> dict[str, Measured]:
        """Return what a forward and a backward pass of the batch took up to each place."""
        self._backward.clear()
        start = _now()
        output = self._model(batch)
        middle = _now()
        output.sum().backward()
        finish = _now()
        took = {
            name: Measured(at - start, finish - self._backward.get(name, finish))
            for name, at in self._forward.items()
        }
        return took | {end: Measured(middle - start, finish - middle)}

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
