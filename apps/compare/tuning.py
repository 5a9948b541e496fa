"""Learning rates: which points are tried, and which is taken.

Two stages. All points of a method's grid are *screened* in short runs with one seed. The best
three are run longer, with two other seeds, which *decide*. Where the best point is at an end of
its grid in either stage, the grid is widened there by the step that it has, and goes on. Both
judge on validation examples; the seeds are not those of the results.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from flsplit.errors import ConfigError

Rates = dict[str, float]
Grid = Mapping[str, Sequence[float]]

RATES = ("client_lr", "server_lr", "alpha", "lr")
FINALISTS = 3
WIDENINGS = 3
"""So often a stage widens a grid; a rate that is still at an end is marked."""

Score = Callable[[Rates], Sequence[float] | None]
"""A point's accuracies by seed; None where it has not been tried, empty where it diverged."""


@dataclass(frozen=True)
class Choice:
    """What tuning came to.

    Attributes
    ----------
    rates : dict of str to float
        The point that is taken.
    points : list of dict
        All that were screened or decided on.
    scores : list of float
        Its validation accuracy in percent, by deciding seed.
    lead : list of float
        How much it was above the second best, by deciding seed; empty without one.
    ends : tuple of str
        Rates that are at an end of what was tried all the same.
    """

    rates: Rates
    points: list[Rates]
    scores: list[float]
    lead: list[float]
    ends: tuple[str, ...]


def choose(grid: Grid, screened: Score, decided: Score) -> Choice | tuple[str, list[Rates]]:
    """Return the choice; or the stage, and its points that are still to be run."""
    points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    missing, points = _searched(points, points, screened)
    if missing:
        return "screening", missing
    finalists = sorted(points, key=lambda one: -_mean(screened(one)))[:FINALISTS]
    missing, finalists = _searched(finalists, points, decided)
    if missing:
        return "deciding", missing
    ranked = sorted(finalists, key=lambda one: -_mean(decided(one)))
    best, scores = ranked[0], list(decided(ranked[0]) or ())
    second = list(decided(ranked[1]) or ()) if len(ranked) > 1 else []
    lead = [a - b for a, b in zip(scores, second, strict=True)] if second and scores else []
    tried = points + [one for one in finalists if one not in points]
    return Choice(best, tried, scores, lead, tuple(beyond(best, tried)))


def _searched(
    candidates: list[Rates], tried: list[Rates], score: Score
) -> tuple[list[Rates], list[Rates]]:
    """Widen candidates where the best is at an end; return what is missing, and all of them."""
    candidates, tried = list(candidates), list(tried)
    for widening in range(WIDENINGS + 1):
        missing = [one for one in candidates if score(one) is None]
        if missing:
            return missing, candidates
        best = max(candidates, key=lambda one: _mean(score(one)))
        further = [best | {name: value} for name, value in beyond(best, tried).items()]
        if not further or widening == WIDENINGS:
            break
        candidates += further
        tried += [one for one in further if one not in tried]
    return [], candidates


def beyond(point: Rates, tried: Sequence[Rates]) -> dict[str, float]:
    """Return the next value of each rate that is at an end, where there are two values at least."""
    found = {}
    for name, value in point.items():
        values = sorted({one[name] for one in tried})
        if len(values) < 2:
            continue
        if value == values[-1]:
            found[name] = float(f"{value * values[-1] / values[-2]:.2g}")
        elif value == values[0] > 0:
            found[name] = float(f"{value * values[0] / values[1]:.2g}")
    return found


def _mean(scores: Sequence[float] | None) -> float:
    return statistics.mean(scores) if scores else float("-inf")


def parse_grid(option: str, texts: Sequence[str]) -> dict[str, list[float]]:
    """Return the grid that ``client_lr=0.01,0.03`` and others of that kind say.

    Raises
    ------
    ConfigError
        If it is written otherwise, names no rate, or has one that is not above 0.
    """
    found = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        try:
            found[name] = [float(one) for one in values.split(",")]
        except ValueError:
            found[name] = []
        if name not in RATES or not found[name] or not all(one > 0 for one in found[name]):
            raise ConfigError(
                f"{option}: {text!r}, expected rates above 0 as client_lr=0.01,0.03 (for "
                f"{', '.join(RATES)})"
            )
    return found


def grid_for(own: Grid, given: Mapping[str, Sequence[float]]) -> Grid:
    """Return a method's grid with the values that are given in place of its own.

    A method with one rate for all layers takes the client's.
    """
    values = {**given, "lr": given.get("lr", given.get("client_lr", own.get("lr", ())))}
    return {name: list(values.get(name) or own[name]) for name in own}
