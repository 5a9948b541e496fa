"""What a look at a model leaves behind."""

import gc

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
