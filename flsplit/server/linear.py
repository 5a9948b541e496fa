"""Gradients of Linear layers, kept as the two factors whose product they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Factors:
    """The gradient of a Linear layer's weight, :math:`D^T X`.

    Attributes
    ----------
    outputs : torch.Tensor
        D, the gradient by the layer's output, ``(n, out)`` for n rows.
    inputs : torch.Tensor
        X, what went into the layer, ``(n, in)``.
    """

    outputs: Tensor
    inputs: Tensor

    def tensor(self) -> Tensor:
        """Return the gradient itself, ``(out, in)``."""
        return self.outputs.T @ self.inputs


@dataclass
class _Calls:
    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def factors(self) -> Factors:
        return Factors(torch.cat(self.outputs), torch.cat(self.inputs))


class LinearRecorder:
    """Lets Linear layers keep factors instead of computing their weights' gradients.

    Only where factors are the cheaper: two gradients of n rows are compared in n²(in + out)
    multiplications then, instead of in · out.

    Parameters
    ----------
    module : nn.Module
        What has the layers.
    parameters : sequence of torch.Tensor
        The trainable parameters; other layers are left alone.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        trainable = {id(parameter) for parameter in parameters}
        # A subclass may use its weight in another way, and so may a parametrised layer.
        self._layers = [
            one
            for one in module.modules()
            if type(one) is nn.Linear and id(one.weight) in trainable
        ]
        self._calls: dict[int, _Calls] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward and backward passes of the block."""
        self._calls = {}
        for layer in self._layers:
            layer.forward = self._forward(layer)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward  # the class's is behind it

    def _forward(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            rows = inputs.numel() // layer.in_features
            if rows * rows * (layer.in_features + layer.out_features) > layer.weight.numel():
                return functional.linear(inputs, layer.weight, layer.bias)
            # Autograd sees a constant; what else the weight is used for keeps its gradient.
            output = functional.linear(inputs, layer.weight.detach(), layer.bias)
            if not output.requires_grad:  # of a constant, or without a graph: no hook would run
                return functional.linear(inputs, layer.weight, layer.bias)
            calls = self._calls.setdefault(id(layer.weight), _Calls())
            kept = inputs.detach().clone().reshape(rows, -1)

            def backward(gradient: Tensor) -> None:
                calls.outputs.append(gradient.reshape(rows, -1).to(layer.weight.dtype))
                calls.inputs.append(kept.to(layer.weight.dtype))

            # Of the output as it is before an in-place layer changes it.
            output.register_hook(backward)  # type: ignore[no-untyped-call]
            return output

        return forward

    def gradient(self, parameter: Tensor, other: Tensor | None) -> Tensor | Factors | None:
        """Return a parameter's gradient.

        Parameters
        ----------
        parameter : torch.Tensor
            Whose gradient it is.
        other : torch.Tensor or None
            What autograd found, which lacks what was recorded.
        """
        calls = self._calls.get(id(parameter))
        if calls is None or not calls.outputs:
            return other
        factors = calls.factors()
        return factors if other is None else factors.tensor() + other
