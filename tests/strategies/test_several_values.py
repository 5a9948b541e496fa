"""More than one tensor crosses the cut: skips, masks, numbers; dicts go into the model."""

import pytest
import torch
from reference import (
    MOMENTUM,
    NUM_CLASSES,
    WrappedGrid,
    assert_bit_equal,
    run_split,
    train_in_turn,
    weights_of,
    whole_of,
)
from torch import nn
from torch.utils.data import Dataset

from flsplit.errors import ConfigError, MethodError, NotEnoughClientsError
from flsplit.strategies import (
    EPSL,
    FSLSAGE,
    GAPSL,
    PSL,
    SFLGA,
    SGLR,
    CycleSL,
    SequentialSL,
    SplitFedV1,
    SplitFedV2,
)

WORDS, LENGTH = 20, 6


class SkipNet(nn.Module):
    """The first layer's output is needed on both sides of the cut, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(8, 6)
        self.front = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Dropout(0.3))
        self.up = nn.Linear(4, 6)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(12, NUM_CLASSES))

    def forward(self, x):
        skip = torch.relu(self.down(x))
        return self.head(torch.cat([self.up(self.front(skip)), skip], 1))


class MaskedNet(nn.Module):
    """A dict of two inputs; the mask is needed after the cut, and so is the longest length."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.front = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, ids, mask):
        longest = int(mask.sum(1).max())
        rows = torch.tanh(self.front(self.words(ids)))[:, :longest]
        rows, _ = self.attention(rows, rows, rows, key_padding_mask=mask[:, :longest] == 0)
        kept = mask[:, :longest].unsqueeze(2)
        return self.head((rows * kept).sum(1) / kept.sum(1))


class Sentences(Dataset):
    """Words with padding."""

    def __init__(self, size, seed):
        rng = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, LENGTH + 1, (size, 1), generator=rng)
        self.mask = (torch.arange(LENGTH) < lengths).long()
        self.ids = torch.randint(1, WORDS, (size, LENGTH), generator=rng) * self.mask
        self.labels = self.ids.sum(1) % NUM_CLASSES

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"ids": self.ids[row], "mask": self.mask[row]}, self.labels[row]


class Vectors(Dataset):
    def __init__(self, size, seed):
        rng = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(size, 8, generator=rng)
        self.labels = torch.randint(NUM_CLASSES, (size,), generator=rng)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.rows[row], self.labels[row]


EXAMPLE = {"ids": torch.ones(2, LENGTH, dtype=torch.int64), "mask": torch.ones(2, LENGTH).long()}
NETS = {
    "skip": (SkipNet, Vectors, {}, {}),
    "mask": (
        MaskedNet,
        Sentences,
        {"example": EXAMPLE, "share": ("mask",)},
        {"share": ("mask",)},
    ),
}


def parts_of(net, sizes):
    return [NETS[net][1](size, 100 + index) for index, size in enumerate(sizes)]


def train(strategy, net, sizes, **more):
    build, _, options, app = NETS[net]
    return run_split(
        strategy, build, parts_of(net, sizes), app_options=app, **({"rounds": 2} | options | more)
    )


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("net", NETS)
def test_one_client_is_bit_equal_to_training_the_whole_model(net, cache):
    result = train(PSL, net, [14], optimizer=MOMENTUM, share_client_segments=True, cache=cache)
    weights, _ = train_in_turn(NETS[net][0], parts_of(net, [14]), optimizer=MOMENTUM, rounds=2)
    assert_bit_equal(whole_of(result), weights)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "strategy", [SplitFedV1, SplitFedV2, SequentialSL, SGLR, GAPSL, SFLGA, PSL]
)
def test_methods_train_on_them_with_and_without_cache(strategy, net):
    sizes = [6, 4, 5]
    results = [
        train(strategy, net, sizes, tests=parts_of(net, [4, 4, 4]), cache=cache)
        for cache in (True, False)
    ]
    entry = results[0].history[-1]
    assert (entry.left_out, entry.rows) == ([], 15)
    assert entry.evaluation["num-examples"] == 12
    assert_bit_equal(weights_of(results[0].arrays), weights_of(results[1].arrays))
    assert results[0].history.numbers() == results[1].history.numbers()


def test_the_ledger_counts_all_that_crosses():
    """Per row: 4 and 6 floats up and down."""
    logical = train(PSL, "skip", [8], rounds=1, fraction_evaluate=0.0).history[0].traffic.logical
    assert logical["activations-up"] == 8 * (4 + 6) * 4
    assert logical["gradients-down-unicast"] == 8 * (4 + 6) * 4


def test_a_trace_is_sent_once_in_a_round():
    sent = []

    class Looking(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(self.inner.send_and_receive(messages, timeout=timeout))
            sent.extend("traces" in reply.content for reply in replies if reply.has_content())
            return replies

    train(PSL, "skip", [8], fraction_evaluate=0.0, wrap=Looking)
    assert sent.count(True) == 2  # one shape of batch, two rounds


@pytest.mark.parametrize("strategy", [EPSL, CycleSL])
def test_methods_that_compute_with_one_tensor_say_so(strategy):
    with pytest.raises(MethodError, match=r"one tensor, but 2 values cross at this cut"):
        train(strategy, "skip", [8, 8])


def test_auxiliary_models_take_one_tensor():
    with pytest.raises(ConfigError, match=r"smashed data that is one tensor, but 2 values cross"):
        train(FSLSAGE, "skip", [8, 8])


def test_inputs_are_not_sent_unless_the_client_allows_it():
    build, _, options, _ = NETS["mask"]
    with pytest.raises(NotEnoughClientsError, match=r"allow it with share=\('mask',\)"):
        run_split(PSL, build, parts_of("mask", [8]), **options)
