"""flsplit logs where Flower logs, so that ``flwr run --stream`` shows both."""

import logging
import re
import threading
import time

logger = logging.getLogger("flwr")

_said: set[tuple[str, str]] = set()
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def warn_once(run: str, text: str) -> None:
    """Log a warning that every client of a run, and every message, would repeat.

    In another run of the same process it is said again.
    """
    if (run, text) not in _said:
        _said.add((run, text))
        logger.warning("%s", text)


def counted(number: int, what: str) -> str:
    """Return a number of things in words: ``1 host``, ``2 hosts``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def without_colours(text: str) -> str:
    """Return a text without a terminal's escape sequences."""
    return _COLOUR.sub("", text)


class RareLog:
    """Lets the first few lines of each minute through, and then says how many it has kept back.

    For what a stranger or one client can repeat as often as it likes.
    """

    def __init__(self, target: logging.Logger, per_minute: int = 20) -> None:
        self._target = target
        self._per_minute = per_minute
        self._lock = threading.Lock()
        self._since = -60.0
        self._count = 0

    def warning(self, text: str, *arguments: object) -> None:
        """Log a warning, unless there were too many within the last minute."""
        with self._lock:
            now, kept_back = time.monotonic(), 0
            if now - self._since >= 60.0:
                kept_back = max(self._count - self._per_minute, 0)
                self._since, self._count = now, 0
            self._count += 1
            let_through = self._count <= self._per_minute
        if kept_back:
            self._target.warning("%d more like these were kept back", kept_back)
        if let_through:
            self._target.warning(text, *arguments)
