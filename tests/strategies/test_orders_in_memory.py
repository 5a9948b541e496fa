"""What crosses the cut needn't be contiguous: it arrives as it lay in memory, bit for bit."""

import pytest
import torch
from reference import (
    MOMENTUM,
    NUM_CLASSES,
    assert_bit_equal,
    run_split,
    train_in_turn,
    weights_of,
    whole_of,
)
from torch import nn
from torch.utils.data import TensorDataset

from flsplit.strategies import PSL, SplitFedV2


class Attention(nn.Module):
    """Batches first outside, words first inside: what comes out is transposed."""

    def __init__(self):
        super().__init__()
        self.front = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.front(x, x, x, need_weights=False)[0].mean(1))


class Patches(nn.Module):
    """As vision transformers begin."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(1, 16, 2, stride=2)
        self.front = nn.Identity()
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        words = self.front(self.project(x.unsqueeze(1)).flatten(2).transpose(1, 2))
        return self.head(self.norm(words).mean(1))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.front = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Sequential(
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(64, NUM_CLASSES)
        )

    def forward(self, x):
        return self.head(self.front(x.unsqueeze(1)))


def channels_last():
    return Images().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("strategy", [PSL, SplitFedV2])
@pytest.mark.parametrize("build", [Attention, Patches, channels_last])
def test_one_client_is_bit_equal_to_training_the_whole_model(build, strategy, cache):
    inputs = torch.randn(12, 6, 4, generator=torch.Generator().manual_seed(2))
    part = TensorDataset(inputs, torch.arange(12) % NUM_CLASSES)
    result = run_split(
        strategy, build, [part], cut="front", optimizer=MOMENTUM, cache=cache,
        share_client_segments=True, example=inputs[:3],
    )  # fmt: skip
    expected, _ = train_in_turn(build, [part], optimizer=MOMENTUM, rounds=2)
    assert_bit_equal(whole_of(result) if strategy is PSL else weights_of(result.arrays), expected)
