"""Batches of one padded shape, of which values say how large some tensors before the cut are."""

import pytest
import torch
from reference import (
    CUT,
    MOMENTUM,
    NUM_CLASSES,
    assert_bit_equal,
    fresh,
    run_split,
    train_in_turn,
    weights_of,
    whole_of,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import Dataset, default_collate

from flsplit.cut import Crossing, cuts, split
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2

WORDS, PADDED, HIDDEN = 20, 7, 5


def packed(words, lengths):
    return pack_padded_sequence(words, lengths.cpu(), batch_first=True, enforce_sorted=False)


class LastState(nn.Module):
    """The cut is at the recurrent layer, which is given a packed sequence."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.front = nn.LSTM(6, HIDDEN, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(HIDDEN, NUM_CLASSES))

    def forward(self, ids, lengths):
        _, (hidden, _) = self.front(packed(self.embed(ids), lengths))
        return self.head(hidden[-1])


class Encoder(nn.Module):
    def __init__(self, pads_all):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.rnn = nn.GRU(6, HIDDEN, batch_first=True)
        self.pads_all = pads_all

    def forward(self, ids, lengths):
        total = ids.shape[1] if self.pads_all else None
        states, _ = self.rnn(packed(self.embed(ids), lengths))
        return pad_packed_sequence(states, batch_first=True, total_length=total)[0]


class Wrapped(nn.Module):
    """The cut is after a layer that packs, and pads again: to the batch's width, or its longest."""

    def __init__(self, pads_all, asks=False):
        super().__init__()
        self.front = Encoder(pads_all)
        self.head = nn.Linear(HIDDEN, NUM_CLASSES)
        self.asks = asks

    def forward(self, ids, lengths):
        states = self.front(ids, lengths).sum(1)
        return self.head(states / (ids.shape[1] if self.asks else PADDED))


class Chosen(nn.Module):
    """Only real words go through the cut layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.front = nn.Linear(6, HIDDEN)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(HIDDEN, NUM_CLASSES)

    def forward(self, ids, lengths):
        real = torch.arange(PADDED) < lengths[:, None]
        words = self.front(self.norm(self.embed(ids)[real]))
        rows = real.nonzero()[:, 0]
        return self.head(words.new_zeros(len(ids), HIDDEN).index_add(0, rows, words))


class Distinct(nn.Module):
    """Asks after the cut how many different words the batch has."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.front = nn.Linear(6, HIDDEN)
        self.head = nn.Linear(HIDDEN, NUM_CLASSES)

    def forward(self, ids, lengths):
        different, places = ids.unique(return_inverse=True)
        words = self.front(self.embed(different)[places])
        return self.head(words.sum(1) / different.shape[0])


MODELS = {
    "last state": LastState,
    "padded to all": lambda: Wrapped(pads_all=True),
    "padded to the longest": lambda: Wrapped(pads_all=False),
    "padded, and asks": lambda: Wrapped(pads_all=False, asks=True),
    "chosen": Chosen,
    "distinct": Distinct,
}
SHARES = {"chosen": ("lengths",)}


class Sentences(Dataset):
    def __init__(self, lengths, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths)
        self.ids = torch.randint(1, WORDS, (len(lengths), PADDED), generator=rng)
        self.ids[torch.arange(PADDED) >= self.lengths[:, None]] = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        inputs = {"ids": self.ids[row], "lengths": self.lengths[row]}
        return inputs, self.ids[row].sum() % NUM_CLASSES

    def rows(self, *rows):
        return default_collate([self[row][0] for row in rows])


PARTS = [
    Sentences([3, 5, 1, 7, 2, 2, 4, 6, 5, 1, 3]),
    Sentences([4, 1, 7, 7, 2, 3], seed=1),
    Sentences([6, 2, 1, 5, 5, 4, 4], seed=2),
]
TEST = Sentences([2, 7, 3, 4, 4, 1, 6], seed=3)
EXAMPLE = Sentences([3, 6, 4], seed=4).rows(0, 1, 2)


def train(strategy, model, parts, **options):
    share = SHARES.get(model, ())
    result = run_split(
        strategy,
        MODELS[model],
        parts,
        tests=[TEST] * len(parts),
        example=EXAMPLE,
        share=share,
        app_options={"share": share},
        optimizer=MOMENTUM,
        **options,
    )
    assert result.history[-1].left_out == []
    assert result.history[-1].rows == sum(map(len, parts))
    return result


def whole(model, parts):
    weights, _ = train_in_turn(MODELS[model], parts, optimizer=MOMENTUM, rounds=2)
    return weights


@pytest.mark.parametrize("strategy", [PSL, SplitFedV2])
@pytest.mark.parametrize("model", MODELS)
def test_one_client_is_bit_equal_to_training_the_whole_model(model, strategy):
    result = train(strategy, model, PARTS[:1], share_client_segments=True)
    expected = whole(model, PARTS[:1])
    found = whole_of(result) if strategy is PSL else weights_of(result.arrays)
    assert_bit_equal(found, expected)
    trained = fresh(MODELS[model]).eval()
    trained.load_state_dict(expected)
    inputs, labels = default_collate(list(TEST))
    loss = functional.cross_entropy(trained(**inputs), labels).item()
    # A mean over batches in place of one over rows.
    assert result.history[-1].evaluation["loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_several_clients_in_turn_train_all_their_rows(model):
    result = train(SequentialSL, model, PARTS)
    assert_bit_equal(weights_of(result.arrays), whole(model, PARTS))


@pytest.mark.parametrize("model", ["last state", "padded to the longest", "chosen"])
def test_several_clients_at_once_train_all_their_rows(model):
    """And the same with and without a cache of clients."""
    one, other = (train(SplitFedV1, model, PARTS, cache=cache) for cache in (True, False))
    assert_bit_equal(weights_of(one.arrays), weights_of(other.arrays))
    assert one.history[-1].evaluation == other.history[-1].evaluation


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("model", MODELS)
def test_what_crosses_says_what_the_model_says(model, training):
    uncut = fresh(MODELS[model]).train(training)
    halves = split(uncut, CUT, EXAMPLE, share=SHARES.get(model, ()))
    for rows in ((0, 1), (1, 2), (3,), (0, 1), (4, 5)):
        batch = PARTS[0].rows(*rows)
        torch.manual_seed(0)
        found = halves.server(halves.client(**batch))
        torch.manual_seed(0)
        assert torch.equal(found, uncut(**batch))


@pytest.mark.parametrize("model", ["padded to all", "padded to the longest"])
def test_after_a_layer_that_pads_again_one_tensor_crosses(model):
    """And so methods work that need that."""
    uncut = MODELS[model]()
    assert CUT in [point.cut for point in cuts(uncut, EXAMPLE)]
    halves = split(uncut, CUT, EXAMPLE)
    assert isinstance(halves.client(**PARTS[0].rows(0, 1)), torch.Tensor)


def test_sizes_that_values_say_need_the_trace():
    """Else the server would take its made-up batch's for them."""
    halves = split(Distinct(), CUT, EXAMPLE)
    assert isinstance(halves.client(**EXAMPLE), Crossing)
