"""Any Flower strategy aggregates client segments, end to end."""

from itertools import cycle

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
)
from reference import assert_bit_equal, assert_close, average, make_parts, normed_net, weights_of
from tampering import set_up, train

from flsplit.strategies import PSL, SplitFedV1, SplitFedV2

SIZES = [8, 4, 12, 8, 8]  # five, so that a trimmed mean is no median
PARTS = make_parts(SIZES, normed_net)
TESTS = make_parts([3] * 5, normed_net)

STRATEGIES = {
    "FedAvg": FedAvg,
    "FedAdam": FedAdam,
    "FedTrimmedAvg": lambda **more: FedTrimmedAvg(beta=0.25, **more),
    "FedMedian": FedMedian,
    "Krum": lambda **more: Krum(num_malicious_nodes=1, **more),
    "MultiKrum": lambda **more: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2, **more),
}


def run(strategy, rounds=1, parts=PARTS, **options):
    options = {"build": normed_net, "local_steps": 2} | options
    return train(set_up(parts, strategy, client={"tests": TESTS}, **options), rounds=rounds)


def uploads_of(strategy, client_strategy, **options):
    """Run one round and return what the client strategy was given and what came out."""
    seen = []

    class Watching(type(client_strategy())):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen.extend(
                (reply.content["arrays"].to_torch_state_dict(), reply.content["metrics"])
                for reply in replies
            )
            return super().aggregate_train(server_round, replies)

    return run(strategy, client_strategy=Watching(), **options), seen


# --- all of them -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "strategy"), zip(STRATEGIES, cycle([SplitFedV1, SplitFedV2, PSL]), strict=False)
)
def test_a_whole_model_comes_out_that_a_second_run_repeats(strategy, name):
    first, again = (run(strategy, client_strategy=STRATEGIES[name]()) for _ in range(2))
    assert_bit_equal(weights_of(first.arrays), weights_of(again.arrays))
    assert first.history.numbers() == again.history.numbers()
    normed_net().load_state_dict(first.arrays.to_torch_state_dict())
    assert all(t.isfinite().all() for t in weights_of(first.arrays).values())
    assert first.history[0].participants == ["0", "1", "2", "3", "4"]
    assert first.history[0].evaluation["num-examples"] == 15


def test_every_strategy_makes_something_else_of_the_same_segments():
    results = [weights_of(run(PSL, client_strategy=s()).arrays) for s in STRATEGIES.values()]
    for index, one in enumerate(results):
        for other in results[:index]:
            assert not torch.equal(one["front.0.weight"], other["front.0.weight"])


@pytest.mark.parametrize("strategy", [SplitFedV2, PSL])
def test_fedavg_gives_the_mean_of_the_client_segments(strategy):
    result, seen = uploads_of(strategy, FedAvg)
    assert [metrics["num-examples"] for _, metrics in seen] == SIZES
    assert all(set(arrays) == {"front.0.weight", "front.0.bias", "front.2.weight", "front.2.bias"}
               for arrays, _ in seen)  # fmt: skip
    expected = average([arrays for arrays, _ in seen], SIZES)
    found = weights_of(result.arrays)
    assert_close({name: found[name] for name in expected}, expected, tolerance=1e-6)


def test_splitfed_v1_hands_the_joined_model_to_the_client_strategy():
    result, seen = uploads_of(SplitFedV1, FedMedian)
    parameters = {name for name, _ in normed_net().named_parameters()}
    assert all(set(arrays) == parameters for arrays, _ in seen)
    found = weights_of(result.arrays)
    for name in parameters:
        median = np.median([arrays[name].numpy() for arrays, _ in seen], axis=0)
        np.testing.assert_array_equal(found[name].numpy(), median.astype(np.float32))


@pytest.mark.parametrize("strategy", [SplitFedV1, SplitFedV2, PSL])
def test_batchnorms_buffers_are_averaged_beside_the_strategy(strategy):
    """Krum takes one client's parameters; nobody's BatchNorm is taken for all."""
    parts = make_parts([8, 8, 8, 8], normed_net)
    for client_strategy in (FedAvg(), Krum(num_malicious_nodes=1)):
        result = run(strategy, parts=parts, client_strategy=client_strategy)
        found = weights_of(result.arrays)
        assert found["front.2.num_batches_tracked"].item() == 2
        assert found["front.2.num_batches_tracked"].dtype == torch.int64
    averaged = weights_of(run(strategy, parts=parts, client_strategy=FedAvg()).arrays)
    assert torch.equal(averaged["front.2.running_mean"], found["front.2.running_mean"])
    assert not torch.equal(averaged["front.0.weight"], found["front.0.weight"])


def adam(x, averages, eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3):
    m, v = np.zeros_like(x), np.zeros_like(x)
    for number, mean in enumerate(averages, start=1):
        m = beta_1 * m + (1 - beta_1) * (mean - x)
        v = beta_2 * v + (1 - beta_2) * (mean - x) ** 2
        rate = eta * np.sqrt(1 - beta_2 ** (number + 1)) / (1 - beta_1 ** (number + 1))
        x = x + rate * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize("strategy", [SplitFedV1, SplitFedV2, PSL])
def test_fedadam_is_configured_in_every_round(strategy):
    """Its moments follow the difference to the segment that the round began with."""
    result, seen = uploads_of(strategy, FedAdam, rounds=3)
    start = set_up(PARTS, strategy, build=normed_net)[2].to_torch_state_dict()
    name = "front.0.weight"
    rounds = [seen[index : index + 5] for index in (0, 5, 10)]
    means = [average([a for a, _ in one], SIZES)[name].double().numpy() for one in rounds]
    expected = adam(start[name].double().numpy(), means)
    np.testing.assert_allclose(weights_of(result.arrays)[name].numpy(), expected, atol=1e-5)


# --- participants ----------------------------------------------------------------------------


def renumber(grid, order):
    """Give the clients other node ids, and let the grid list them in another order."""
    contexts = list(grid._contexts.values())
    renumbered = {}
    for position in order:
        old, node = contexts[position], 10**9 - 17 * position
        renumbered[node] = Context(old.run_id, node, old.node_config, RecordDict(), old.run_config)
    grid._contexts = renumbered


@pytest.mark.parametrize("strategy", [SplitFedV1, SplitFedV2, PSL])
def test_who_takes_part_follows_from_the_seed_and_not_from_node_ids(strategy):
    def choose(seed, order=None):
        parts = make_parts([2] * 6, normed_net)
        half = FedAvg(fraction_train=0.5, min_train_nodes=1)
        made = set_up(parts, strategy, build=normed_net, client_strategy=half, seed=seed)
        if order:
            renumber(made[1], order)
        return train(made, rounds=2)

    plain = choose(1)
    chosen = [entry.participants for entry in plain.history]
    assert all(len(one) == 3 for one in chosen)
    assert len({tuple(one) for one in chosen}) > 1
    other = choose(1, order=[2, 0, 5, 1, 4, 3])
    assert [entry.participants for entry in other.history] == chosen
    assert_bit_equal(weights_of(other.arrays), weights_of(plain.arrays))
    assert [entry.participants for entry in choose(2).history] != chosen


@pytest.mark.parametrize("strategy", [SplitFedV1, SplitFedV2])
def test_the_strategys_own_fraction_of_clients(strategy):
    result = run(strategy, 3, fraction_train=0.5)
    assert [len(entry.participants) for entry in result.history] == [2, 2, 2]
    assert len({tuple(entry.participants) for entry in result.history}) > 1


@pytest.mark.parametrize(
    ("given", "options", "count"),
    [
        ({"fraction_evaluate": 0.67, "min_evaluate_nodes": 1}, {}, 3),
        ({"fraction_evaluate": 0.1}, {}, 2),  # Flower's own least number
        ({"fraction_evaluate": 0.1}, {"fraction_evaluate": 0.9}, 4),
        ({"fraction_evaluate": 0.1}, {"min_evaluate_nodes": 3}, 3),
        ({"fraction_evaluate": 0.0}, {}, 0),
    ],
)
def test_the_strategys_own_fraction_evaluates_where_no_option_says_another(given, options, count):
    result = run(SplitFedV2, 1, client_strategy=FedAvg(**given), **options)
    assert result.history[0].evaluation.get("num-examples", 0) == count * len(TESTS[0])


def test_metric_functions_of_a_server_strategy_are_called():
    def seen(contents, key):
        return MetricRecord({"seen": len(contents)})

    strategy = FedAvg(train_metrics_aggr_fn=seen, evaluate_metrics_aggr_fn=seen)
    result = run(SplitFedV1, 1, server_strategy=strategy)
    for record in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
        assert record[1]["seen"] == len(PARTS)


# --- SplitFed V1 -----------------------------------------------------------------------------


def test_a_server_strategy_aggregates_the_servers_copies_apart():
    both = run(SplitFedV1, 2, client_strategy=FedAvg(), server_strategy=FedAvg())
    joined = run(SplitFedV1, 2, client_strategy=FedAvg())
    assert_bit_equal(weights_of(both.arrays), weights_of(joined.arrays))

    apart = run(SplitFedV1, client_strategy=FedAvg(), server_strategy=FedMedian())
    average_of_all = run(SplitFedV1, client_strategy=FedAvg())
    median_of_all = run(SplitFedV1, client_strategy=FedMedian())
    found, means, medians = map(
        weights_of, (apart.arrays, average_of_all.arrays, median_of_all.arrays)
    )
    for name in found:
        expected = means if name.startswith("front") else medians
        assert torch.equal(found[name], expected[name]), name
    assert not torch.equal(means["head.1.weight"], medians["head.1.weight"])


def test_a_client_left_out_does_not_count_in_either_aggregation():
    parts = make_parts([8, 0, 8], normed_net)
    for more in ({}, {"server_strategy": FedAvg()}):
        with_empty = train(set_up(parts, SplitFedV1, build=normed_net, **more))
        assert [left.client for left in with_empty.history[0].left_out] == ["1"]
        first = with_empty.arrays
        assert isinstance(first, ArrayRecord)
        two = [parts[0], parts[2]]
        names = {0: "0", 1: "2"}  # the names decide on the order of the data

        def load(context, two=two):
            return two[context.node_config["partition-id"]]

        made = set_up(two, SplitFedV1, build=normed_net, **more)
        for index, context in enumerate(made[1]._contexts.values()):
            context.node_config["client-name"] = names[index]
        assert_bit_equal(weights_of(train(made).arrays), weights_of(first))
