"""One client's rows through the server segment after the other's."""

from flsplit.server.linear import LinearRecorder
from flsplit.server.passes.base import (
    GRADIENT_PRODUCTS,
    PER_CLIENT_GRADIENTS,
    ServerPass,
    add_scaled,
)
from flsplit.server.passes.pooled import Pooled
from flsplit.server.products import KeptProducts
from flsplit.server.segment import ServerSegment
from flsplit.server.step import ClientBatch, StepResult


class PerClient(ServerPass):
    """A forward and a backward pass for each client, so that BatchNorm sees one client at a time.

    Parameters
    ----------
    keep_gradients : bool
        Keep each client's server gradients for rules that compare them: as much memory as the
        segment for each client of the step.
    """

    pools = False

    def __init__(self, *, keep_gradients: bool = False) -> None:
        self.keep_gradients = keep_gradients
        self.provides = frozenset(
            {PER_CLIENT_GRADIENTS, GRADIENT_PRODUCTS} if keep_gradients else ()
        )

    def __call__(
        self, segment: ServerSegment, batches: list[ClientBatch], weights: dict[str, float]
    ) -> StepResult:
        """See :class:`ServerPass`."""
        result = _empty(segment)
        for batch in batches:
            own = _add_client(result, segment, batch)
            add_scaled(result.server_gradients, own.server_gradients, weights[batch.client])
            if self.keep_gradients:
                result.client_server_gradients[batch.client] = own.server_gradients
        return result


class PerClientFactored(ServerPass):
    """As :class:`PerClient`, for rules that compare the clients' gradients and combine them.

    The gradients are kept, those of large Linear layers as the two factors whose product they
    are: that takes less memory and time, and combining those of all clients costs one matrix
    product, as a pooled backward pass does.
    """

    provides = frozenset({GRADIENT_PRODUCTS})
    leaves_server_gradients = True
    pools = False

    def __call__(
        self, segment: ServerSegment, batches: list[ClientBatch], weights: dict[str, float]
    ) -> StepResult:
        """See :class:`ServerPass`; ``server_gradients`` are left to the rule that combines."""
        result, kept = _empty(segment), []
        recorder = LinearRecorder(segment.module, segment.parameters)
        for batch in batches:
            with recorder.recording():
                own = _add_client(result, segment, batch)
            pairs = zip(segment.parameters, own.server_gradients, strict=True)
            kept.append([recorder.gradient(parameter, found) for parameter, found in pairs])
        result.products = KeptProducts(kept)
        return result


def _empty(segment: ServerSegment) -> StepResult:
    return StepResult({}, {}, [None] * len(segment.parameters), {}, rows=0)


def _add_client(result: StepResult, segment: ServerSegment, batch: ClientBatch) -> StepResult:
    """Compute one client's gradients and add all but the server's to ``result``."""
    own = Pooled()(segment, [batch], {batch.client: 1.0})
    result.losses |= own.losses
    result.logits |= own.logits
    result.cut_gradients |= own.cut_gradients
    result.rows += own.rows
    return own
