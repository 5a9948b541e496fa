"""What is said of differences: by hand, and how often it is wrong where the truth is known."""

import math

import numpy as np
import pytest
from verdict import ABOVE, ALIKE, BELOW, NOT_TOLD_APART, TOO_FEW, judge, power, seeds_for

# Deviation of paired differences over seeds in docs/comparison.md, in points: of methods on
# digits, where it is small, and of GAPSL and PSL on MNIST with Dirichlet(0.1), where it is large.
SPREADS = (0.8, 3.0)
RUNS = 2000


def test_the_interval_is_students():
    found = judge([1.0, 2.0, 6.0])

    # Mean 3, deviation √7, and t(2) has 95 % within 4.302653.
    assert found.mean == 3.0
    assert found.half == pytest.approx(4.302653 * math.sqrt(7) / math.sqrt(3), rel=1e-6)
    assert (found.says, str(found)) == (NOT_TOLD_APART, "+3.0 ± 6.6: not told apart")


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([2.0, 2.1, 2.2], ABOVE),
        ([-2.0, -2.1, -2.2], BELOW),
        ([0.5, 0.51, 0.52], ALIKE),  # surely not 0, and surely nothing that matters
        ([0.9, 1.0, 1.2], ABOVE),
        ([0.0, 0.0, 0.0], ALIKE),
        ([5.0, -5.0, 1.0], NOT_TOLD_APART),
        ([50.0, 50.1], TOO_FEW),
        ([50.0], TOO_FEW),
        ([], TOO_FEW),
    ],
)
def test_verdicts(differences, says):
    assert judge(differences).says == says


def test_what_matters_can_be_said():
    assert judge([2.0, 2.1, 2.2], matters=3.0).says == ALIKE


def simulated(effect, spread, seeds, rng):
    """Return how often the two were told apart, the right way round and the wrong."""
    common = rng.normal(80, 5, (RUNS, seeds, 1))  # a seed's data are hard or easy for both
    runs = common + rng.normal(0, spread / math.sqrt(2), (RUNS, seeds, 2))
    found = [judge(differences).says for differences in runs[..., 1] - runs[..., 0] + effect]
    return found.count(ABOVE) / RUNS, found.count(BELOW) / RUNS


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_methods_are_said_to_differ_in_five_percent_at_most(seeds, spread):
    above, below = simulated(0.0, spread, seeds, np.random.default_rng(seeds))

    assert above + below <= 0.05


@pytest.mark.parametrize(
    ("spread", "seeds", "stated"), [(0.8, 3, 0.62), (0.8, 5, 0.98), (3.0, 5, 0.21), (3.0, 20, 0.81)]
)
def test_two_points_are_found_as_often_as_stated(spread, seeds, stated):
    above, _ = simulated(2.0, spread, seeds, np.random.default_rng(1))

    assert power(2.0, spread, seeds) == pytest.approx(stated, abs=0.005)
    assert above == pytest.approx(stated, abs=0.035)  # three deviations of 2000 draws


def test_one_standard_deviation_of_two_seeds_is_no_verdict():
    """What was called "agrees" before: equal methods got a verdict in half of all cases."""
    rng = np.random.default_rng(0)

    assert all(judge(two).says == TOO_FEW for two in rng.normal(0, 1, (100, 2)))


@pytest.mark.parametrize(("spread", "seeds"), [(0.8, 4), (3.0, 20), (30.0, None)])
def test_seeds_that_it_takes(spread, seeds):
    assert seeds_for(2.0, spread) == seeds
    if seeds:
        assert power(2.0, spread, seeds - 1) < 0.8 <= power(2.0, spread, seeds)
