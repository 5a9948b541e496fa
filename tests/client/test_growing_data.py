"""Data that grow or shrink are counted when a round begins, test data when an evaluation does."""

import pytest
import torch
from driving import Drive, RefusedError, some_gradient
from reference import SEED, plain_net, split_app
from torch.utils.data import DataLoader, Dataset, RandomSampler

from flsplit.client.order import begun_anew
from flsplit.seeds import derive_seed


class Growing(Dataset):
    """Counts from 0 to wherever it is; an example's label is its index."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"{index} of {self.length}")
        return torch.full((8,), float(index)), index


def permuted(length, epoch, size=4):
    rng = torch.Generator().manual_seed(derive_seed(SEED, "data", "0", epoch))
    order = torch.randperm(length, generator=rng).tolist()
    return [order[start : start + size] for start in range(0, length, size)]


def drive_of(data, cache, tests=None):
    return Drive(split_app(plain_net, [data], tests=tests), plain_net, cache=cache)


def round_of(drive, **plan):
    seen = []
    reply = drive.train_round(lambda step, r: seen.append(r.labels.tolist()), **plan)
    return seen, reply.num_examples


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_the_next_round_goes_over_what_has_come(cache):
    data = Growing(6)
    drive = drive_of(data, cache)
    assert round_of(drive) == (permuted(6, 0), 6)
    data.length = 9
    assert round_of(drive) == (permuted(9, 1), 9)
    data.length = 5
    assert round_of(drive) == (permuted(5, 2), 5)
    assert round_of(drive) == (permuted(5, 3), 5)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_a_round_goes_over_what_was_there_when_it_began(cache):
    data = Growing(10)
    drive = drive_of(data, cache)
    reply = drive.begin()
    seen, examples = [reply.labels.tolist()], {reply.num_examples}
    for step in (1, 2):
        data.length += 7
        reply = drive.step(step, some_gradient(step, reply))
        seen.append(reply.labels.tolist())
        examples |= {reply.num_examples}
    assert seen == permuted(10, 0)
    assert examples | {drive.finish(2, some_gradient(3, reply)).num_examples} == {10}
    assert round_of(drive) == (permuted(24, 1), 24)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_an_epoch_that_was_begun_ends_where_data_change(cache):
    data = Growing(10)
    drive = drive_of(data, cache)
    assert round_of(drive, local_steps=1)[0] == permuted(10, 0)[:1]
    data.length = 12
    assert round_of(drive, local_steps=2)[0] == permuted(12, 1)[:2]
    assert round_of(drive, local_steps=2)[0] == permuted(12, 1)[2:] + permuted(12, 2)[:1]


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_data_that_shrink_within_a_round_end_in_an_error_of_the_client(cache):
    data = Growing(10)
    drive = drive_of(data, cache)
    reply = drive.begin()
    data.length = 2
    with pytest.raises(RefusedError, match=r"DataError: example \d can't be read: IndexError.*'0'"):
        drive.step(1, some_gradient(0, reply))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_a_client_without_data_may_get_some(cache):
    data = Growing(0)
    drive = drive_of(data, cache)
    with pytest.raises(RefusedError, match="client '0' has no training examples"):
        drive.begin()
    data.length = 6
    assert round_of(drive, segment=drive.first) == (permuted(6, 0), 6)
    data.length = 0
    with pytest.raises(RefusedError, match="client '0' has no training examples"):
        drive.begin()
    data.length = 6
    assert round_of(drive) == (permuted(6, 1), 6)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_a_sampler_that_grows(cache):
    data = Growing(6)
    drive = drive_of(DataLoader(data, sampler=RandomSampler(data, replacement=True)), cache)
    assert round_of(drive)[1] == 6
    data.length = 9
    seen, examples = round_of(drive)
    assert (examples, [len(batch) for batch in seen]) == (9, [4, 4, 1])
    reply = drive.begin()
    data.length = 12
    if cache:  # the epoch's order is drawn already
        assert drive.step(1, some_gradient(0, reply)).num_examples == 9
    else:
        with pytest.raises(RefusedError, match="began the round with 9 examples, its sampler now"):
            drive.step(1, some_gradient(0, reply))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_an_evaluation_goes_over_the_tests_that_were_there_when_it_began(cache):
    tests = Growing(6)
    drive = drive_of(Growing(4), cache, tests=[tests])
    drive.begin()

    def evaluate(batch):
        reply = drive.evaluate(batch, 4)
        return reply.labels.tolist(), reply.num_batches

    assert evaluate(0) == ([0, 1, 2, 3], 2)
    tests.length = 11
    assert evaluate(1) == ([4, 5], 2)
    assert evaluate(0) == ([0, 1, 2, 3], 3)
    assert evaluate(2) == ([8, 9, 10], 3)
    tests.length = 5
    with pytest.raises(RefusedError, match="an evaluation with 11 test examples, now there are 5"):
        drive.evaluate(1, 4)
    tests.length = 0
    assert evaluate(0) == ([], 0)


@pytest.mark.parametrize(
    ("drawn", "before", "now", "expected"),
    [
        (0, 10, 12, 0),
        (10, 10, 12, 12),
        (11, 10, 12, 24),
        (20, 10, 5, 10),
        (7, 7, 7, 7),
        (0, 0, 5, 0),
    ],
)
def test_epochs_are_counted_on(drawn, before, now, expected):
    assert begun_anew(drawn, before, now) == expected
