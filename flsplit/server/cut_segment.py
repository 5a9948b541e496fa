"""One server segment for clients that are cut at different places."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.errors import ConfigError, MethodError
from flsplit.server.client_batch import ClientBatch
from flsplit.server.gradients import AskTails, Computation, StepGradients, results
from flsplit.server.products import (
    KeptGradient,
    KeptGradients,
    as_tensor,
    combine_layer,
    layer_gram,
)
from flsplit.server.segment import ServerGradients, ServerSegment, smashed_dtype
from flsplit.untrained import Buffers


class CutServerSegment(ServerSegment):
    """A server segment from the earliest cut on, of which each client uses what is after its own.

    ``halves`` are the server segments by cut layer. They share their parameters and buffers, and
    the first one has all of them.
    """

    def __init__(
        self, halves: Mapping[str, nn.Module], cut_for: Callable[[str], str], **settings: Any
    ) -> None:
        (first, module), *rest = halves.items()
        super().__init__(module, **settings)
        self._cut_for = cut_for
        self._parts: dict[str, ServerSegment] = {first: self}
        for cut, half in rest:
            self._parts[cut] = _Part(self, half)

    def train(self) -> None:
        """Set all parts to training mode."""
        for part in self._parts.values():
            if not part.module.training:
                part.module.train()

    def part_for(self, client: str) -> ServerSegment:
        """Return what goes on where this client is cut."""
        return self._parts[self._cut_for(client)]


class _Part(ServerSegment):
    """What is left of a server segment after a later cut."""

    def __init__(self, whole: ServerSegment, module: nn.Module) -> None:
        vars(self).update(vars(whole))  # device, loss and optimizer are the same
        self.module = module.to(whole.device).train()
        _share_buffers(whole.module, module)
        self.buffers = Buffers(module)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError(
                "cut: all parameters after the latest cut are frozen (requires_grad=False): there "
                "is nothing to train on the server"
            )
        self._dtype = smashed_dtype(module)
        self.pools = {}


def _share_buffers(whole: nn.Module, part: nn.Module) -> None:
    """Let a buffer that a layer puts another tensor in place of be the same in both."""
    modules = dict(whole.named_modules(remove_duplicate=False))
    for path, module in part.named_modules(remove_duplicate=False):
        of_whole = modules[path]._buffers
        if module._buffers.keys() == of_whole.keys():  # the root may have fewer
            module._buffers = of_whole


Compute = Callable[[ServerSegment, Sequence[ClientBatch]], Computation]

_Layer = dict[int, KeptGradient]
"""A parameter's gradients, by the row of the client or group that leaves it to the server."""


def grouped_by_cut(
    segment: ServerSegment, batches: Sequence[ClientBatch]
) -> list[tuple[ServerSegment, list[ClientBatch]]]:
    """Return the batches of clients that are cut at one place, with what goes on there."""
    groups: dict[int, tuple[ServerSegment, list[ClientBatch]]] = {}
    for batch in batches:
        part = segment.part_for(batch.client)
        groups.setdefault(id(part), (part, []))[1].append(batch)
    return list(groups.values())


def gradients_by_cut(
    segment: ServerSegment,
    batches: Sequence[ClientBatch],
    compute: Compute,
    ask: AskTails | None,
    *,
    means: bool,
) -> StepGradients:
    """Return the gradients of clients that may be cut at different places.

    A parameter's gradient is that of the losses of the clients that leave it to the server.

    ``compute`` does those of clients that are cut at one place. With ``means``, weights are
    renormalised over the clients that leave a parameter to the server, so that it is trained on a
    weighted mean of their losses, as those that all leave to it are.

    MethodError if each client's own gradients were computed with ``low_memory``.
    """
    groups = grouped_by_cut(segment, batches)
    found = results([compute(part, own) for part, own in groups], ask)
    if len(groups) == 1 and groups[0][0] is segment:
        return found[0]
    index = {id(parameter): place for place, parameter in enumerate(segment.parameters)}
    places = [[index[id(parameter)] for parameter in part.parameters] for part, _ in groups]
    result = StepGradients({}, {}, {}, {}, rows=sum(one.rows for one in found))
    for batch in batches:
        name = batch.client
        one = next(one for one in found if name in one.losses)
        result.losses[name], result.logits[name] = one.losses[name], one.logits[name]
        result.cut_gradients[name] = one.cut_gradients[name]
        result.weights[name], result.counts[name] = one.weights[name], one.counts[name]
    if found[0].clients is None:
        server = [one.server_gradients for one in found]
        sums = [sum(one.weights.values()) for one in found]
        layers = _layers(len(index), list(zip(places, server, strict=True)))
        result._server = [_added(layer, _scale(layer, sums) if means else 1.0) for layer in layers]
    else:
        result.clients = _compared(len(index), places, found, list(result.losses), means=means)
    return result


class _ComparedAtCuts(KeptGradients):
    """Gradients that are compared by those parameters that all clients leave to the server."""

    def __init__(self, clients: list[str], layers: list[_Layer], *, means: bool) -> None:
        self.clients = clients
        self._layers, self._means = layers, means

    def of(self, client: str) -> ServerGradients:
        row = self.clients.index(client)
        return [as_tensor(layer.get(row)) for layer in self._layers]

    def gram(self) -> Tensor:
        size = len(self.clients)
        total = torch.zeros(size, size, dtype=torch.float64)
        for layer in self._layers:
            if len(layer) == size:
                total += layer_gram([layer[row] for row in range(size)])
        return total

    def _combined(self, coefficients: Sequence[float]) -> ServerGradients:
        combined = []
        for layer in self._layers:
            scale = _scale(layer, coefficients) if self._means else 1.0
            own = [coefficients[row] * scale for row in layer]
            combined.append(combine_layer(list(layer.values()), own))
        return combined


def _compared(
    size: int,
    places: Sequence[Sequence[int]],
    found: Sequence[StepGradients],
    clients: list[str],
    *,
    means: bool,
) -> _ComparedAtCuts:
    rows: dict[str, tuple[Sequence[int], Sequence[KeptGradient]]] = {}
    for own_places, one in zip(places, found, strict=True):
        if not isinstance(one.clients, KeptGradients):
            raise MethodError(
                "low_memory compares the gradients of clients that are all cut at one place"
            )
        for client, gradients in one.clients.by_client().items():
            rows[client] = own_places, gradients
    return _ComparedAtCuts(clients, _layers(size, [rows[one] for one in clients]), means=means)


def _layers(
    size: int, rows: Sequence[tuple[Sequence[int], Sequence[KeptGradient]]]
) -> list[_Layer]:
    """Return the gradients of each of ``size`` parameters from those by the places of some."""
    layers: list[_Layer] = [{} for _ in range(size)]
    for row, (places, gradients) in enumerate(rows):
        for place, gradient in zip(places, gradients, strict=True):
            layers[place][row] = gradient
    return layers


def _scale(layer: _Layer, weights: Sequence[float]) -> float:
    """Return what makes the weights of those who have the layer add up to the sum of all."""
    own = sum(weights[row] for row in layer)
    return sum(weights) / own if own and len(layer) < len(weights) else 1.0


def _added(layer: _Layer, scale: float) -> Tensor | None:
    total: Tensor | None = None
    for one in layer.values():
        if (gradient := as_tensor(one)) is not None:
            total = gradient if total is None else total + gradient
    return total if total is None or scale == 1.0 else total * scale
