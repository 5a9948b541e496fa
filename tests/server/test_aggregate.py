"""Aggregating segments: parameters as the Flower strategy says, buffers beside it."""

import random

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    FedYogi,
    Krum,
    QFedAvg,
)

from flsplit.errors import ConfigError, NotEnoughClientsError, SegmentMismatchError
from flsplit.flower_internals import ensure_task_identity
from flsplit.server.aggregate import SegmentAggregator, Upload, average_buffers

ensure_task_identity(run_id=1)  # Flower's strategies make messages, which ask for it

BUFFERS = {"bn.mean", "bn.count", "bn.on"}
NAMES = ["0", "1", "2"]


def tensors(weight: float, mean: float = 0.0, count: int = 0, on: bool = False):
    return {
        "w": torch.full((2, 2), weight),
        "b": torch.tensor(weight * 10),
        "bn.mean": torch.full((3,), mean),
        "bn.count": torch.tensor(count),
        "bn.on": torch.tensor(on),
    }


BEFORE = tensors(1.0, 5.0, 7)


def aggregate(strategy, uploads, before=BEFORE, server_round=1, aggregator=None):
    aggregator = aggregator or SegmentAggregator(strategy, BUFFERS)
    chosen = aggregator.configure(server_round, before, lambda: list(uploads), seed=0)
    assert chosen == list(uploads)
    return aggregator.aggregate(server_round, uploads, before)


# --- parameters ------------------------------------------------------------------------------


def test_fedavg_weighs_by_the_number_of_examples():
    found = aggregate(FedAvg(), {"0": Upload(tensors(1.0), 10), "1": Upload(tensors(5.0), 30)})
    assert found["w"].tolist() == [[4.0, 4.0], [4.0, 4.0]]
    assert found["b"].item() == 40.0
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in BEFORE.items()}
    assert list(found) == list(BEFORE)


def test_a_strategy_that_tells_clients_what_they_do_not_heed_is_refused():
    with pytest.raises(ConfigError, match="FedProx tells the clients proximal-mu, which"):
        aggregate(FedProx(proximal_mu=0.1), {name: Upload(tensors(1.0), 10) for name in "01"})


def test_qfedavg_gets_each_clients_training_loss():
    uploads = {
        name: Upload(tensors(weight), 1, {"train-loss": loss})
        for name, weight, loss in (("0", 0.0, 2.0), ("1", 0.5, 0.5))
    }
    found = aggregate(QFedAvg(client_learning_rate=0.1, q=1.0), uploads)["w"]
    # Δ = F (w - w_k) / η, and h = |w - w_k|² / η² + F / η, over all 5 numbers of w and b (10 w).
    before, own, losses = 1.0, np.array([0.0, 0.5]), np.array([2.0, 0.5])
    steps = (before - own) / 0.1
    h = (4 + 100) * steps**2 + losses / 0.1
    assert found[0, 0].item() == pytest.approx(before - (losses * steps).sum() / h.sum(), rel=1e-5)


def test_metrics_that_a_client_lacks_are_of_nobody():
    """Flower's strategies refuse replies whose metrics differ: it would be everybody's end."""
    aggregator = SegmentAggregator(FedAvg(), BUFFERS)
    metrics = [{"train-loss": 1.0, "train-accuracy": 0.5}, {"train-loss": 3.0}]
    uploads = {str(i): Upload(tensors(1.0), 1, own) for i, own in enumerate(metrics)}
    aggregate(aggregator.strategy, uploads, aggregator=aggregator)
    assert dict(aggregator.metrics) == {"train-loss": 2.0}
    scores = {
        "0": {"loss": 1.0, "accuracy": 1.0, "num-examples": 3},
        "1": {"loss": 5.0, "num-examples": 1},
    }
    assert dict(aggregator.evaluate(1, scores)) == {"loss": 2.0}


@pytest.mark.parametrize("strategy", [FedXgbBagging, FedXgbCyclic])
def test_strategies_for_trees_are_refused(strategy):
    with pytest.raises(ConfigError, match=f"{strategy.__name__} aggregates trees"):
        SegmentAggregator(strategy(), BUFFERS)


def test_the_weight_may_go_by_another_key():
    strategy = FedAvg(weighted_by_key="rows", arrayrecord_key="segment")
    found = aggregate(strategy, {"0": Upload(tensors(1.0), 1), "1": Upload(tensors(5.0), 3)})
    assert found["w"][0, 0].item() == 4.0


def test_fedtrimmedavg_cuts_off_the_outermost():
    uploads = {str(i): Upload(tensors(w), 1) for i, w in enumerate((1.0, 2.0, 6.0, 1000.0))}
    found = aggregate(FedTrimmedAvg(beta=0.25), uploads)
    assert found["w"].tolist() == [[4.0, 4.0], [4.0, 4.0]]
    assert found["b"].item() == 40.0


def test_fedmedian_takes_the_median():
    uploads = {str(i): Upload(tensors(w), 1) for i, w in enumerate((3.0, 1000.0, 1.0))}
    assert aggregate(FedMedian(), uploads)["w"].tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_krum_takes_the_one_in_the_midst_of_the_others():
    uploads = {str(i): Upload(tensors(w), 1) for i, w in enumerate((1.0, 1.25, 1.5, 1000.0))}
    found = aggregate(Krum(num_malicious_nodes=1), uploads)
    assert found["w"][0, 0].item() in (1.0, 1.25, 1.5)
    assert found["b"].item() == found["w"][0, 0].item() * 10


def adam(x, averages, eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3):
    """FedAdam as in Reddi et al., algorithm 2, with Flower's bias correction."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for number, average in enumerate(averages, start=1):
        delta = average - x
        m = beta_1 * m + (1 - beta_1) * delta
        v = beta_2 * v + (1 - beta_2) * delta**2
        rate = eta * np.sqrt(1 - beta_2 ** (number + 1)) / (1 - beta_1 ** (number + 1))
        x = x + rate * m / (np.sqrt(v) + tau)
        yield x


def test_fedadam_over_three_rounds():
    """It remembers moments between rounds, and the weights that it was configured with."""
    rng = np.random.default_rng(0)
    aggregator = SegmentAggregator(FedAdam(), set())
    now = {"w": torch.from_numpy(rng.normal(size=(2, 3)))}
    ups = [[rng.normal(size=(2, 3)) for _ in range(2)] for _ in range(3)]
    expected = list(adam(now["w"].numpy(), [0.25 * a + 0.75 * b for a, b in ups]))
    for number, pair in enumerate(ups, start=1):
        uploads = {
            str(index): Upload({"w": torch.from_numpy(values)}, examples)
            for index, (values, examples) in enumerate(zip(pair, (10, 30), strict=True))
        }
        now = aggregate(None, uploads, now, number, aggregator)
        np.testing.assert_allclose(now["w"].numpy(), expected[number - 1], rtol=1e-12)


def slow_momentum():
    return FedAvgM(server_learning_rate=0.2, server_momentum=0.5)


@pytest.mark.parametrize("strategy", [FedAdagrad, FedYogi, FedAdam, slow_momentum])
def test_strategies_that_remember_move_towards_the_average(strategy):
    aggregator, now = SegmentAggregator(strategy(), BUFFERS), tensors(0.0)
    way = [0.0]
    for number in (1, 2, 3):
        uploads = {name: Upload(tensors(1.0), 5) for name in ("0", "1")}
        now = aggregate(None, uploads, now, number, aggregator)
        assert now["w"].dtype == torch.float32
        way.append(now["w"][0, 0].item())
    assert way[3] > way[2] > way[1] > 0


# --- buffers ---------------------------------------------------------------------------------


def test_buffers_go_beside_the_strategy():
    uploads = {
        "0": Upload(tensors(1.0, mean=1.0, count=3), 10),
        "1": Upload(tensors(2.0, mean=4.0, count=8, on=True), 20),
        "2": Upload(tensors(900.0, mean=7.0, count=5), 30),
    }
    for strategy in (FedAvg(), FedMedian(), Krum()):
        found = aggregate(strategy, uploads)
        assert found["bn.mean"].tolist() == [5.0] * 3  # (1·10 + 4·20 + 7·30) / 60
        assert found["bn.count"].item() == 8
        assert found["bn.count"].dtype == torch.int64
        assert found["bn.on"].item() is True


def test_the_strategy_does_not_see_buffers():
    seen = []

    class Watching(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            seen.append(set(arrays))
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen.extend(set(reply.content["arrays"]) for reply in replies)
            return super().aggregate_train(server_round, replies)

    uploads = {name: Upload(tensors(1.0), 1) for name in NAMES}
    aggregate(Watching(), uploads)
    assert seen == [{"w", "b"}] * 4


def test_buffers_are_averaged_in_double_precision():
    big = 2.0**24
    parts = [{"x": torch.tensor([big])}, {"x": torch.tensor([big + 2])}]
    assert average_buffers(parts, [1, 1])["x"].item() == big  # ties to even, once
    half = [{"x": torch.tensor([1.0], dtype=torch.bfloat16)}, {"x": torch.tensor([2.0]).bfloat16()}]
    found = average_buffers(half, [1, 3])["x"]
    assert (found.dtype, found.item()) == (torch.bfloat16, 1.75)


def test_the_maximum_of_wide_unsigned_counts():
    for dtype, most in ((torch.uint16, 2**16), (torch.uint32, 2**32), (torch.uint64, 2**64)):
        parts = [{"n": torch.tensor(n, dtype=dtype)} for n in (most - 2, 3, most - 1)]
        found = average_buffers(parts, [1, 1, 1])["n"]
        assert (found.item(), found.dtype, found.shape) == (most - 1, dtype, ())


def test_the_maximum_of_booleans_and_negative_counts():
    parts = [{"on": torch.tensor(False), "n": torch.tensor([-3, 4], dtype=torch.int32)}] * 2
    parts[1] = {"on": torch.tensor(True), "n": torch.tensor([-5, 9], dtype=torch.int32)}
    found = average_buffers(parts, [1, 1])
    assert (found["on"].item(), found["n"].tolist(), found["n"].dtype) == (
        True, [-3, 9], torch.int32
    )  # fmt: skip


# --- without a result ------------------------------------------------------------------------


def test_without_uploads_everything_stays_as_it_was():
    aggregator = SegmentAggregator(FedAvg(), BUFFERS)
    aggregator.configure(1, BEFORE, lambda: NAMES, seed=0)
    found = aggregator.aggregate(1, {}, BEFORE)
    assert all(torch.equal(found[name], tensor) for name, tensor in BEFORE.items())


def test_a_strategy_that_returns_nothing_leaves_everything_as_it_was():
    class Nothing(FedAvg):
        def aggregate_train(self, server_round, replies):
            return None, None

    found = aggregate(Nothing(), {name: Upload(tensors(9.0, 9.0, 9), 1) for name in NAMES})
    assert all(torch.equal(found[name], tensor) for name, tensor in BEFORE.items())


def test_a_strategy_that_returns_something_else_is_refused():
    class Fewer(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            del arrays["b"]
            return arrays, metrics

    uploads = {name: Upload(tensors(1.0), 1) for name in NAMES}
    with pytest.raises(SegmentMismatchError, match="the aggregated segment: missing b"):
        aggregate(Fewer(), uploads)


def test_clients_that_dropped_out_are_missing_from_the_average():
    aggregator = SegmentAggregator(FedAvg(), BUFFERS)
    assert aggregator.configure(1, BEFORE, lambda: NAMES, seed=0) == NAMES
    uploads = {"0": Upload(tensors(1.0), 1), "2": Upload(tensors(3.0), 1)}
    assert aggregator.aggregate(1, uploads, BEFORE)["w"][0, 0].item() == 2.0


# --- choosing --------------------------------------------------------------------------------


def choose(seed, count=20, fraction=0.5, aggregator=None):
    strategy = FedAvg(fraction_train=fraction)
    aggregator = aggregator or SegmentAggregator(strategy, BUFFERS)
    names = [f"client-{index}" for index in range(count)]
    return aggregator.configure(1, BEFORE, lambda: names, seed=seed)


def test_a_strategy_that_samples_chooses_by_the_seed():
    chosen = [choose(seed) for seed in range(6)]
    assert all(len(one) == 10 for one in chosen)
    assert chosen == [choose(seed) for seed in range(6)]
    assert len({tuple(one) for one in chosen}) == 6


def test_the_order_of_the_clients_stays():
    for seed in range(5):
        numbers = [int(name.removeprefix("client-")) for name in choose(seed)]
        assert numbers == sorted(numbers)


def test_choosing_leaves_pythons_own_random_numbers_alone():
    state = random.getstate()
    random.seed(3)
    expected = [random.random(), random.random()]
    random.seed(3)
    found = [random.random()]
    choose(0)
    found.append(random.random())
    random.setstate(state)
    assert found == expected


def test_a_strategy_that_trains_nobody():
    assert choose(0, fraction=0.0) == []


def test_fewer_clients_than_the_strategy_waits_for():
    with pytest.raises(NotEnoughClientsError, match=r"FedAvg needs 2 clients .* there are 1"):
        choose(0, count=1)
    assert SegmentAggregator(FedAvg(min_available_nodes=7), set()).least_clients == 7
    assert SegmentAggregator(FedAvg(min_train_nodes=5), set()).least_clients == 5
    assert SegmentAggregator(FedAvg(fraction_train=0.0), set()).least_clients == 0


def test_a_strategy_that_asks_the_clients_something_is_refused():
    class Asking(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            return grid.send_and_receive([])

    with pytest.raises(ConfigError, match="calls its configure_train and aggregate_train only"):
        SegmentAggregator(Asking(), set()).configure(1, BEFORE, lambda: NAMES, seed=0)
