"""A run's ledger as a file: one JSON object per line and round."""

import json
import math
from pathlib import Path
from typing import Any

from flsplit.account.ledger import RoundEntry


class History(list[RoundEntry]):
    """The entries of a run, round by round."""

    def numbers(self) -> list[dict[str, Any]]:
        """Return what must be the same on every carrier: all but measured times and wire bytes."""
        return [entry.numbers() for entry in self]

    def save(self, path: str | Path) -> Path:
        """Write the history to ``path`` (JSON lines) and return the path."""
        path = Path(path)
        path.write_text(
            "".join(json.dumps(entry.to_json(), allow_nan=False) + "\n" for entry in self)
        )
        return path

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read a history file."""
        lines = Path(path).read_text().splitlines()
        return cls(RoundEntry.from_json(json.loads(line)) for line in lines)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the rounds that evaluated ``metric``, and its values."""
        points = [(e.round, e.evaluation[metric]) for e in self if metric in e.evaluation]
        return [r for r, _ in points], [v for _, v in points]

    def bytes_so_far(self) -> list[int]:
        """Return the logical training bytes up to and including each round."""
        total, sums = 0, []
        for entry in self:
            total += entry.traffic.training_bytes
            sums.append(total)
        return sums

    def simulated_so_far(self) -> list[float | None]:
        """Return the simulated time (s) at the end of each round; None where it isn't known.

        After a round without one, which was run without a fleet, there is none.
        """
        total: float | None = 0.0
        times: list[float | None] = []
        for entry in self:
            took = entry.simulated_seconds
            total = None if total is None or took is None else total + took
            times.append(total)
        return times

    def best(self, metric: str) -> float:
        """Return the largest value of ``metric``; NaN if no round evaluated it."""
        return max(self.series(metric)[1], default=math.nan)
