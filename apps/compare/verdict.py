"""What may be said of a difference between two methods, measured with the same seeds.

Both methods have the same data, first weights and mini-batches with a seed, so differences are
taken seed by seed, and a 95 % interval of their mean is Student's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

LEVEL = 0.95
LEAST_SEEDS = 3
MATTERS = 1.0
"""Smallest difference that matters, in points, where nothing else is said."""

ABOVE, BELOW = "above", "below"
ALIKE = "no difference that matters"
NOT_TOLD_APART = "not told apart"
TOO_FEW = "too few seeds"


@dataclass(frozen=True)
class Verdict:
    """A mean difference, half the width of its interval, and what may be said.

    Attributes
    ----------
    says : str
        ``above`` or ``below`` where the interval leaves out 0 and the mean matters; ``no difference
        that matters`` where the whole interval is closer to 0 than what matters; ``too few seeds``
        with less than three; else ``not told apart``.
    mean, half : float
        Points; ``half`` is infinite with one seed.
    seeds : int
        How many both have finished.
    """

    says: str
    mean: float
    half: float
    seeds: int

    @property
    def differs(self) -> bool:
        """Whether the two were told apart."""
        return self.says in (ABOVE, BELOW)

    def __str__(self) -> str:
        """Return for instance ``+2.1 ± 0.8: above``."""
        if not self.seeds:
            return TOO_FEW
        half = f" ± {self.half:.1f}" if math.isfinite(self.half) else ""
        return f"{self.mean:+.1f}{half}: {self.says}"


def judge(differences: Sequence[float], matters: float = MATTERS) -> Verdict:
    """Return the verdict on differences, one for each seed, in points."""
    seeds = len(differences)
    if not seeds:
        return Verdict(TOO_FEW, math.nan, math.inf, 0)
    mean = float(np.mean(differences))
    half = (
        _quantile(seeds) * float(np.std(differences, ddof=1)) / math.sqrt(seeds)
        if (seeds > 1)
        else math.inf
    )
    if seeds < LEAST_SEEDS:
        says = TOO_FEW
    elif abs(mean) > half and abs(mean) >= matters:
        says = ABOVE if mean > 0 else BELOW
    elif abs(mean) + half < matters:
        says = ALIKE
    else:
        says = NOT_TOLD_APART
    return Verdict(says, mean, half, seeds)


def power(effect: float, deviation: float, seeds: int) -> float:
    """Return how often a true difference is found: the interval leaves out 0 on its side.

    Parameters
    ----------
    effect : float
        The true mean difference.
    deviation : float
        Standard deviation of the differences over seeds.
    seeds : int
        How many; with less than three nothing is ever found.
    """
    if seeds < LEAST_SEEDS:
        return 0.0
    if deviation == 0:
        return 1.0
    shift = effect / deviation * math.sqrt(seeds)
    return float(stats.nct.sf(_quantile(seeds), seeds - 1, shift))


def seeds_for(effect: float, deviation: float, wanted: float = 0.8, most: int = 100) -> int | None:
    """Return the fewest seeds that find ``effect`` so often; None if that takes over ``most``."""
    counts = range(LEAST_SEEDS, most + 1)
    return next((n for n in counts if power(effect, deviation, n) >= wanted), None)


@lru_cache
def _quantile(seeds: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1))
