"""What a look at a model leaves behind."""

import gc

import torch
from torch import nn

from flsplit.cut import split


def test_a_look_at_a_model_leaves_no_copy_of_its_weights():
    """Not even until Python looks for circles: a model may be as large as the memory."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(37, 37, bias=False), nn.Softmax(1))]
    model = nn.Sequential(*layers)  # softmax keeps its output for the backward pass

    def weights():
        found = (one for one in gc.get_objects() if isinstance(one, nn.Parameter))
        return sum(one.shape == (37, 37) and not one.is_meta for one in found)

    gc.collect()
    gc.disable()
    try:
        before = weights()
        parts = split(model, "3", torch.randn(5, 37))
        parts.client(torch.randn(6, 37))
        assert weights() == before
    finally:
        gc.enable()
