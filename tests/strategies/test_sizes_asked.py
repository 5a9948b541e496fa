"""A forward that asks what comes before the cut for its sizes, and batches of other sizes."""

import pytest
import torch
from reference import CUT, assert_bit_equal, fresh, run_split, train_in_turn, weights_of, whole_of
from torch import nn
from torch.utils.data import Dataset

from flsplit.cut import Crossing, split
from flsplit.strategies import EPSL, FSLSAGE, PSL, SplitFedV1, SplitFedV2

WORDS, CLASSES = 20, 3


class Sentence(nn.Module):
    """A mean over words; how many there are it hears of the smashed data, or of the ids."""

    def __init__(self, asks):
        super().__init__()
        self.asks = asks
        self.front = nn.Embedding(WORDS, 6)
        self.places = nn.Parameter(torch.linspace(-1, 1, 50).unsqueeze(1).repeat(1, 6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, ids):
        if self.asks == "before the cut":
            _, length = ids.shape
        words = torch.tanh(self.front(ids))
        if self.asks == "after the cut":
            length = ids.size(1)
        elif self.asks == "the smashed data":
            length = words.shape[1]
        return self.head((words + self.places[:length]).sum(1) / length)


class Sentences(Dataset):
    def __init__(self, size, length):
        rng = torch.Generator().manual_seed(length)
        self.ids = torch.randint(WORDS, (size, length), generator=rng)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return self.ids[row], self.ids[row].sum() % CLASSES


PARTS = [Sentences(6, length) for length in (5, 7, 3)]
ASKS = ["before the cut", "after the cut"]
EXAMPLES = {"none": None, "another": torch.zeros(2, 9, dtype=torch.int64)}
EXAMPLES["one client's"] = torch.zeros(2, 7, dtype=torch.int64)


def train(strategy, asks, parts, **options):
    return run_split(strategy, lambda: Sentence(asks), parts, tests=parts, **options)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("asks", ASKS)
def test_clients_with_other_sizes_train_and_are_tested_as_if_it_asked_nothing(asks, example, cache):
    """Whatever the server has looked at the model with."""
    options = {"example": EXAMPLES[example], "cache": cache}
    found = train(SplitFedV2, asks, PARTS, **options)
    expected = train(SplitFedV2, "the smashed data", PARTS)
    assert_bit_equal(weights_of(found.arrays), weights_of(expected.arrays))
    assert found.history[-1].left_out == []
    assert found.history[-1].evaluation == expected.history[-1].evaluation


@pytest.mark.parametrize("strategy", [PSL, SplitFedV1])
@pytest.mark.parametrize("asks", ASKS)
def test_one_client_is_bit_equal_to_training_the_whole_model(strategy, asks):
    result = train(strategy, asks, PARTS[:1], share_client_segments=True)
    expected, _ = train_in_turn(
        lambda: Sentence(asks), PARTS[:1], optimizer=torch.optim.SGD, rounds=2
    )
    found = whole_of(result) if strategy is PSL else weights_of(result.arrays)
    assert_bit_equal(found, expected)


@pytest.mark.parametrize("strategy", [EPSL, FSLSAGE])
@pytest.mark.parametrize("asks", ASKS)
def test_where_the_example_is_of_that_size_one_tensor_crosses(strategy, asks):
    """And so methods work that need that."""
    parts = [Sentences(6, 7), Sentences(6, 7)]
    found = train(strategy, asks, parts, example=EXAMPLES["one client's"])
    expected = train(strategy, "the smashed data", parts)
    assert_bit_equal(weights_of(found.arrays), weights_of(expected.arrays))


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("asks", ASKS)
def test_only_other_sizes_need_the_trace(asks, rows):
    model = fresh(lambda: Sentence(asks))
    halves = split(model, CUT, torch.zeros(2, 7, dtype=torch.int64))
    known, other = (torch.randint(WORDS, (rows, length)) for length in (7, 5))
    assert isinstance(halves.client(known), torch.Tensor)
    assert isinstance(crossing := halves.client(other), Crossing)
    assert torch.equal(halves.server(crossing), model(other))
    assert torch.equal(halves.server(halves.client(known)), model(known))
