"""Looks for numbers: where a falling function reaches zero, where a convex one is least."""

import math
from collections.abc import Callable

import numpy as np

Function = Callable[[float], float]
Point = tuple[float, float]  # a number and the function's value there

_GOLDEN = (5**0.5 - 1) / 2
_EXACT, _NARROW = 1e-14, 1e-6


def falling_root(function: Function, low: float, high: float) -> float:
    """Return the least number from ``low`` on at which a falling function is not above zero.

    ``function`` is not NaN, and where it is zero or less it may be minus infinity. The bounds are
    positive and finite; above ``high`` it is looked for where below isn't enough. The answer is
    where ``function`` is zero or less by rounding; infinity if it is so nowhere.
    """
    above, below = (low, function(low)), (high, function(high))
    if above[1] <= 0:
        return low
    while below[1] > 0:
        above, high = below, 2.0 * high
        if not np.isfinite(high):
            return high
        below = high, function(high)
    return _crossing(function, above, below)


def _crossing(function: Function, above: Point, below: Point) -> float:
    """Return where a falling function crosses zero, on the side where it isn't above.

    Chandrupatla's method: it goes where the inverse parabola through the last three points is zero
    if that parabola is trustworthy, else to the middle. SciPy has one as good, but takes longer to
    import than a plan takes to make.
    """
    share = 0.5  # of the way from one side to the other
    newest, opposite = below, above
    while (width := below[0] - above[0]) > (least := _EXACT * below[0]):
        share = min(max(share, least / 2 / width), 1 - least / 2 / width)
        at = newest[0] + share * (opposite[0] - newest[0])
        point = at, function(at)
        was_above, is_above = newest[1] > 0, point[1] > 0
        third = newest if was_above == is_above else opposite
        above, below = (point, below) if is_above else (above, point)
        newest, opposite = (above, below) if is_above else (below, above)
        share = _share(newest, opposite, third)
    return below[0]


def _share(newest: Point, opposite: Point, third: Point) -> float:
    """Return how far to go from the newest point to the one on the other side."""
    (a, fa), (b, fb), (c, fc) = newest, opposite, third
    x, y = (a - b) / (c - b), (fa - fb) / (fc - fb)
    if not math.isfinite(y) or y**2 >= x or (1 - y) ** 2 >= 1 - x:
        return 0.5
    return fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)


def golden_section(function: Function, low: float, high: float) -> float:
    """Return where a convex function is least between two bounds."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > _NARROW * high:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return high
