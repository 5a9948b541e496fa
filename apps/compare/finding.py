"""What was measured about an expectation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

AGREES, DISAGREES, NOT_TOLD_APART = "agrees", "disagrees", "not told apart"


@dataclass(frozen=True)
class Finding:
    """What was measured about an expectation.

    Attributes
    ----------
    expected, where, measured : str
        What was expected, for which labels, what came.
    verdict : {'agrees', 'disagrees', 'not told apart'}
        The last where the mean difference is within its standard deviation over seeds.
    """

    expected: str
    where: str
    measured: str
    verdict: str


def verdict_on(differences: Sequence[float]) -> str:
    """Return the verdict on differences, seed by seed, that were expected to be positive."""
    if len(differences) > 1 and abs(np.mean(differences)) <= np.std(differences, ddof=1):
        return NOT_TOLD_APART
    return AGREES if np.mean(differences) > 0 else DISAGREES
