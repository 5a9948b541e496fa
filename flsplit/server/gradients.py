"""The gradients of one server step: from smashed data and labels, one client's or everybody's.

Everything here computes and changes no weight. BatchNorm's buffers move, as in any forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flsplit.errors import FlsplitError, NonFiniteError, SegmentMismatchError, at, located
from flsplit.finite import all_finite
from flsplit.server.products import (
    ClientGradients,
    KeptGradients,
    LinearRecorder,
    TwiceComputedGradients,
)
from flsplit.server.segment import ServerGradients, ServerSegment


@dataclass(frozen=True)
class ClientBatch:
    """One client's mini-batch at the cut layer, on the server's device.

    Attributes
    ----------
    client : str
        Whose it is.
    smashed : torch.Tensor
        Smashed data ``(b, ...)``.
    labels : torch.Tensor
        Labels ``(b, ...)``.
    num_examples : int
        Size of the client's training data.
    """

    client: str
    smashed: Tensor
    labels: Tensor
    num_examples: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.smashed)

    def to(self, segment: ServerSegment) -> "ClientBatch":
        """Return the batch on the segment's device, the smashed data in its dtype."""
        smashed, labels = segment.receive(self.smashed), self.labels.to(segment.device)
        if smashed is self.smashed and labels is self.labels:
            return self
        return replace(self, smashed=smashed, labels=labels)


@dataclass
class StepGradients:
    """What one computation of gradients gave; nothing has stepped yet.

    Attributes
    ----------
    losses : dict of str to float
        Each client's mean loss.
    logits : dict of str to torch.Tensor
        Each client's logits ``(b, C)``, detached.
    cut_gradients : dict of str to torch.Tensor
        Gradient of each client's *own mean loss* by its smashed data, of that shape: a client's
        learning rate means the same with 1 client and with 100. Where BatchNorm sees all clients'
        rows at once a client's rows are in the others' losses, too; then it is the gradient of the
        server's loss over the client's weight.
    weights : dict of str to float
        What each client's mean loss counts in the server's.
    rows : int
        Rows that went through the server segment and back.
    clients : ClientGradients or None
        Each client's own gradient of the server segment, where they were asked for.
    """

    losses: dict[str, float]
    logits: dict[str, Tensor]
    cut_gradients: dict[str, Tensor]
    weights: dict[str, float]
    rows: int
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


def pooled_gradients(
    segment: ServerSegment, batches: Sequence[ClientBatch], weights: Mapping[str, float]
) -> StepGradients:
    """Return gradients by one pass over the concatenated smashed data of all clients."""
    leaves, sizes, terms = [], [], []
    for batch in batches:
        leaves.append(batch.smashed.detach().requires_grad_())
        sizes.append(len(batch.smashed))
    result = StepGradients({}, {}, {}, dict(weights), rows=sum(sizes))
    pooled = pool(leaves, batches)
    try:
        outputs = torch.split(segment.forward(pooled), sizes)
    except FlsplitError as error:
        at(named(batches), error)
        raise
    for batch, logits in zip(batches, outputs, strict=True):
        loss = client_loss(segment, logits, batch)
        terms.append(weights[batch.client] * loss)
        result.losses[batch.client] = loss.item()
        result.logits[batch.client] = logits.detach()
    total = torch.stack(terms).sum()
    found = torch.autograd.grad(total, [*segment.parameters, *leaves], allow_unused=True)
    count = len(segment.parameters)
    result._server = list(found[:count])
    for batch, gradient in zip(batches, found[count:], strict=True):
        result.cut_gradients[batch.client] = (
            torch.zeros_like(batch.smashed)
            if gradient is None
            else gradient / weights[batch.client]
        )
    return result


def separate_gradients(
    segment: ServerSegment, batches: Sequence[ClientBatch], weights: Mapping[str, float]
) -> StepGradients:
    """Return the same by one pass per client: BatchNorm sees one client at a time."""
    result = StepGradients({}, {}, {}, dict(weights), rows=0)
    total: ServerGradients = [None] * len(segment.parameters)
    for batch in batches:
        own = _add_client(result, segment, batch)
        for index, gradient in enumerate(own):
            if gradient is not None:
                sum_, weight = total[index], weights[batch.client]
                total[index] = (
                    gradient * weight if sum_ is None else sum_.add_(gradient, alpha=weight)
                )
    result._server = total
    return result


def client_gradients(
    segment: ServerSegment,
    batches: Sequence[ClientBatch],
    weights: Mapping[str, float],
    *,
    low_memory: bool = False,
) -> StepGradients:
    """Return each client's own server gradients, to compare and to combine.

    All are kept, those of large Linear layers as the two factors whose product they are: that
    takes less memory and time, and to combine them costs one matrix product, as a pooled
    backward pass does. With ``low_memory`` they are computed in groups of layers, compared and
    thrown away, and their combination by another backward pass.
    """
    if low_memory:
        return _twice_computed(segment, batches, weights)
    result, kept = StepGradients({}, {}, {}, dict(weights), rows=0), []
    recorder = LinearRecorder(segment.module, segment.parameters)
    for batch in batches:
        with recorder.recording():
            own = _add_client(result, segment, batch)
        pairs = zip(segment.parameters, own, strict=True)
        kept.append([recorder.gradient(parameter, found) for parameter, found in pairs])
    result.clients = KeptGradients([batch.client for batch in batches], kept)
    return result


def _twice_computed(
    segment: ServerSegment, batches: Sequence[ClientBatch], weights: Mapping[str, float]
) -> StepGradients:
    leaves, losses, logits = [], [], {}
    for batch in batches:
        leaf = batch.smashed.detach().requires_grad_()
        with located(named([batch])):
            own = segment.forward(leaf)
        leaves.append(leaf)
        losses.append(client_loss(segment, own, batch))
        logits[batch.client] = own.detach()
    names = [batch.client for batch in batches]
    products = TwiceComputedGradients(names, segment.parameters, losses, leaves)
    return StepGradients(
        losses={name: loss.item() for name, loss in zip(names, losses, strict=True)},
        logits=logits,
        cut_gradients={
            b.client: torch.zeros_like(b.smashed) if g is None else g
            for b, g in zip(batches, products.by_leaves, strict=True)
        },
        weights=dict(weights),
        rows=sum(len(batch) for batch in batches),
        clients=products,
    )


def _add_client(
    result: StepGradients, segment: ServerSegment, batch: ClientBatch
) -> ServerGradients:
    """Add all of one client's gradients to ``result`` but the server's, which are returned."""
    own = pooled_gradients(segment, [batch], {batch.client: 1.0})
    result.losses |= own.losses
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


def client_loss(segment: ServerSegment, logits: Tensor, batch: ClientBatch) -> Tensor:
    """Return one client's mean loss; errors name the client."""
    try:
        return segment.mean_loss(logits, batch.labels)
    except FlsplitError as error:
        at(named([batch]), error)
        raise


def check_finite(
    found: StepGradients, segment: ServerSegment, batches: Sequence[ClientBatch], where: str
) -> None:
    """Raise NonFiniteError if a loss or gradient is NaN or infinite, naming client and step."""
    for client, loss in found.losses.items():
        what = "" if loss - loss == 0.0 else "loss"
        if not what and not all_finite(found.cut_gradients[client]):
            what = "cut-layer gradient"
        if what:
            raise NonFiniteError(
                f"{what} of client {client!r} is NaN or infinite ({where}); a smaller learning "
                "rate may help. The server's weights are those of the step before"
            )
    if found._server is not None:
        check_server_gradients(found._server, segment, batches, where)


def check_server_gradients(
    gradients: ServerGradients, segment: ServerSegment, batches: Sequence[ClientBatch], where: str
) -> None:
    """Raise NonFiniteError if a gradient is NaN or infinite, naming whose batch gives it."""
    if not _all_finite(gradients):
        raise NonFiniteError(
            f"a gradient of the server segment is NaN or infinite ({where}, clients "
            f"{', '.join(map(repr, _culprits(segment, batches)))}); the server's weights are those "
            "of the step before"
        )


def _culprits(segment: ServerSegment, batches: Sequence[ClientBatch]) -> list[str]:
    """Return whose batches alone give gradients that are NaN or infinite; all if none does."""
    found = []
    for batch in batches:
        try:
            with segment.keeping_buffers():
                own = pooled_gradients(segment, [batch], {batch.client: 1.0})
        except FlsplitError:  # BatchNorm can't train on one row
            continue
        if not _all_finite(own.server_gradients):
            found.append(batch.client)
    return found or [batch.client for batch in batches]


def _all_finite(gradients: ServerGradients) -> bool:
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return bool(torch.isfinite(norm))
