"""One client's rows through the server segment after the other's."""

from flsplit.errors import ConfigError
from flsplit.server.passes.base import (
    GRADIENT_PRODUCTS,
    PER_CLIENT_GRADIENTS,
    ServerPass,
    add_scaled,
)
from flsplit.server.passes.pooled import Pooled
from flsplit.server.segment import ServerSegment
from flsplit.server.step import ClientBatch, StepResult


class PerClient(ServerPass):
    """A forward and a backward pass for each client, so that BatchNorm sees one client at a time.

    Parameters
    ----------
    keep_gradients : bool
        Keep each client's server gradients for rules that compare them: as much memory as the
        segment for each client of the step.
    add_up : bool
        Add the gradients up, too. Without, that is left to a rule that combines those kept.

    Raises
    ------
    ConfigError
        If gradients are neither kept nor added up.
    """

    def __init__(self, *, keep_gradients: bool = False, add_up: bool = True) -> None:
        if not (keep_gradients or add_up):
            raise ConfigError(
                "PerClient with keep_gradients=False and add_up=False: nothing is left"
            )
        self.keep_gradients, self.add_up = keep_gradients, add_up
        self.leaves_server_gradients = not add_up
        self.provides = frozenset(
            {PER_CLIENT_GRADIENTS, GRADIENT_PRODUCTS} if keep_gradients else ()
        )

    def __call__(
        self, segment: ServerSegment, batches: list[ClientBatch], weights: dict[str, float]
    ) -> StepResult:
        """See :class:`ServerPass`."""
        result = StepResult({}, {}, [None] * len(segment.parameters), {}, rows=0)
        for batch in batches:
            own = Pooled()(segment, [batch], {batch.client: 1.0})
            result.losses |= own.losses
            result.logits |= own.logits
            result.cut_gradients |= own.cut_gradients
            result.rows += own.rows
            if self.add_up:
                add_scaled(result.server_gradients, own.server_gradients, weights[batch.client])
            if self.keep_gradients:
                result.client_server_gradients[batch.client] = own.server_gradients
        return result
