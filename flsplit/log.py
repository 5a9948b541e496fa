"""flsplit logs where Flower logs, so that ``flwr run --stream`` shows both."""

import logging

logger = logging.getLogger("flwr")

_said: set[tuple[str, str]] = set()


def warn_once(run: str, text: str) -> None:
    """Log a warning that every client of a run, and every message, would repeat.

    Parameters
    ----------
    run : str
        Names the run; in another one of the same process it is said again.
    text : str
        The warning.
    """
    if (run, text) not in _said:
        _said.add((run, text))
        logger.warning("%s", text)
