"""The gradients of one server step: from smashed data and labels, one client's or everybody's.

Everything here computes and changes no weight. BatchNorm's buffers move, as in any forward pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flsplit.cut.smashed import CutGradient, Smashed, as_leaves, gradient_of, learning_in
from flsplit.errors import ConfigError, FlsplitError
from flsplit.losses import Count
from flsplit.nested import map_tensors
from flsplit.server.client_batch import ClientBatch, blamed, pool
from flsplit.server.products import (
    Calls,
    ClientGradients,
    KeptGradients,
    LinearRecorder,
    TwiceComputedGradients,
)
from flsplit.server.segment import ServerGradients, ServerSegment


@dataclass
class StepGradients:
    """What one computation of gradients gave; nothing has stepped yet.

    Attributes
    ----------
    losses : dict of str to float
        Each client's mean loss.
    logits : dict of str to torch.Tensor
        Each client's logits ``(b, C)``, detached; of a model that returns more, all of it.
    cut_gradients : dict of str to torch.Tensor, or to dict of str to torch.Tensor
        Gradient of each client's *own mean loss* by its smashed data, of that shape, or by the
        values that cross, by name: a client's
        learning rate means the same with 1 client and with 100. Where BatchNorm sees all clients'
        rows at once a client's rows are in the others' losses, too; then it is the gradient of the
        server's loss over the client's weight.
    weights : dict of str to float
        What each client's mean loss counts in the server's.
    counts : dict of str to Count
        What each client's mean loss counts in a mean over several batches, and what is right.
    rows : int
        Rows that went through the server segment and back.
    clients : ClientGradients or None
        Each client's own gradient of the server segment, where they were asked for.
    """

    losses: dict[str, float]
    logits: dict[str, Any]
    cut_gradients: dict[str, CutGradient]
    weights: dict[str, float]
    rows: int
    counts: dict[str, Count] = field(default_factory=dict)
    clients: ClientGradients | None = None
    _server: ServerGradients | None = None

    @property
    def server_gradients(self) -> ServerGradients:
        """Gradient of Σ_i weights[i] · L_i by the server segment's parameters, in their order."""
        if self._server is None:
            if self.clients is None:
                raise AssertionError("gradients without the server's")
            self._server = self.clients.combine(list(self.weights.values()))
        return self._server


AskTails = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Takes what the server segment of a U-shaped split gives for each client's rows, and returns the
gradients of the clients' own mean losses by it."""


@dataclass(frozen=True)
class Passed:
    """Rows of a client, or of several, that went forward through the server segment."""

    batches: Sequence[ClientBatch]
    leaves: list[Smashed]
    outputs: list[Any]  # each client's


def forward(segment: ServerSegment, batches: Sequence[ClientBatch]) -> Passed:
    """Run the concatenated smashed data of clients through the server segment."""
    leaves = list(map(as_leaves, map(attrgetter("smashed"), batches)))
    try:
        if len(batches) == 1:
            outputs = [segment.forward(leaves[0], batches[0].labels)]
        else:
            pooled = pool([leaf for leaf in leaves if isinstance(leaf, Tensor)], batches)
            sizes = list(map(len, batches))
            # Unsafe only if somebody changed the whole: a loss may change its own client's part.
            outputs = list(torch.unsafe_split_with_sizes(segment.forward(pooled), sizes))
    except FlsplitError as error:
        raise blamed(error, batches) from error
    return Passed(batches, leaves, outputs)


def with_tails(passes: Iterable[Passed], ask: AskTails) -> list[Passed]:
    """Let clients that have the last layers say the gradients, which come in the labels' place.

    All forward passes are done before, so that clients are asked once.
    """
    passes = list(passes)
    outputs = {
        batch.client: output.detach()
        for one in passes
        for batch, output in zip(one.batches, one.outputs, strict=True)
    }
    found = ask(outputs)
    return [
        replace(one, batches=[replace(own, labels=found[own.client]) for own in one.batches])
        for one in passes
    ]


class Computation(NamedTuple):
    """Forward passes, each done when it is needed, and what makes gradients of them."""

    passes: Iterable[Passed]
    finish: Callable[[Iterable[Passed]], StepGradients]

    def result(self, ask: AskTails | None = None) -> StepGradients:
        """Return the gradients."""
        return self.finish(with_tails(self.passes, ask) if ask else self.passes)


def results(computations: Sequence[Computation], ask: AskTails | None) -> list[StepGradients]:
    """Return the gradients of several computations whose clients are asked all at once."""
    if ask is None:
        return [one.result() for one in computations]
    passes = [list(one.passes) for one in computations]
    asked = iter(with_tails(chain.from_iterable(passes), ask))
    return [
        one.finish(list(islice(asked, len(own))))
        for one, own in zip(computations, passes, strict=True)
    ]


def pooled_gradients(
    segment: ServerSegment, batches: Sequence[ClientBatch], weights: Mapping[str, float]
) -> Computation:
    """Return gradients by one pass over the concatenated smashed data of all clients."""
    passes = map(forward, [segment], [batches])
    return Computation(passes, partial(backward, segment, weights))


def backward(
    segment: ServerSegment, weights: Mapping[str, float], passes: Iterable[Passed]
) -> StepGradients:
    """Return the gradients of the clients' losses after a forward pass, the one that is given."""
    (passed,) = passes
    batches, leaves, outputs = passed.batches, passed.leaves, passed.outputs
    learning, terms = list(map(learning_in, leaves)), []
    result = StepGradients({}, {}, {}, dict(weights), rows=sum(map(len, batches)))
    for batch, logits in zip(batches, outputs, strict=True):
        loss, count = client_loss(segment, logits, batch)
        weight = weights[batch.client]
        terms.append(loss if weight == 1.0 else weight * loss)
        result.losses[batch.client], result.counts[batch.client] = loss.item(), count
        result.logits[batch.client] = (
            logits.detach() if isinstance(logits, Tensor) else map_tensors(torch.detach, logits)
        )
    total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
    wanted = [*segment.parameters, *chain.from_iterable(learning)]
    try:
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ConfigError(
                "the server segment calls torch.utils.checkpoint with use_reentrant=True, which "
                "gives no gradient by chosen tensors: pass use_reentrant=False"
            ) from error
        raise
    result._server = list(islice(found, len(segment.parameters)))
    for batch, leaf, own in zip(batches, leaves, learning, strict=True):
        gradients = list(islice(found, len(own)))
        gradient = gradient_of(leaf, gradients, weights[batch.client])
        result.cut_gradients[batch.client] = gradient
    return result


def separate_gradients(
    segment: ServerSegment, batches: Sequence[ClientBatch], weights: Mapping[str, float]
) -> Computation:
    """Return the same by one pass per client: BatchNorm sees one client at a time."""

    def finish(passes: Iterable[Passed]) -> StepGradients:
        result = StepGradients({}, {}, {}, dict(weights), rows=0)
        total: ServerGradients = [None] * len(segment.parameters)
        for passed in passes:
            weight = weights[passed.batches[0].client]
            for index, gradient in enumerate(_add_client(result, segment, passed)):
                if gradient is not None:
                    sum_ = total[index]
                    total[index] = (
                        gradient * weight if sum_ is None else sum_.add_(gradient, alpha=weight)
                    )
        result._server = total
        return result

    return Computation((forward(segment, [batch]) for batch in batches), finish)


def client_gradients(
    segment: ServerSegment,
    batches: Sequence[ClientBatch],
    weights: Mapping[str, float],
    *,
    low_memory: bool = False,
) -> Computation:
    """Return each client's own server gradients, to compare and to combine.

    All are kept, those of large Linear layers as the two factors whose product they are: that
    takes less memory and time, and to combine them costs one matrix product, as a pooled
    backward pass does. With ``low_memory`` they are computed in groups of layers, compared and
    thrown away, and their combination by another backward pass.
    """
    if low_memory:
        passes = (forward(segment, [batch]) for batch in batches)
        return Computation(passes, partial(_twice_computed, segment, weights))
    recorder = LinearRecorder(segment.module, segment.parameters)
    records: list[Calls] = [{} for _ in batches]

    def recorded(batch: ClientBatch, record: Calls) -> Passed:
        with recorder.recording(record):
            return forward(segment, [batch])

    def finish(passes: Iterable[Passed]) -> StepGradients:
        result, kept = StepGradients({}, {}, {}, dict(weights), rows=0), []
        for passed, record in zip(passes, records, strict=True):
            with recorder.recording(record):
                own = _add_client(result, segment, passed)
            pairs = zip(segment.parameters, own, strict=True)
            kept.append([recorder.gradient(parameter, found) for parameter, found in pairs])
        result.clients = KeptGradients([batch.client for batch in batches], kept)
        return result

    return Computation(map(recorded, batches, records), finish)


def _twice_computed(
    segment: ServerSegment, weights: Mapping[str, float], passes: Iterable[Passed]
) -> StepGradients:
    leaves, losses, counts, logits = list[Smashed](), [], {}, {}
    rows = 0
    for passed in passes:
        (batch,), (own,) = passed.batches, passed.outputs
        leaves += passed.leaves
        loss, counts[batch.client] = client_loss(segment, own, batch)
        losses.append(loss)
        logits[batch.client] = map_tensors(torch.detach, own)
        rows += len(batch)
    names = list(logits)
    learning = [learning_in(leaf) for leaf in leaves]
    products = TwiceComputedGradients(names, segment.parameters, losses, learning)
    return StepGradients(
        losses={name: loss.item() for name, loss in zip(names, losses, strict=True)},
        logits=logits,
        cut_gradients={
            name: gradient_of(leaf, found, 1.0)
            for name, leaf, found in zip(names, leaves, products.by_leaves, strict=True)
        },
        weights=dict(weights),
        rows=rows,
        counts=counts,
        clients=products,
    )


def _add_client(result: StepGradients, segment: ServerSegment, passed: Passed) -> ServerGradients:
    own = backward(segment, {passed.batches[0].client: 1.0}, [passed])
    result.losses |= own.losses
    result.counts |= own.counts
    result.logits |= own.logits
    result.cut_gradients |= own.cut_gradients
    result.rows += own.rows
    return own.server_gradients


def client_loss(segment: ServerSegment, logits: Any, batch: ClientBatch) -> tuple[Tensor, Count]:
    """Return one client's mean loss, and what it counts among others; errors name the client."""
    try:
        return segment.criterion(logits, batch.labels)
    except FlsplitError as error:
        raise blamed(error, [batch]) from error
