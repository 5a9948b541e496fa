"""What a look at a model leaves behind."""

import gc
import weakref
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from flsplit.cut import split


class Attention(nn.Module):
    """Its attention keeps its own output for the backward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(37, 37, bias=False)

    def forward(self, x):
        rows = self.layer(x)[None, None]
        return functional.scaled_dot_product_attention(rows, rows, rows)[0, 0]


def test_a_look_at_a_model_keeps_no_copy_of_its_weights():
    model = nn.Sequential(Attention(), Attention(), nn.Linear(37, 2))

    def weights():
        gc.collect()
        found = (one for one in gc.get_objects() if type(one) is nn.Parameter)
        return sum(one.shape == (37, 37) and not one.is_meta for one in found)

    before = weights()
    parts = split(model, "0", torch.randn(5, 37))
    parts.client(torch.randn(6, 37))
    assert weights() == before


class Adding(nn.Module):
    """Makes tensors that autograd has no need of, and counts those that are still there."""

    made: ClassVar[list[weakref.ref]] = []  # copies of the model share it
    counts: ClassVar[list[int]] = []

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        x = self.first(x)
        for _ in range(30):
            x = x + 1
            self.made.append(weakref.ref(x))
            self.counts.append(sum(one() is not None for one in self.made))
        return SimpleNamespace(last=x)


class Unpacking(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = Adding(), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.inner(x).last)


def test_a_look_holds_no_more_than_the_forward_that_it_follows():
    Adding.made.clear()
    Adding.counts.clear()
    split(Unpacking(), "inner.first", torch.randn(5, 3))
    assert len(Adding.counts) > 2 * 30  # the model was followed twice
    assert max(Adding.counts) == 1
