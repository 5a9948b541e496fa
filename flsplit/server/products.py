"""The clients' own gradients of the server segment: compared, combined, and kept small."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.errors import MethodError
from flsplit.server.segment import ServerGradients

BLOCK = 1 << 15
"""So many elements of every client's gradient are in float64 at a time."""

GROUPS = 2
"""Into so many groups of layers gradients that are computed twice are divided."""


class ClientGradients(ABC):
    """The gradients g_i of each client's own mean loss by the server segment's parameters.

    ``clients`` are in the order of the matrix and the coefficients.
    """

    clients: list[str]

    @abstractmethod
    def gram(self) -> Tensor:
        """Return the float64 matrix ``(S, S)`` of inner products ⟨g_i, g_j⟩, on the CPU."""

    def combine(self, coefficients: Sequence[float] | Mapping[str, float]) -> ServerGradients:
        """Return Σ_i coefficients[i] · g_i, a gradient per parameter.

        Coefficients are in the order of ``clients``, or by client.

        MethodError if there is not one for each.
        """
        named = isinstance(coefficients, Mapping)
        if len(coefficients) != len(self.clients) or (named and {*coefficients} != {*self.clients}):
            given = list(coefficients) if named else f"{len(coefficients)}"
            raise MethodError(
                f"combine was given coefficients for {given} clients, expected one for each of "
                f"{self.clients}"
            )
        if isinstance(coefficients, Mapping):
            coefficients = [coefficients[client] for client in self.clients]
        return self._combined(coefficients)

    @abstractmethod
    def _combined(self, coefficients: Sequence[float]) -> ServerGradients:
        """Return what :meth:`combine` does."""


class KeptGradients(ClientGradients):
    """Gradients that are all in memory."""

    def __init__(self, clients: list[str], gradients: "Sequence[Sequence[KeptGradient]]") -> None:
        self.clients = clients
        self._gradients = gradients

    def by_client(self) -> "dict[str, Sequence[KeptGradient]]":
        """Return each client's gradients, in the parameters' order."""
        return dict(zip(self.clients, self._gradients, strict=True))

    def of(self, client: str) -> ServerGradients:
        """Return one client's gradient, a tensor (or None) per parameter."""
        return [as_tensor(one) for one in self._gradients[self.clients.index(client)]]

    def gram(self) -> Tensor:
        """Accumulate layer by layer, block by block."""
        size = len(self._gradients)
        total = torch.zeros(size, size, dtype=torch.float64)
        for layer in zip(*self._gradients, strict=True):
            total += layer_gram(layer)
        return total

    def _combined(self, coefficients: Sequence[float]) -> ServerGradients:
        """Combine layer by layer."""
        layers = zip(*self._gradients, strict=True)
        return [combine_layer(layer, coefficients) for layer in layers]


class TwiceComputedGradients(ClientGradients):
    """Gradients that are compared and combined without all being in memory.

    The clients' graphs stay alive. Gradients are computed for one group of layers at a time,
    compared, and thrown away. The groups go from the last layers to the first, so all but one of
    these backward passes are partial; when the combination is known, one more computes it.

    ``leaves`` are the clients' smashed data in the graph, as far as it collects gradients.
    """

    def __init__(
        self,
        clients: list[str],
        parameters: Sequence[Tensor],
        losses: list[Tensor],
        leaves: list[list[Tensor]],
    ) -> None:
        self.clients = clients
        self._parameters, self._losses = parameters, losses
        self._gram = torch.zeros(len(losses), len(losses), dtype=torch.float64)
        self.by_leaves: list[tuple[Tensor | None, ...]] = []
        """Gradients by ``leaves``, from the last backward pass."""
        groups = grouped(parameters, GROUPS)
        for number, group in enumerate(groups):
            gradients: list[tuple[Tensor | None, ...]] = []
            is_last = number == len(groups) - 1
            for loss, own in zip(losses, leaves, strict=True):
                found = torch.autograd.grad(
                    loss, [*group, *(own if is_last else [])], retain_graph=True, allow_unused=True
                )
                gradients.append(found[: len(group)])
                if is_last:
                    self.by_leaves.append(found[len(group) :])
            for layer in zip(*gradients, strict=True):
                self._gram += layer_gram(layer)

    def gram(self) -> Tensor:
        """Return what was accumulated group by group."""
        return self._gram

    def _combined(self, coefficients: Sequence[float]) -> ServerGradients:
        """Combine by one backward pass; the graphs are gone then."""
        pairs = [(c, loss) for c, loss in zip(coefficients, self._losses, strict=True) if c]
        self._losses = []
        if not pairs:
            return [None] * len(self._parameters)
        total = torch.stack([c * loss for c, loss in pairs]).sum()
        return list(torch.autograd.grad(total, self._parameters, allow_unused=True))


def grouped(parameters: Sequence[Tensor], groups: int) -> list[list[Tensor]]:
    """Return the parameters in groups of about equal size, the last layers first."""
    target = sum(p.numel() for p in parameters) / groups
    found: list[list[Tensor]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if found[-1] and size >= target * len(found) and len(found) < groups:
            found.append([])
        found[-1].append(parameter)
        size += parameter.numel()
    return found


@dataclass(frozen=True)
class Factors:
    """The gradient of a Linear layer's weight, :math:`D^T X`."""

    outputs: Tensor  # D, the gradient by the layer's output, ``(n, out)`` for n rows
    inputs: Tensor  # X, what went into the layer, ``(n, in)``

    def tensor(self) -> Tensor:
        """Return the gradient itself, ``(out, in)``."""
        return self.outputs.T @ self.inputs


KeptGradient = Tensor | Factors | None
"""One client's gradient of one parameter."""


def layer_gram(layer: Sequence[KeptGradient]) -> Tensor:
    """Return the inner products of one layer's gradients ``(S, S)``; None counts as zeros."""
    if factors := _all_factors(layer):
        return _factors_gram(factors)
    return _tensors_gram([as_tensor(one) for one in layer])


def _all_factors(layer: Sequence[KeptGradient]) -> list[Factors]:
    factors = [one for one in layer if isinstance(one, Factors)]
    return factors if len(factors) == len(layer) else []


def as_tensor(gradient: KeptGradient) -> Tensor | None:
    """Return one client's gradient itself."""
    return gradient.tensor() if isinstance(gradient, Factors) else gradient


def _factors_gram(factors: list[Factors]) -> Tensor:
    r"""Return :math:`\langle D_i^T X_i, D_j^T X_j \rangle`.

    That is the sum over rows p of i and q of j of :math:`(D_p \cdot D_q)(X_p \cdot X_q)`.
    """
    outputs = _tensors_gram(list(torch.cat([one.outputs for one in factors])))
    inputs = _tensors_gram(list(torch.cat([one.inputs for one in factors])))
    owner = torch.tensor([i for i, one in enumerate(factors) for _ in one.inputs])
    sums = torch.zeros(len(factors), len(owner), dtype=torch.float64)
    sums.index_add_(0, owner, outputs * inputs)
    total = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    return total.index_add_(1, owner, sums)


def _tensors_gram(layer: Sequence[Tensor | None]) -> Tensor:
    size = len(layer)
    total = torch.zeros(size, size, dtype=torch.float64)
    present = [index for index, gradient in enumerate(layer) if gradient is not None]
    if not present:
        return total
    flat = [(g.to_dense() if g.is_sparse else g).reshape(-1) for g in layer if g is not None]
    columns, device = flat[0].numel(), flat[0].device
    found = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=device)
    exact = torch.empty(len(flat), min(BLOCK, columns), dtype=torch.float64, device=device)
    for start in range(0, columns, BLOCK):
        block = exact[:, : columns - start]
        for row, gradient in zip(block, flat, strict=True):
            row.copy_(gradient[start : start + BLOCK])
        found.addmm_(block, block.T)
    index = torch.tensor(present)
    total[index[:, None], index] = found.cpu()
    return total


def combine_layer(layer: Sequence[KeptGradient], coefficients: Sequence[float]) -> Tensor | None:
    """Return Σ_i coefficients[i] · g_i of one layer's gradients; None counts as zeros."""
    if factors := _all_factors(layer):
        return _combine_factors(factors, coefficients)
    pairs = zip(coefficients, map(as_tensor, layer), strict=True)
    terms = [(c, g) for c, g in pairs if g is not None and c]
    if not terms:
        return None
    (first, gradient), *rest = terms
    total = gradient * first
    for coefficient, gradient in rest:
        total.add_(gradient, alpha=coefficient)
    return total


def _combine_factors(factors: list[Factors], coefficients: Sequence[float]) -> Tensor | None:
    """Return Σ_i c_i · Dᵢᵀ Xᵢ by one matrix product over the rows of all clients that count."""
    terms = [(c, one) for c, one in zip(coefficients, factors, strict=True) if c]
    if not terms:
        return None
    outputs = torch.cat([c * one.outputs for c, one in terms])
    return Factors(outputs, torch.cat([one.inputs for _, one in terms])).tensor()


@dataclass
class _Calls:
    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def factors(self) -> Factors:
        return Factors(torch.cat(self.outputs), torch.cat(self.inputs))


Calls = dict[int, _Calls]
"""What is recorded of the passes of one client, by layer."""


class LinearRecorder:
    """Lets Linear layers keep factors instead of computing their weights' gradients.

    Only where factors are the cheaper: two gradients of n rows are compared in n²(in + out)
    multiplications then, instead of in · out.

    Layers of which the weight is none of ``parameters`` are left alone.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        trainable = {id(parameter) for parameter in parameters}
        # A subclass may use its weight in another way, and so may a parametrised layer.
        self._layers = [
            one
            for one in module.modules()
            if type(one) is nn.Linear and id(one.weight) in trainable
        ]
        self._calls: Calls = {}

    @contextmanager
    def recording(self, calls: Calls) -> Iterator[None]:
        """Record the forward and backward passes of the block; a second block may go on."""
        self._calls = calls
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

        ``other`` is what autograd found, which lacks what was recorded.
        """
        calls = self._calls.get(id(parameter))
        if calls is None or not calls.outputs:
            return other
        factors = calls.factors()
        return factors if other is None else factors.tensor() + other
