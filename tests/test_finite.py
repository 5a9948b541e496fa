"""`all_finite` says of every tensor what a look at each element says."""

import pytest
import torch

from flsplit.finite import all_finite, can_be_squared

MAX = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    "values",
    [[], [1.0, -2.0], [MAX, MAX], [-MAX, -MAX, 1.0], [MAX, -MAX]],
)
def test_finite_elements_are_finite_also_where_their_sum_is_not(values):
    assert all_finite(torch.tensor(values))


@pytest.mark.parametrize(
    "values",
    [[float("nan")], [1.0, float("inf")], [float("inf"), -float("inf")], [MAX, -float("inf"), MAX]],
)
def test_one_element_that_is_not_is_found(values):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert not all_finite(torch.tensor(values).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_is_only_stored_is_looked_at_too(dtype):
    values = torch.tensor([200.0, -200.0, 1.0]).to(dtype)
    assert all_finite(values)
    assert can_be_squared(values)
    values[1] = float("nan")
    assert not all_finite(values)
    assert not can_be_squared(values)


def test_integers_are_finite():
    assert all_finite(torch.tensor([1, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_whose_squares_overflow_are_found(dtype):
    fits = torch.tensor([[60000.0, -60000.0, 3.0]] * 9).to(dtype)
    assert can_be_squared(fits)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not can_be_squared(torch.cat([fits, torch.full_like(fits, bad)]))
    if dtype is not torch.float16:  # it has none that is so large
        large = torch.tensor([1e20, -1e20]).to(dtype)  # a sum of 0
        assert can_be_squared(large) is (dtype is torch.float64)
    assert not can_be_squared(torch.tensor([1e200], dtype=torch.float64))
