"""A run's ledger as a file: one JSON object per line and round."""

import json
import math
from pathlib import Path
from typing import Any

from flsplit.account.ledger import RoundEntry
from flsplit.errors import ConfigError, FlsplitError, did_you_mean


class BrokenHistoryError(FlsplitError, ValueError):
    """A history file is not what was written: a line is cut short, or is no round's entry."""


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
        """Read a history file.

        Raises
        ------
        BrokenHistoryError
            If a line is no entry: cut short, or changed. File, line and what is wrong are named.
        """
        history = cls()
        for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
            try:
                history.append(RoundEntry.from_json(json.loads(line)))
            except json.JSONDecodeError as error:  # it calls every line the first
                what = f"no JSON ({error.msg.removesuffix(' at')} at character {error.colno})"
                raise BrokenHistoryError(f"{path} is broken: line {number}: {what}") from error
            except (TypeError, ValueError) as error:
                raise BrokenHistoryError(f"{path} is broken: line {number}: {error}") from error
        return history

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the rounds that have ``metric``, and its values; none if nothing was evaluated.

        ``train-loss`` and ``train-accuracy`` are those of training; what the method recorded has
        its own names.

        Raises
        ------
        ConfigError
            If rounds were evaluated and none has this metric; those that there are are named.
        """
        if any(entry.evaluation for entry in self):
            self.check_metric(metric, self.metrics())
        points = [(e.round, found[metric]) for e in self if metric in (found := e.named())]
        return [r for r, _ in points], [v for _, v in points]

    def metrics(self) -> list[str]:
        """Return the names that :meth:`series` takes."""
        return sorted({name for entry in self for name in entry.named()})

    @staticmethod
    def check_metric(metric: str, known: list[str]) -> None:
        """Refuse a metric that is not among those that there are."""
        if metric not in known:
            raise ConfigError(
                f"no round has a metric {metric!r} (there are {', '.join(known)})"
                + did_you_mean(metric, known)
            )

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
        """Return the largest value of ``metric``, see :meth:`series`; NaN if there is none."""
        return max(self.series(metric)[1], default=math.nan)
