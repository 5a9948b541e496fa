"""LocalGrid: with and without its cache the same numbers come out, bit for bit."""

import random

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from reference import (
    CUT,
    LR,
    MOMENTUM,
    SEED,
    assert_bit_equal,
    fresh,
    make_parts,
    noisy_net,
    plain_net,
    run_split,
    split_app,
    weights_of,
)
from torch.optim import Adam

from flsplit import LocalGrid, client_app
from flsplit.carry import local_grid
from flsplit.errors import ConfigError
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2

SIZES = (7, 12, 5, 16)  # batches of 4: ragged ones, one of a single row, 2 to 4 steps


def both_ways(strategy_class, rounds=3, **options):
    parts = make_parts(SIZES, noisy_net)
    tests = make_parts((3, 9, 1, 4), noisy_net)
    return [
        run_split(
            strategy_class, noisy_net, parts, tests=tests, rounds=rounds, evaluate_batch_size=4,
            cache=cache, **options,
        )
        for cache in (True, False)
    ]  # fmt: skip


def assert_same(first, second):
    assert first.history.numbers() == second.history.numbers()
    assert_bit_equal(weights_of(first.arrays), weights_of(second.arrays))
    assert first.client_segments.keys() == second.client_segments.keys()
    for name, segment in first.client_segments.items():
        assert_bit_equal(weights_of(segment), weights_of(second.client_segments[name]))


@pytest.mark.parametrize(
    ("strategy_class", "optimizer"),
    [(PSL, Adam), (SplitFedV1, MOMENTUM), (SplitFedV2, Adam), (SequentialSL, MOMENTUM)],
)
def test_cache_changes_nothing(strategy_class, optimizer):
    share = {"share_client_segments": True} if strategy_class is PSL else {}
    cached, uncached = both_ways(strategy_class, rounds=2, optimizer=optimizer, **share)
    assert_same(cached, uncached)
    assert len(cached.client_segments) == (4 if share else 0)
    assert [entry.participants for entry in cached.history] == [["0", "1", "2", "3"]] * 2
    assert [entry.left_out for entry in cached.history] == [[]] * 2


@pytest.mark.parametrize("strategy_class", [PSL, SplitFedV1, SplitFedV2, SequentialSL])
def test_cache_changes_nothing_when_some_clients_train(strategy_class):
    cached, uncached = both_ways(strategy_class, optimizer=MOMENTUM, fraction_train=0.5)
    assert_same(cached, uncached)
    chosen = [tuple(entry.participants) for entry in cached.history]
    assert {len(names) for names in chosen} == {2}
    assert len(set(chosen)) > 1, "the same clients were chosen every round"


def test_cache_changes_nothing_under_psl_with_a_client_strategy():
    cached, uncached = both_ways(
        PSL, optimizer=MOMENTUM, client_strategy=FedAvg(fraction_train=0.75)
    )
    assert_same(cached, uncached)
    assert {len(entry.participants) for entry in cached.history} == {3}


def test_clients_drop_out_of_the_steps_after_their_epoch():
    (result, _) = both_ways(PSL)
    for entry in result.history:
        assert entry.steps == 4
        assert entry.rows == sum(SIZES)
        assert not entry.left_out


@pytest.mark.parametrize("other", [{"seed": 8}, {"batch_size": 3}, {"server_lr": 0.06}])
def test_runs_repeat_and_differ_with_what_they_depend_on(other):
    parts = make_parts((6, 9))
    runs = [run_split(PSL, plain_net, parts, **given) for given in ({}, {}, other)]
    assert runs[0].history.numbers() == runs[1].history.numbers()
    assert runs[0].history.numbers() != runs[2].history.numbers()


def test_the_callers_own_random_numbers_are_left_alone():
    def draw():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    run_split(PSL, noisy_net, make_parts([6], noisy_net), rounds=1)
    assert draw() == expected


def test_node_ids_do_not_matter():
    """Which node a client is on, and in which order nodes come, changes nothing."""
    parts, tests = make_parts((6, 9, 12)), make_parts((2, 3, 4))
    model, results = plain_net(), []
    start = ArrayRecord(model.state_dict())
    for partitions in ((0, 1, 2), (2, 0, 1)):
        strategy = PSL(model=model, cut="front", server_lr=LR, seed=SEED, device="cpu")
        grid = LocalGrid(split_app(plain_net, parts, tests), 3, progress=False)
        for context, partition in zip(grid._contexts.values(), partitions, strict=True):
            context.node_config["partition-id"] = partition
        results.append(strategy.start(grid, start, num_rounds=2))
    assert_same(*results)


def test_run_config_and_partitions_reach_the_clients():
    seen = []

    def load(context):
        seen.append((dict(context.node_config), dict(context.run_config)))
        return make_parts([4])[0]

    app = client_app(model=plain_net, cut="front", data=load, device="cpu")
    grid = LocalGrid(app, 2, run_config={"dataset": "digits"}, progress=False)
    model = plain_net()
    PSL(model=model, cut="front").start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    assert seen == [
        ({"partition-id": index, "num-partitions": 2}, {"dataset": "digits"}) for index in (0, 1)
    ]


def test_no_clients_is_refused():
    with pytest.raises(ConfigError, match="num_clients is 0"):
        LocalGrid(split_app(plain_net, []), 0)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_data_that_is_split_at_random_is_split_once(cache):
    """Each client is built for every message where there is no cache, its data with it."""
    examples, seen = make_parts([20])[0], {}

    def load(context):
        train, test = torch.utils.data.random_split(examples, (12, 8))
        seen.setdefault(context.node_config["partition-id"], []).append(list(train.indices))
        return train, test

    app = client_app(model=plain_net, cut="front", data=load, device="cpu")
    model = plain_net()
    PSL(model=model, cut="front").start(
        LocalGrid(app, 2, cache=cache, progress=False), ArrayRecord(model.state_dict())
    )
    for splits in seen.values():
        assert splits == splits[:1] * len(splits)
    assert seen[0][0] != seen[1][0]
    assert cache or len(seen[0]) > 1


def test_a_second_run_on_one_grid_is_not_the_first_ones_continuation():
    parts = make_parts((12, 9), noisy_net)
    grid = LocalGrid(split_app(noisy_net, parts, parts, optimizer=MOMENTUM), 2, progress=False)

    def run():
        strategy = PSL(
            model=fresh(noisy_net), cut=CUT, server_optimizer=MOMENTUM, batch_size=4, device="cpu"
        )
        initial = ArrayRecord(fresh(noisy_net).state_dict())
        return strategy.start(grid, initial, num_rounds=2).history.numbers()

    assert run() == run()


def test_what_is_no_client_app_is_refused():
    with pytest.raises(ConfigError, match=r"client_app is <function client_app .*a ClientApp"):
        LocalGrid(client_app, 2)


class Bar:
    """Notes what becomes of a progress bar."""

    def __init__(self, events):
        self.events = events

    def add_task(self, _name, total):
        self.events.append(f"of {total}")

    def start(self):
        self.events.append("start")

    def update(self, _task, completed, description):
        if description not in self.events:
            self.events.append(description)

    def stop(self):
        self.events.append("stop")


def test_the_progress_bar_lasts_as_long_as_a_run_however_that_ends(monkeypatch):
    events = []
    monkeypatch.setattr(local_grid, "Progress", lambda transient: Bar(events))
    parts = make_parts((8, 8))
    grid = LocalGrid(split_app(plain_net, parts), 2, progress=True)
    model = plain_net()

    def train(evaluate_fn=None, **options):
        events.clear()
        strategy = SplitFedV2(model=model, cut=CUT, server_lr=0.1, local_steps=1, **options)
        strategy.start(grid, ArrayRecord(model.state_dict()), 2, evaluate_fn=evaluate_fn)

    expected = ["of 2", "start", "round 1/2", "round 2/2", "stop"]
    train()
    assert events == expected
    train()
    assert events == expected

    def fail(server_round, _arrays):
        if server_round == 1:
            raise RuntimeError("as it was asked to")

    with pytest.raises(RuntimeError, match="asked to"):
        train(evaluate_fn=fail)
    assert events == ["of 2", "start", "round 1/2", "stop"]
