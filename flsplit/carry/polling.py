"""Asking again and again: Flower's grid has no events for what happens to nodes."""

import time
from collections.abc import Iterator


def polling(seconds: float, *, every: float = 0.5) -> Iterator[None]:
    """Come back at once, and then every so many seconds until ``seconds`` are over."""
    deadline = time.monotonic() + seconds
    yield
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(every, left))
        yield
