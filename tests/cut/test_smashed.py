"""Gradients of several values that cross."""

import torch

from flsplit.cut import Crossing, Trace
from flsplit.cut.smashed import fitting


def test_gradients_come_in_the_order_of_the_values_whatever_that_of_their_names():
    values = {name: torch.zeros(2, requires_grad=True) for name in ("a", "b")}
    crossing = Crossing({**values, "mask": torch.zeros(3)}, Trace((), ()))
    first, second = torch.ones(2), torch.full((2,), 2.0)
    found = fitting({"b": second, "a": first}, crossing)
    assert found is not None
    assert found[0] is first
    assert found[1] is second
    assert fitting({"a": first}, crossing) is None
    assert fitting({"a": first, "b": torch.ones(3)}, crossing) is None
