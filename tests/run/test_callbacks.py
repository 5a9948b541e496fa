"""What watches over a run: early stopping, the best model, a printout, should_stop."""

import logging

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from reference import CUT, fresh, make_parts, plain_net, split_app, weights_of

from flsplit import LocalGrid
from flsplit.account import RoundEntry
from flsplit.errors import ConfigError
from flsplit.run import Callback, EarlyStopping, FinishedRound, KeepBest, PrintMetrics
from flsplit.strategies import PSL, SplitFedV2


def finished(number, **evaluation):
    arrays = ArrayRecord({"w": torch.full((1,), float(number))})
    entry = RoundEntry(number, loss=1.0, evaluation=evaluation, metrics={"own": 0.5})
    return FinishedRound(entry, 10, arrays, {"central": 2.0})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"patience": "3"}, "patience is '3', expected a whole number of at least 1"),
        ({"min_delta": "0"}, "min_delta is '0', expected a finite number at least 0"),
        ({"min_delta": -1.0}, "min_delta is -1.0, expected a finite number at least 0"),
        ({"metric": 3}, "metric is 3, expected a name such as 'loss'"),
    ],
)
def test_what_early_stopping_cannot_work_with(given, told):
    with pytest.raises(ConfigError, match=f"^{told}$"):
        EarlyStopping(**given)


def rounds_until_stop(callback, values, name="loss"):
    for number, value in enumerate(values, 1):
        if callback.on_round_end(finished(number, **{name: value})):
            return number
    return None


def start(cls=PSL, num_rounds=5, client_strategy=None, **arguments):
    options = {} if client_strategy is None else {"client_strategy": client_strategy}
    options |= {k: arguments.pop(k) for k in ("callbacks", "checkpoint_dir", "resume")
                if k in arguments}  # fmt: skip
    model, parts = fresh(plain_net), make_parts((8, 8))
    strategy = cls(model=model, cut=CUT, server_lr=0.05, batch_size=4, device="cpu", **options)
    grid = LocalGrid(split_app(plain_net, parts, parts), 2, progress=False)
    return strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=num_rounds, **arguments)


@pytest.mark.parametrize(
    ("options", "values", "stop"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.5, 2.0, 1.0], 4),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.9, 2.1], None),
        ({"patience": 1, "min_delta": 0.5}, [3.0, 2.4, 2.0], 3),
        ({"patience": 1, "mode": "max"}, [3.0, 4.0, 4.0], 3),
        ({"patience": 2}, [float("nan"), 2.0, 1.0], None),
    ],
)
def test_early_stopping_waits_for_so_many_rounds_without_an_improvement(options, values, stop):
    assert rounds_until_stop(EarlyStopping("loss", **options), values) == stop


def test_more_accuracy_is_better_and_less_loss():
    assert (
        rounds_until_stop(EarlyStopping("accuracy", patience=1), [0.5, 0.6, 0.6], "accuracy") == 3
    )
    assert rounds_until_stop(EarlyStopping("val-loss", patience=1), [0.5, 0.6], "val-loss") == 2


def test_keep_best_keeps_the_arrays_of_the_best_round():
    keep = KeepBest("accuracy")
    for number, value in enumerate([0.5, 0.8, 0.7], 1):
        keep.on_round_end(finished(number, accuracy=value))
    assert (keep.best, keep.best_round) == (0.8, 2)
    assert keep.arrays["w"].numpy().tolist() == [2.0]
    other = KeepBest("accuracy")
    other.load_state_dict(keep.state_dict())
    assert other.best_round == 2
    assert other.arrays["w"].numpy().tolist() == [2.0]


def test_any_metric_can_be_watched_and_one_that_is_not_there_is_named():
    round_ = finished(1, accuracy=0.5)
    names = ("accuracy", "train-loss", "own", "central")
    assert [round_.metric(name) for name in names] == [0.5, 1.0, 0.5, 2.0]
    with pytest.raises(ConfigError, match=r"no metric 'acuracy' \(it has accuracy, central, own"):
        round_.metric("acuracy")


@pytest.mark.parametrize("options", [{"patience": 0}, {"mode": "best"}])
def test_options_that_cannot_be_used(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EarlyStopping("loss", **options)


def test_something_else_than_a_callback_is_refused():
    with pytest.raises(ConfigError, match="callbacks: one of them is 'stop'"):
        PSL(model=fresh(plain_net), cut=CUT, callbacks=["stop"])


class Misspelt(Callback):
    def on_round_ends(self, round_):
        return True


class Without(Callback):
    def round_end(self, round_):
        return True


@pytest.mark.parametrize(
    ("callback", "told"),
    [
        (Misspelt, "Misspelt has on_round_ends, expected on_round_end or on_exchange"),
        (Without, "Without has neither on_round_end nor on_exchange"),
    ],
)
def test_a_callback_that_nobody_would_call_is_refused(callback, told):
    with pytest.raises(ConfigError, match=f"^callbacks: {told}$"):
        PSL(model=fresh(plain_net), cut=CUT, callbacks=[callback()])


@pytest.mark.parametrize(("method", "times"), [(PSL, 1), (SplitFedV2, 0)])
def test_keep_best_says_once_that_it_keeps_no_whole_model(method, times, caplog):
    caplog.set_level(logging.WARNING, "flwr")
    start(method, num_rounds=2, callbacks=[KeepBest()])
    assert caplog.text.count("KeepBest keeps the server segment alone") == times


class StopAt(Callback):
    def __init__(self, last):
        self.last, self.seen = last, []

    def on_round_end(self, round_):
        self.seen.append(round_.entry.round)
        return round_.entry.round == self.last


def test_a_run_ends_after_the_round_and_is_the_shorter_run():
    stop, watch = StopAt(2), StopAt(0)
    result = start(SplitFedV2, callbacks=[stop, watch])
    assert stop.seen == watch.seen == [1, 2]  # all callbacks see the last round, too
    shorter = start(SplitFedV2, num_rounds=2)
    assert [e.loss for e in result.history] == [e.loss for e in shorter.history]
    own, other = weights_of(result.arrays), weights_of(shorter.arrays)
    assert all(torch.equal(own[name], other[name]) for name in other)


@pytest.mark.parametrize(
    "should_stop", [lambda: True, lambda number: number == 1, lambda number, result: number == 1]
)
def test_should_stop_gets_as_much_as_it_takes(should_stop):
    assert len(start(should_stop=should_stop).history) == 1


def test_callbacks_go_on_where_a_checkpoint_left_them(tmp_path):
    folder = str(tmp_path)
    start(num_rounds=2, callbacks=[KeepBest("loss", mode="max")], checkpoint_dir=folder)
    keep = KeepBest("loss", mode="max")  # the first round's loss is the largest
    start(num_rounds=4, callbacks=[keep], checkpoint_dir=folder, resume=True)
    assert keep.best_round == 1


def test_a_method_that_forgets_to_say_its_state_is_refused_at_the_first_checkpoint(tmp_path):
    class Counting(PSL):
        def begin_run(self):
            self.steps_so_far = 0

        def step(self, step):
            self.steps_so_far += 1
            super().step(step)

    assert len(start(Counting, num_rounds=1).history) == 1  # without checkpoints it may
    with pytest.raises(ConfigError, match=r"Counting remembers 'steps_so_far'.*no state_dict"):
        start(Counting, num_rounds=1, checkpoint_dir=str(tmp_path))


def test_state_that_cannot_be_stored_is_named(tmp_path):
    class Odd(PSL):
        def state_dict(self):
            return super().state_dict() | {"odd": {"thing": object()}}

    with pytest.raises(ConfigError, match="state/method/odd/thing is object"):
        start(Odd, num_rounds=1, checkpoint_dir=str(tmp_path))


def test_metrics_are_printed_as_flower_prints_them(caplog):
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        start(num_rounds=1, callbacks=[PrintMetrics()])
    finally:
        logger.removeHandler(caplog.handler)
    assert "Aggregated MetricRecord (train): {'train-loss'" in caplog.text
    assert "Aggregated MetricRecord (evaluate, clients): {'loss'" in caplog.text


def test_metric_aggregation_functions_of_a_client_strategy_are_called():
    seen = {}

    def aggregate(which):
        def function(records, key):
            seen[which] = [dict(one["metrics"]) for one in records]
            assert key == "num-examples"
            return MetricRecord({f"{which}-seen": float(len(records))})

        return function

    strategy = FedAvg(
        train_metrics_aggr_fn=aggregate("train"), evaluate_metrics_aggr_fn=aggregate("evaluate")
    )
    result = start(SplitFedV2, num_rounds=1, client_strategy=strategy)
    entry = result.history[0]
    assert result.train_metrics_clientapp[1]["train-seen"] == 2.0
    assert result.evaluate_metrics_clientapp[1]["evaluate-seen"] == 2.0
    # Both clients have 8 rows: the means of their means are the ledger's.
    for which, name, mean in (
        ("train", "train-loss", entry.loss),
        ("train", "train-accuracy", entry.accuracy),
        ("evaluate", "loss", entry.evaluation["loss"]),
        ("evaluate", "accuracy", entry.evaluation["accuracy"]),
    ):
        assert sum(one[name] for one in seen[which]) / 2 == pytest.approx(mean)
        assert {one["num-examples"] for one in seen[which]} == {8}


def test_a_differential_privacy_wrapper_says_what_it_does_not_cover(caplog):
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as Wrapper

    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        wrapped = Wrapper(FedAvg(), 1.0, 1.0, 2)
        PSL(model=fresh(plain_net), cut=CUT, client_strategy=wrapped)
    finally:
        logger.removeHandler(caplog.handler)
    assert "sees the client segments only" in caplog.text
