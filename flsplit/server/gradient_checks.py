"""What isn't finite in the gradients of a step, and whose batch is the cause."""

import math
from collections.abc import Callable, Sequence

from flsplit.cut.smashed import gradients_in
from flsplit.errors import OF_A_BATCH, FlsplitError, NonFiniteError
from flsplit.finite import all_finite, total_norm
from flsplit.server.client_batch import ClientBatch
from flsplit.server.gradients import StepGradients, pooled_gradients
from flsplit.server.segment import ServerGradients, ServerSegment
from flsplit.untrained import keeping_buffers


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
        if not math.isfinite(loss):
            raise not_a_number("loss", client, where)
        if not all(map(all_finite, gradients_in(found.cut_gradients[client]))):
            raise not_a_number("cut-layer gradient", client, where)
    if found._server is not None:
        check_server_gradients(found._server, segment, batches, where)


def not_a_number(what: str, client: str, where: str) -> NonFiniteError:
    """Return the error for something of a client's that is NaN or infinite."""
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
