"""A trace: who was busy with what from when to when, as JSON lines.

Times are those of the machine's monotonic clock, which on Linux all processes share.
"""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any


class Trace:
    """Writes spans of one process to a file.

    Parameters
    ----------
    path : Path
        The file; what is in it stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, what: str, server_round: int, began: float, **more: Any) -> None:
        """Write down what began at ``began`` and ends now."""
        span = {"what": what, "round": server_round, "began": began, "ended": time.monotonic()}
        with self._path.open("a") as file:
            file.write(json.dumps(span | more) + "\n")


class Arrivals(logging.Handler):
    """Notes when messages arrive over a session's streams, on the threads that receive them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[tuple[float, str]] = []
        """Time and node."""
        logger = logging.getLogger("flsplit.wire.link")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Take note."""
        if found := re.match(r"host (\S+): message \d+ has arrived", record.getMessage()):
            self.seen.append((time.monotonic(), found[1]))
