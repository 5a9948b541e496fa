"""What each client of a step counts."""

import math
from collections.abc import Sequence

from flsplit.run.options import Shares
from flsplit.server.client_batch import ClientBatch


def client_shares(batches: Sequence[ClientBatch], shares: Shares) -> dict[str, float]:
    """Return the clients' shares λ, renormalised over those in the step so that they sum to 1.

    ``examples`` weighs a client by the size of its training data, ``batch`` by its rows in this
    step (the mean over the concatenated batch), ``equal`` gives all the same.
    """
    sizes: dict[str, float] = {}
    for batch in batches:
        if shares == "examples":
            sizes[batch.client] = batch.num_examples
        else:
            sizes[batch.client] = len(batch) if shares == "batch" else 1
    total = sum(sizes.values())
    for client in sizes:
        sizes[client] /= total
    return sizes


def of_a_sum(shares: dict[str, float]) -> dict[str, float]:
    """Return what each client's mean loss counts where they are summed: λ times their number."""
    return {client: share * len(shares) for client, share in shares.items()}


def ceil_fraction(share: float, count: int) -> int:
    """Return ⌈share·count⌉, not misled by 0.1 · 30 being a little more than 3."""
    return math.ceil(share * count - 1e-9)
