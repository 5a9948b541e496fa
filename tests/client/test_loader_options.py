"""What else a DataLoader says is said once, with what holds instead; defaults say nothing."""

import logging

import pytest
import torch
from driving import Drive
from reference import make_data, plain_net, run_split, split_app
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler

from flsplit.log import warn_once
from flsplit.strategies import PSL

DATA = make_data(12, seed=3)


def nothing(worker):
    """Seed a worker, say."""


class Prefetching(DataLoader):
    def __iter__(self):
        return super().__iter__()


@pytest.fixture
def said(caplog, request):
    """Return a function that begins a round and returns the warnings of it."""

    def begin(train, test=None, experiment=request.node.name, **plan):
        tests = None if test is None else [test]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "flwr"):
            drive = Drive(split_app(plain_net, [train], tests=tests), plain_net)
            drive.begin(experiment=experiment, **plan)
        return [record.getMessage() for record in caplog.records]

    return begin


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_workers": 2}, "num_workers=2 of the DataLoader is not used: examples are read in"),
        (
            {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 8, "timeout": 5},
            "num_workers=2, prefetch_factor=8, persistent_workers=True, timeout=5 of the DataLo",
        ),
        (
            {"num_workers": 1, "multiprocessing_context": "spawn"},
            "num_workers=1, multiprocessing_context=SpawnContext of the DataLoader are",
        ),
        ({"worker_init_fn": nothing}, "worker_init_fn=nothing of the DataLoader is not used"),
        ({"pin_memory": True}, "pin_memory=True of the DataLoader is not used"),
        ({"in_order": False}, "in_order=False of the DataLoader is not used"),
        ({"batch_size": 7}, "batch_size=7 of the DataLoader is not used: batches are as large as"),
        (
            {"batch_size": 4, "drop_last": True},
            "drop_last=True of the DataLoader is not used: the server's drop_last is False",
        ),
        (
            {"shuffle": True, "generator": torch.Generator()},
            "generator= of the DataLoader is not used: the order follows from the run's seed",
        ),
        (
            {"sampler": RandomSampler(DATA, generator=torch.Generator())},
            "generator= of the DataLoader is not used",
        ),
    ],
)
def test_an_option_that_is_not_used_is_named(said, options, named):
    (warning,) = said(DataLoader(DATA, **options))
    assert warning.startswith(named)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True},
        {"batch_size": 4},
        {"batch_size": 4, "shuffle": True, "collate_fn": torch.utils.data.default_collate},
        {"sampler": SubsetRandomSampler(range(5)), "batch_size": 4},
        {"sampler": SubsetRandomSampler(range(5), generator=torch.Generator())},
        {"batch_sampler": BatchSampler(RandomSampler(DATA), 4, False)},
    ],
    ids=lambda options: "-".join(options) or "none",
)
def test_what_is_used_or_at_its_default_is_not(said, options):
    assert said(DataLoader(DATA, **options)) == []
    assert said(DATA) == []


def test_drop_last_of_both_agrees(said):
    assert said(DataLoader(DATA, batch_size=4, drop_last=True), drop_last=True) == []


def test_an_iteration_of_ones_own_is_named(said):
    (warning,) = said(Prefetching(DATA))
    assert warning.startswith("the __iter__ of Prefetching is not used")


def test_a_test_loader_is_looked_at_as_well(said):
    (warning,) = said(DATA, DataLoader(DATA, batch_size=3, num_workers=3))
    assert warning.startswith("num_workers=3")  # how test examples are batched is of no account
    (warning,) = said(DATA, DataLoader(DATA, batch_size=5, drop_last=True))
    assert warning.startswith("drop_last=True of the test DataLoader is not used: all test exam")


def test_it_is_said_once_in_a_run_and_again_in_the_next(caplog):
    parts = [DataLoader(DATA, num_workers=2)] * 3
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "flwr"):
            run_split(PSL, plain_net, parts, rounds=2, cache=False)
        assert [r.getMessage()[:13] for r in caplog.records] == ["num_workers=2"]


def test_a_warning_may_hold_what_logging_formats(caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        warn_once("percent", "100 %s")
        warn_once("percent", "100 %s")
    assert [record.getMessage() for record in caplog.records] == ["100 %s"]


def test_workers_that_are_not_used_change_no_number():
    plain = Drive(split_app(plain_net, [DATA]), plain_net).begin()
    loader = DataLoader(DATA, batch_size=6, num_workers=2, drop_last=True, pin_memory=True)
    reply = Drive(split_app(plain_net, [loader]), plain_net).begin()
    assert torch.equal(reply.smashed, plain.smashed)
    assert reply.num_steps == plain.num_steps
