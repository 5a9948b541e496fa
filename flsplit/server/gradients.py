"""The gradients of one server step: from smashed data and labels, one client's or everybody's.

Everything here computes and changes no weight. BatchNorm's buffers move, as in any forward pass.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flsplit.cut.smashed import (
    CutGradient,
    Smashed,
    as_leaves,
    gradient_of,
    gradients_in,
    learning_in,
)
from flsplit.errors import (
    OF_A_BATCH,
    DataError,
    FlsplitError,
    MethodError,
    NonFiniteError,
    SegmentMismatchError,
    at,
)
from flsplit.finite import all_finite, total_norm
from flsplit.log import logger
from flsplit.losses import Count
from flsplit.nested import cat_rows, described, leaves_of, map_tensors, num_rows, to_device
from flsplit.server.products import (
    Calls,
    ClientGradients,
    KeptGradients,
    LinearRecorder,
    TwiceComputedGradients,
)
from flsplit.server.segment import ServerGradients, ServerSegment
from flsplit.untrained import keeping_buffers


@dataclass(frozen=True)
class ClientBatch:
    """One client's mini-batch at the cut layer, on the server's device.

    Attributes
    ----------
    client : str
        Whose it is.
    smashed : torch.Tensor or Crossing
        Smashed data ``(b, ...)``, or all that crosses where that is more than one tensor.
    labels : nesting of torch.Tensor
        Labels ``(b, ...)``; none, ``(b, 0)``, where they stay with the client.
    num_examples : int
        Size of the client's training data.
    frozen : bool
        Whether the client needs no cut-layer gradient: nothing before the cut is trained.
    """

    client: str
    smashed: Smashed
    labels: Any
    num_examples: int
    frozen: bool = False

    def __len__(self) -> int:
        """Return the number of rows."""
        labels = self.labels
        return labels.size(0) if isinstance(labels, Tensor) and labels.ndim else num_rows(labels)

    def to(self, segment: ServerSegment) -> "ClientBatch":
        """Return the batch on the segment's device."""
        smashed, labels = segment.receive(self.smashed), to_device(self.labels, segment.device)
        if smashed is self.smashed and labels is self.labels:
            return self
        return replace(self, smashed=smashed, labels=labels)

    @property
    def tensor(self) -> Tensor:
        """The smashed data as one tensor.

        Raises
        ------
        MethodError
            If several values cross.
        """
        if isinstance(self.smashed, Tensor):
            return self.smashed
        raise MethodError(
            f"the method computes with smashed data that is one tensor, but "
            f"{len(self.smashed.values)} values cross at this cut; cut where one crosses "
            "(flsplit.cuts lists them), or take a method that works with gradients alone"
        )


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
    leaves = [as_leaves(batch.smashed) for batch in batches]
    try:
        if len(batches) == 1:
            outputs = [segment.forward(leaves[0], batches[0].labels)]
        else:
            pooled = pool([leaf for leaf in leaves if isinstance(leaf, Tensor)], batches)
            outputs = list(torch.split(segment.forward(pooled), list(map(len, batches))))
    except FlsplitError as error:
        raise _blamed(error, batches) from error
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
    asked = iter(with_tails(list(chain.from_iterable(passes)), ask))
    return [
        one.finish(list(islice(asked, len(own))))
        for one, own in zip(computations, passes, strict=True)
    ]


def pooled_gradients(
    segment: ServerSegment, batches: Sequence[ClientBatch], weights: Mapping[str, float]
) -> Computation:
    """Return gradients by one pass over the concatenated smashed data of all clients."""

    def finish(passes: Iterable[Passed]) -> StepGradients:
        (passed,) = passes
        return backward(segment, passed, weights)

    return Computation(map(forward, [segment], [batches]), finish)


def backward(segment: ServerSegment, passed: Passed, weights: Mapping[str, float]) -> StepGradients:
    """Return the gradients of the clients' losses after a forward pass."""
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
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    result._server = list(islice(found, len(segment.parameters)))
    for batch, leaf, own in zip(batches, leaves, learning, strict=True):
        gradients = list(islice(found, len(own)))
        gradient = gradient_of(leaf, gradients, weights[batch.client])
        result.cut_gradients[batch.client] = gradient
    return result


def can_be_pooled(segment: ServerSegment, batches: Sequence[ClientBatch]) -> bool:
    """Tell whether the clients' smashed data can go through the server segment as one batch.

    It has to be tensors with rows of one shape: where several values cross, which of their
    dimensions are rows is not known. And rows must not see each other there, or must do so through
    BatchNorm alone, as they would not in a layout ``(T, b, ...)``. That is tried once for each
    shape of rows, in evaluation mode: together they give what they give one by one.
    """
    if len(batches) == 1:
        return True
    if segment.criterion.argument:  # a model's own loss is a mean over all rows that go in
        return False
    tensors = [one.smashed for one in batches if isinstance(one.smashed, Tensor)]
    kinds = {(one.shape[1:], one.dtype) for one in tensors}
    if len(tensors) < len(batches) or len(kinds) > 1:
        return False
    kind = kinds.pop()
    if kind not in segment.pools:
        problem = _problem_of_pooling(segment, tensors)
        segment.pools[kind] = not problem
        if problem:
            shape = tuple(tensors[0].shape)
            logger.warning(
                "the server segment computes one client at a time: %s of smashed data of shape %s",
                problem,
                shape,
            )
    return segment.pools[kind]


@torch.no_grad()
def _problem_of_pooling(segment: ServerSegment, tensors: Sequence[Tensor]) -> str:
    try:
        with segment.trying():
            pooled = segment.forward(torch.cat(list(tensors)))
            alone = [segment.forward(one) for one in tensors]
    except FlsplitError:
        return ""  # it is said when the step is computed
    if not all(isinstance(output, Tensor) for output in (pooled, *alone)):
        return "the model's output is more than one tensor"
    rows = [len(tensor) for tensor in tensors]
    if len(pooled) != sum(rows) or [len(output) for output in alone] != rows:
        return "the output has not one row for each row"
    one_by_one = torch.cat(alone)
    scale = float(one_by_one.abs().nan_to_num().max()) if one_by_one.numel() else 0.0
    if torch.allclose(pooled, one_by_one, rtol=1e-2, atol=1e-2 * scale, equal_nan=True):
        return ""
    return "it mixes the rows, or they lie in another dimension than the first,"


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
    """Add all of one client's gradients to ``result`` but the server's, which are returned."""
    own = backward(segment, passed, {passed.batches[0].client: 1.0})
    result.losses |= own.losses
    result.counts |= own.counts
    result.logits |= own.logits
    result.cut_gradients |= own.cut_gradients
    result.rows += own.rows
    return own.server_gradients


def named(batches: Sequence[ClientBatch]) -> str:
    """Return whose batches these are, for an error."""
    names = ", ".join(repr(batch.client) for batch in batches)
    return f"client {names}" if len(batches) == 1 else f"clients {names}"


def pool(smashed: Sequence[Tensor], batches: Sequence[ClientBatch]) -> Tensor:
    """Return the clients' smashed data, concatenated.

    Raises
    ------
    SegmentMismatchError
        If one client's differs from another's in more than the number of rows.
    """
    if len(smashed) == 1:
        return smashed[0]
    for tensor, batch in zip(smashed, batches, strict=True):
        if tensor.shape[1:] != smashed[0].shape[1:]:
            raise SegmentMismatchError(
                f"the smashed data of client {batch.client!r} has shape {tuple(tensor.shape)}, "
                f"that of client {batches[0].client!r} {tuple(smashed[0].shape)}: do the clients' "
                "models and inputs differ?"
            )
    return torch.cat(list(smashed))


def pool_labels(batches: Sequence[ClientBatch]) -> Any:
    """Return the clients' labels, concatenated.

    Raises
    ------
    DataError
        If one client's differ from those of most in more than the number of rows; it names it.
    """
    kinds = [
        tuple((place, leaf.shape[1:]) for place, leaf in leaves_of(batch.labels))
        for batch in batches
    ]
    ((usual, _),) = Counter(kinds).most_common(1)
    for kind, batch in zip(kinds, batches, strict=True):
        if kind != usual:
            error = DataError(
                f"labels of {described(batch.labels)} can't be mixed with those of most clients"
            )
            raise _blamed(error, [batch])
    return cat_rows([batch.labels for batch in batches])


def client_loss(segment: ServerSegment, logits: Any, batch: ClientBatch) -> tuple[Tensor, Count]:
    """Return one client's mean loss, and what it counts among others; errors name the client."""
    try:
        return segment.criterion(logits, batch.labels)
    except FlsplitError as error:
        raise _blamed(error, [batch]) from error


def _blamed(error: FlsplitError, batches: Sequence[ClientBatch]) -> FlsplitError:
    """Return the error with the clients' names."""
    if len(batches) == 1 and isinstance(error, OF_A_BATCH):
        error.client = batches[0].client
    return at(named(batches), error)


def culprits(
    server_for: Callable[[str], ServerSegment], batches: Sequence[ClientBatch]
) -> dict[str, FlsplitError]:
    """Return whose batches can't be computed alone, and why; nothing changes by it."""
    found: dict[str, FlsplitError] = {}
    for batch in batches:
        segment = server_for(batch.client)
        try:
            with segment.trying():  # BatchNorm takes one row then
                own = pooled_gradients(segment, [batch], {batch.client: 1.0}).result()
                check_finite(own, segment, [batch], "alone")
        except OF_A_BATCH as error:
            found[batch.client] = error
    return found


def check_finite(
    found: StepGradients, segment: ServerSegment, batches: Sequence[ClientBatch], where: str
) -> None:
    """Raise NonFiniteError if a loss or gradient is NaN or infinite, naming client and step."""
    for client, loss in found.losses.items():
        check_loss(client, loss, where)
        if not all(map(all_finite, gradients_in(found.cut_gradients[client]))):
            raise _not_a_number("cut-layer gradient", client, where)
    if found._server is not None:
        check_server_gradients(found._server, segment, batches, where)


def check_loss(client: str, loss: float, where: str) -> None:
    """Raise NonFiniteError if a client's loss is NaN or infinite."""
    if loss - loss != 0.0:
        raise _not_a_number("loss", client, where)


def _not_a_number(what: str, client: str, where: str) -> NonFiniteError:
    error = NonFiniteError(
        f"{what} of client {client!r} is NaN or infinite ({where}); a smaller learning rate may "
        "help. The server's weights are those of the step before"
    )
    error.client = client
    return error


def check_server_gradients(
    gradients: ServerGradients, segment: ServerSegment, batches: Sequence[ClientBatch], where: str
) -> None:
    """Raise NonFiniteError if a gradient is NaN or infinite, naming whose batch gives it."""
    if not math.isfinite(total_norm(gradients).item()):
        names = [batch.client for batch in batches]
        if len(names) > 1:
            names = _not_finite(segment, batches) or names
        error = NonFiniteError(
            f"a gradient of the server segment is NaN or infinite ({where}, clients "
            f"{', '.join(map(repr, names))}); the server's weights are those of the step before"
        )
        error.client = names[0] if len(names) == 1 else None
        raise error


def _not_finite(segment: ServerSegment, batches: Sequence[ClientBatch]) -> list[str]:
    """Return whose batches alone give gradients that are NaN or infinite."""
    found = []
    for batch in batches:
        part = segment.part_for(batch.client)
        try:
            with keeping_buffers(part.module):
                own = pooled_gradients(part, [batch], {batch.client: 1.0}).result()
        except FlsplitError:  # BatchNorm can't train on one row
            continue
        if not math.isfinite(total_norm(own.server_gradients).item()):
            found.append(batch.client)
    return found
