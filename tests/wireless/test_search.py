import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flsplit.wireless.search import falling_root, golden_section


@given(
    root=st.floats(1e-6, 1e6),
    low=st.floats(1e-3, 0.999),
    high=st.floats(1.001, 1e3),
    power=st.sampled_from([0.2, 1, 3, 9]),
)
def test_a_root_is_found_on_the_side_where_the_function_is_not_above_zero(root, low, high, power):
    def function(x):
        return (root / x) ** power - 1.0

    found = falling_root(function, low * root, high * root)

    assert function(found) <= 0
    assert found == pytest.approx(root, rel=1e-12)


@pytest.mark.parametrize(
    ("function", "low", "high", "root"),
    [
        (lambda x: 2.0 - x, 3.0, 9.0, 3.0),  # no need to go further
        (lambda x: 2.0 - x, 2.0, 9.0, 2.0),
        (lambda x: 2.0 - x, 0.5, 2.0, 2.0),
        (lambda x: 2.0 - x, 0.5, 1.0, 2.0),  # above both bounds
        (lambda x: 2.0 - x, 1.0, 1.0, 2.0),
        (lambda x: 1.0 if x < 3 else -1.0, 1.0, 9.0, 3.0),  # a step
        (lambda x: max(3.0 - x, -1e-9), 1.0, 9.0, 3.0),  # flat from there on
        (lambda x: 3.0 - x if x < 4 else -math.inf, 1.0, 9.0, 3.0),
        (lambda x: 1.0 + 1.0 / x, 1.0, 9.0, math.inf),  # nowhere
    ],
)
def test_roots_by_hand(function, low, high, root):
    found = falling_root(function, low, high)

    assert found == pytest.approx(root, rel=1e-12)
    assert found == math.inf or function(found) <= 0


def test_few_values_are_asked_for():
    asked = []

    def function(x):
        asked.append(x)
        return math.log(7.0 / x)

    falling_root(function, 0.1, 100.0)

    assert len(asked) < 15  # halving would need 50


def test_the_least_of_a_convex_function():
    assert golden_section(lambda x: (x - 3.0) ** 2, 1.0, 10.0) == pytest.approx(3.0, rel=1e-5)
    assert golden_section(lambda x: x, 2.0, 10.0) == pytest.approx(2.0, rel=1e-5)
