"""Server passes: from smashed data and labels to gradients, in one of several ways.

A pass computes; it changes no weight. BatchNorm buffers move, as in any forward pass.
"""

from flsplit.server.passes.base import (
    GRADIENT_PRODUCTS,
    PER_CLIENT_GRADIENTS,
    SHARED_ROWS,
    ServerPass,
    pool,
)
from flsplit.server.passes.per_client import PerClient, PerClientFactored
from flsplit.server.passes.pooled import Pooled
from flsplit.server.passes.products import PerClientProducts
from flsplit.server.passes.replay import Replay
from flsplit.server.passes.shared_delta import SharedDelta

__all__ = [
    "GRADIENT_PRODUCTS",
    "PER_CLIENT_GRADIENTS",
    "SHARED_ROWS",
    "PerClient",
    "PerClientFactored",
    "PerClientProducts",
    "Pooled",
    "Replay",
    "ServerPass",
    "SharedDelta",
    "pool",
]
