"""Evaluation sees every test sample once, through the model that would be deployed."""

import pytest
import torch
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg
from reference import (
    CUT,
    MOMENTUM,
    NUM_CLASSES,
    assert_bit_equal,
    fresh,
    make_parts,
    noisy_net,
    plain_net,
    run_split,
    weights_of,
    whole_of,
)
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from flsplit.errors import ConfigError
from flsplit.strategies import PSL, SequentialSL, SplitFedV1, SplitFedV2
from flsplit.vision import load_torchvision

SIZES, TEST_SIZES = (8, 12, 5), (3, 9, 6)  # evaluated by 4: ragged last batches
WHOLE = [SplitFedV1, SplitFedV2, SequentialSL]


def run(strategy_class, build=noisy_net, **options):
    tests = make_parts(TEST_SIZES, build)
    defaults = {"optimizer": MOMENTUM, "evaluate_batch_size": 4, "tests": tests}
    result = run_split(strategy_class, build, make_parts(SIZES, build), **(defaults | options))
    return result, tests


def logits_by_hand(models, tests, build=noisy_net):
    """Return logits and labels of all test samples, one client's model after the other."""
    logits, labels = [], []
    for weights, test in zip(models, tests, strict=True):
        model = fresh(build).eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            logits.append(model(test.tensors[0]))
        labels.append(test.tensors[1])
    return torch.cat(logits), torch.cat(labels)


def assert_scores(evaluation, logits, labels):
    assert evaluation["num-examples"] == len(labels)
    assert evaluation["loss"] == pytest.approx(
        functional.cross_entropy(logits, labels).item(), rel=1e-5
    )
    correct = int((logits.argmax(1) == labels).sum())
    assert evaluation["accuracy"] == correct / len(labels)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_psl_evaluates_each_client_with_its_own_segment(cache):
    result, tests = run(PSL, share_client_segments=True, cache=cache)
    models = [whole_of(result, client) for client in ("0", "1", "2")]
    assert_scores(result.history[-1].evaluation, *logits_by_hand(models, tests))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("strategy_class", WHOLE)
def test_a_whole_model_is_evaluated_as_it_is_returned(strategy_class, cache):
    result, tests = run(strategy_class, cache=cache)
    models = [weights_of(result.arrays)] * 3
    assert_scores(result.history[-1].evaluation, *logits_by_hand(models, tests))


@pytest.mark.parametrize("strategy_class", [PSL, *WHOLE])
def test_evaluation_changes_nothing_in_training(strategy_class):
    share = {"share_client_segments": True}
    evaluated, _ = run(strategy_class, **share)
    not_evaluated, _ = run(strategy_class, fraction_evaluate=0.0, **share)
    assert_bit_equal(weights_of(evaluated.arrays), weights_of(not_evaluated.arrays))
    for client, segment in evaluated.client_segments.items():
        assert_bit_equal(weights_of(segment), weights_of(not_evaluated.client_segments[client]))
    assert [e.loss for e in evaluated.history] == [e.loss for e in not_evaluated.history]
    assert not_evaluated.history[0].evaluation == {}
    assert not not_evaluated.evaluate_metrics_clientapp


class Counts(nn.Module):
    """Counts its batches, also those of a test, and keeps a mean of what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        self.batches += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x + self.mean


def counting_net():
    net = plain_net()
    net.front.append(Counts())
    net.middle.append(Counts())
    return net


@pytest.mark.parametrize("strategy_class", [PSL, SplitFedV1, SequentialSL])
def test_evaluation_moves_no_buffers(strategy_class):
    options = {"build": counting_net, "share_client_segments": True}
    evaluated, _ = run(strategy_class, **options)
    without, _ = run(strategy_class, fraction_evaluate=0.0, **options)
    assert_bit_equal(weights_of(evaluated.arrays), weights_of(without.arrays))
    for client, segment in evaluated.client_segments.items():
        assert_bit_equal(weights_of(segment), weights_of(without.client_segments[client]))


def test_the_batch_size_of_evaluation_is_of_no_account():
    whole, _ = run(PSL, evaluate_batch_size=512)
    for batch_size in (1, 4):
        batched, _ = run(PSL, start={"evaluate_config": {"batch-size": batch_size}})
        for one, other in zip(whole.history, batched.history, strict=True):
            assert one.evaluation == pytest.approx(other.evaluation, rel=1e-5)


@pytest.mark.parametrize(
    ("how", "batches", "rows"),
    [("option", 1, (3, 4, 4)), ("config", 2, (3, 8, 6)), ("option", 3, TEST_SIZES)],
)
def test_each_client_evaluates_no_more_than_so_many_batches(how, batches, rows):
    """Batches have 4 examples, so the clients evaluate their first 4 or 8, if they have as many."""
    limit = {"evaluate_batches": batches}
    if how == "config":
        limit = {"evaluate_batches": 7, "start": {"evaluate_config": {"batches": batches}}}
    result, tests = run(SplitFedV1, **limit)
    first = [TensorDataset(*test[:n]) for test, n in zip(tests, rows, strict=True)]
    models = [weights_of(result.arrays)] * 3
    assert_scores(result.history[-1].evaluation, *logits_by_hand(models, first))


@pytest.mark.parametrize("limit", [0, None])
def test_without_a_limit_all_batches_are_evaluated(limit):
    limited, _ = run(PSL, evaluate_batches=limit)
    assert limited.history[-1].evaluation["num-examples"] == sum(TEST_SIZES)
    config = {"evaluate_batches": 1, "start": {"evaluate_config": {"batches": 0}}}
    overridden, _ = run(PSL, **config)
    assert overridden.history[-1].evaluation == limited.history[-1].evaluation


@pytest.mark.parametrize("value", [-1, 1.5, "all", True])
def test_a_number_of_batches_that_is_none_is_refused(value):
    expected = "evaluate_config: batches is .*, expected a whole number of at least 0"
    with pytest.raises(ConfigError, match=expected):
        run(PSL, plain_net, start={"evaluate_config": {"batches": value}})


def test_clients_without_test_data_evaluate_nothing():
    tests = [*make_parts((3,), plain_net), *make_parts((0,)), *make_parts((6,))]
    result, _ = run(PSL, plain_net, tests=tests, share_client_segments=True)
    models = [whole_of(result, client) for client in ("0", "2")]
    logits, labels = logits_by_hand(models, [tests[0], tests[2]], plain_net)
    assert_scores(result.history[-1].evaluation, logits, labels)
    nothing, _ = run(PSL, plain_net, tests=None)
    assert nothing.history[-1].evaluation == {}
    assert not nothing.evaluate_metrics_clientapp


def test_a_fraction_of_the_clients_evaluates():
    result, _ = run(PSL, plain_net, fraction_evaluate=0.34, rounds=6)
    counts = {entry.evaluation["num-examples"] for entry in result.history}
    assert counts <= set(TEST_SIZES)
    assert len(counts) > 1


def test_a_torchmetrics_metric_sees_all_samples_and_starts_anew_every_round():
    load_torchvision()  # torchmetrics imports it
    from torchmetrics.classification import MulticlassRecall

    metric = MulticlassRecall(num_classes=3, average="macro")
    result, tests = run(SplitFedV1, metrics={"recall": metric}, rounds=3)
    logits, labels = logits_by_hand([weights_of(result.arrays)] * 3, tests)
    predicted = logits.argmax(1)
    recalls = [(predicted[labels == c] == c).float().mean().item() for c in range(3)]
    evaluation = result.evaluate_metrics_clientapp[3]
    assert evaluation["recall"] == pytest.approx(sum(recalls) / 3, rel=1e-5)
    assert metric.update_count == 0, "the user's metric was used"


# --- central evaluation ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy_class", "options"),
    [*((one, {}) for one in WHOLE), (PSL, {"client_strategy": FedAvg()})],
)
def test_central_evaluation_gets_the_whole_model_of_every_round(strategy_class, options):
    seen = {}

    def evaluate(server_round, arrays):
        seen[server_round] = weights_of(arrays)
        fresh(noisy_net).load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord({"rounds": server_round}) if server_round != 1 else None

    result, _ = run(strategy_class, start={"evaluate_fn": evaluate}, **options)
    assert list(seen) == [0, 1, 2]
    assert_bit_equal(seen[0], fresh(noisy_net).state_dict())
    assert_bit_equal(seen[2], weights_of(result.arrays))
    assert not torch.equal(seen[1]["head.1.weight"], seen[2]["head.1.weight"])
    assert not torch.equal(seen[1]["front.0.weight"], seen[2]["front.0.weight"])
    metrics = result.evaluate_metrics_serverapp
    assert {r: m["rounds"] for r, m in metrics.items()} == {0: 0, 2: 2}


def test_central_evaluation_without_a_whole_model_is_refused_at_the_start():
    calls = []
    with pytest.raises(ConfigError, match=r"PSL keeps a client segment .*client_strategy"):
        run(PSL, start={"evaluate_fn": lambda *args: calls.append(args)})
    assert not calls


# --- who gets which segments -----------------------------------------------------------------


def test_psl_returns_the_server_segment_alone():
    result, _ = run(PSL)
    assert set(result.arrays) == {k for k in fresh(noisy_net).state_dict() if k[:5] != "front"}
    assert result.client_segments == {}


def test_clients_share_their_segments_if_asked_to():
    result, _ = run(PSL, share_client_segments=True)
    assert set(result.client_segments) == {"0", "1", "2"}
    segments = [weights_of(one) for one in result.client_segments.values()]
    assert not torch.equal(segments[0]["front.0.weight"], segments[1]["front.0.weight"])
    fresh(noisy_net).load_state_dict(whole_of(result, "1"))


@pytest.mark.parametrize("strategy_class", WHOLE)
def test_what_is_returned_loads_into_the_unsplit_model(strategy_class):
    result, _ = run(strategy_class, share_client_segments=True)
    assert list(result.arrays) == list(fresh(noisy_net).state_dict())
    fresh(noisy_net).load_state_dict(result.arrays.to_torch_state_dict())
    assert result.client_segments == {}


class Scripted:
    """What Scores needs of a metric; computes what it is told to."""

    def __init__(self, value=None, error=None):
        self.value, self.error = value, error

    def to(self, _device):
        return self

    def update(self, _logits, _labels):
        if self.error:
            raise self.error

    def compute(self):
        return self.value


def test_every_number_of_a_metric_has_a_name():
    metrics = {
        "f1": Scripted(torch.tensor(0.5)),
        "recall": Scripted(torch.tensor([0.25, 0.75])),
        "confusion": Scripted(torch.tensor([[1, 2], [3, 4]])),
        "both": Scripted({"a": torch.tensor(1.0), "b": 2.0}),
    }
    result, _ = run(PSL, metrics=metrics)

    evaluation = result.history[-1].evaluation
    del evaluation["loss"], evaluation["accuracy"], evaluation["num-examples"]
    assert evaluation == {
        "f1": 0.5,
        "recall/0": 0.25,
        "recall/1": 0.75,
        "confusion/0/0": 1,
        "confusion/0/1": 2,
        "confusion/1/0": 3,
        "confusion/1/1": 4,
        "both/a": 1.0,
        "both/b": 2.0,
    }


@pytest.mark.parametrize("error", [ValueError("expected 7 classes"), KeyError("7 classes")])
def test_a_metric_that_cannot_take_the_logits_is_named(error):
    expected = r"metrics: 'f1' can't take logits of shape \(3, .*7 classes"
    with pytest.raises(ConfigError, match=expected):
        run(PSL, metrics={"f1": Scripted(error=error)})


def test_a_metric_that_gives_no_numbers_is_named():
    with pytest.raises(ConfigError, match=r"metrics: 'f1' can't be computed: "):
        run(PSL, metrics={"f1": Scripted("many")})


def test_the_points_of_a_curve_have_names_too():
    curve = torch.tensor([0.0, 1.0]), [torch.tensor([0.5]), torch.tensor(0.25)]
    evaluation = run(PSL, metrics={"roc": Scripted(curve)})[0].history[-1].evaluation
    points = {name: value for name, value in evaluation.items() if name.startswith("roc")}
    assert points == {"roc/0/0": 0.0, "roc/0/1": 1.0, "roc/1/0/0": 0.5, "roc/1/1": 0.25}


def test_a_metric_that_was_used_before_starts_anew():
    load_torchvision()  # torchmetrics imports it
    from torchmetrics.classification import MulticlassAccuracy

    metric = MulticlassAccuracy(NUM_CLASSES, average="micro")
    metric.update(torch.eye(NUM_CLASSES), torch.arange(NUM_CLASSES).roll(1))
    evaluation = run(PSL, metrics={"own": metric})[0].history[-1].evaluation
    assert evaluation["own"] == pytest.approx(evaluation["accuracy"])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Scripted, "'f1' is the class Scripted"),
        (lambda *_: 1.0, "'f1' is .* a torchmetrics metric"),
    ],
)
def test_what_is_no_metric_is_refused_at_once(metric, expected):
    with pytest.raises(ConfigError, match=expected):
        PSL(model=noisy_net(), cut=CUT, metrics={"f1": metric})
