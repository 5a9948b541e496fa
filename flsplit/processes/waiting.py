"""Free ports, and waiting with a deadline."""

import contextlib
import socket
from collections.abc import Callable
from typing import TypeVar

from flsplit.carry.polling import polling

START_TIMEOUT = 180.0  # seconds for a SuperLink or SuperNode to come up, on a busy machine
RUN_TIMEOUT = 600.0  # seconds after which a run is taken to hang, unless told otherwise
POLL = 0.05

T = TypeVar("T")


def free_ports(count: int) -> list[int]:
    """Return ports of this machine's loopback interface that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(ask: Callable[[], T | None], what: str, timeout: float, poll: float = POLL) -> T:
    """Call `ask` until it returns something true, and return that.

    TimeoutError if that took longer than `timeout` seconds.
    """
    for _ in polling(timeout, every=poll):
        if answer := ask():
            return answer
    raise TimeoutError(f"waited {timeout:g} s for {what}")
