"""What one client's data can't do: end the run of everybody, or change what others compute."""

from asyncio import CancelledError
from functools import cache, partial

import pytest
import torch
from flwr.app import ArrayRecord
from reference import assert_bit_equal, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.errors import ConfigError
from flsplit.strategies import (
    CSEFSL,
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
)  # fmt: skip

METHODS = [
    CSEFSL, EPSL, FSLSAGE, GAPSL, PSL, SFLGA, SGLR, CycleSL, SequentialSL, SplitFedV1, SplitFedV2,
]  # fmt: skip
BAD = "1"


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def rows_of(who):
    rng = torch.Generator().manual_seed(who)
    inputs = torch.randn(8, 5, generator=rng)
    return inputs, (inputs.sum(1) > 0).long()


def nothing(inputs, labels):
    return inputs[:0], labels[:0]


KINDS = {
    "stray labels": lambda x, y: (x, torch.full_like(y, 7)),
    "negative labels": lambda x, y: (x, torch.full_like(y, -1)),
    "all ignored": lambda x, y: (x, torch.full_like(y, -100)),
    "too many dimensions": lambda x, y: (x, torch.stack([y, y], 1)),
    "another dtype": lambda x, y: (x, y.float()),
    "sentinel": lambda x, y: (torch.full_like(x, 1e38), y),
    "large": lambda x, y: (torch.full_like(x, 1e20), y),
}


def run(strategy, spoil, *, bad=BAD, test=False, loss=functional.cross_entropy, **options):
    def data(context):
        who = context.node_config["partition-id"]
        good = rows = TensorDataset(*rows_of(who))
        if str(who) == bad:
            rows = TensorDataset(*spoil(*good.tensors))
        return (good, rows) if test else (rows, good)

    app = client_app(model=build, cut="1", data=data, device="cpu")
    model = build()
    return strategy(
        model=model, cut="1", server_lr=0.05, batch_size=4, loss=loss, device="cpu", **options
    ).start(LocalGrid(app, 4, progress=False), ArrayRecord(model.state_dict()), 2)


@cache
def without(strategy):
    """Return what comes of the others alone."""
    return run(strategy, nothing)


@pytest.mark.chaos(
    "one client's labels or inputs can't be computed with",
    "it is left out with the reason; the others train as without it",
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", METHODS)
def test_the_others_train_as_if_it_had_no_data(strategy, kind):
    found, expected = run(strategy, KINDS[kind]), without(strategy)
    for entry in found.history:
        assert {one.client for one in entry.left_out} == {BAD}
    if strategy is SplitFedV2:
        return  # who came before it in the step's random order has trained already
    if (strategy, kind) == (GAPSL, "sentinel"):
        return  # its first gradient is finite, and GAPSL itself keeps it out
    assert_bit_equal(weights_of(found.arrays), weights_of(expected.arrays))
    assert [e.loss for e in found.history] == [e.loss for e in expected.history]


class Leaving(TensorDataset):
    """Its program would end."""

    def __init__(self, error, *tensors):
        super().__init__(*tensors)
        self.error = error

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("error", [SystemExit("no data here"), CancelledError("no data here")])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_that_would_end_its_program_is_left_out(error, at_once):
    def data(context):
        who = context.node_config["partition-id"]
        if str(who) == BAD and at_once:
            raise error
        of = partial(Leaving, error) if str(who) == BAD else TensorDataset
        return of(*rows_of(who))

    model = build()
    result = PSL(model=model, cut="1", server_lr=0.05, batch_size=4, device="cpu").start(
        LocalGrid(client_app(model=build, cut="1", data=data, device="cpu"), 4, progress=False),
        ArrayRecord(model.state_dict()),
        num_rounds=2,
    )
    for entry in result.history:
        assert {one.client for one in entry.left_out} == {BAD}
        assert "no data here" in entry.left_out[0].reason
    assert_bit_equal(weights_of(result.arrays), weights_of(without(PSL).arrays))


@pytest.mark.parametrize(
    "spoil", [partial(torch.set_grad_enabled, False), partial(torch.set_default_dtype, torch.half)]
)
def test_what_a_client_sets_for_all_of_torch_is_set_back(spoil, caplog):
    def data(context):
        who = context.node_config["partition-id"]
        rows = TensorDataset(*rows_of(who))
        if str(who) == BAD:
            rows = TensorDataset(*nothing(*rows.tensors))
            spoil()
        return rows, TensorDataset(*rows_of(who))

    model = build()
    result = PSL(model=model, cut="1", server_lr=0.05, batch_size=4, device="cpu").start(
        LocalGrid(client_app(model=build, cut="1", data=data, device="cpu"), 4, progress=False),
        ArrayRecord(model.state_dict()),
        num_rounds=2,
    )
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert f"client {BAD!r}: its code leaves torch's gradients switched" in caplog.text
    assert_bit_equal(weights_of(result.arrays), weights_of(without(PSL).arrays))


def test_a_process_that_flower_ends_is_not_its_clients_affair():
    """A signal may come at any time, also while a client's data are read."""
    handler = {"__name__": "flwr.supercore.exit.exit"}
    exec("def leave(*_): raise SystemExit(0)", handler)
    model = build()
    with pytest.raises(SystemExit):
        PSL(model=model, cut="1", device="cpu").start(
            LocalGrid(client_app(model=build, cut="1", data=handler["leave"], device="cpu"), 2),
            ArrayRecord(model.state_dict()),
        )


def probabilities(inputs, labels):
    return inputs, functional.one_hot(labels, 2).float()


@pytest.mark.parametrize("strategy", METHODS)
def test_class_probabilities_of_one_client(strategy):
    """Cross-entropy takes them; what mixes labels, or needs classes, leaves their client out."""
    found = run(strategy, probabilities)
    left_out = {one.client for entry in found.history for one in entry.left_out}
    assert left_out == ({BAD} if strategy in (CycleSL, EPSL) else set())
    if left_out:
        assert_bit_equal(weights_of(found.arrays), weights_of(without(strategy).arrays))


def sequences(inputs, labels):
    return inputs[:, None].expand(-1, 3, -1), labels


@pytest.mark.parametrize("strategy", [CSEFSL, FSLSAGE])
def test_the_first_client_does_not_say_for_all_what_rows_look_like(strategy):
    found, expected = run(strategy, sequences, bad="0"), run(strategy, nothing, bad="0")
    for entry in found.history:
        assert [one.client for one in entry.left_out] == ["0"]
    assert "logits (b, classes)" in found.history[0].left_out[0].reason
    assert_bit_equal(weights_of(found.arrays), weights_of(expected.arrays))


def one_huge_value(inputs, labels):
    inputs = inputs.clone()
    inputs[5] = 1e30
    return inputs, labels


@pytest.mark.parametrize("strategy", [CSEFSL, FSLSAGE])
def test_a_huge_value_in_a_batch_that_does_not_go_up(strategy):
    found = run(strategy, one_huge_value, upload_every=5)
    for entry in found.history:
        assert [one.client for one in entry.left_out] == [BAD]
    assert all(w.abs().max() < 10 for w in weights_of(found.arrays).values())


@pytest.mark.chaos(
    "one client's test data can't be computed with",
    "the others are evaluated as without it",
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all ignored"])
def test_the_others_are_evaluated_as_if_it_had_no_test_data(kind):
    found, expected = run(PSL, KINDS[kind], test=True), run(PSL, nothing, test=True)
    assert found.evaluate_metrics_clientapp[2] == expected.evaluate_metrics_clientapp[2]
    assert {one.client for entry in found.history for one in entry.left_out} == {BAD}


def squares(outputs, labels):
    return (outputs[:, 0] - labels).square().mean()


@pytest.mark.chaos(
    "one client's test loss is NaN or infinite",
    "the others are evaluated as without it, the ledger says so",
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_test_loss_that_is_not_finite_counts_nothing(bad):
    def spoiled(inputs, labels):
        return inputs, torch.full((len(labels),), bad)

    found = run(PSL, spoiled, test=True, loss=squares)
    expected = run(PSL, nothing, test=True, loss=squares)
    assert found.evaluate_metrics_clientapp == expected.evaluate_metrics_clientapp
    for entry in found.history:
        (left,) = entry.left_out
        assert left.client == BAD
        assert f"its test loss is {bad}" in left.reason


def test_a_test_loss_that_no_client_has_finite_is_told():
    def nan_in_tests(outputs, labels):
        return squares(outputs, labels) * (1.0 if torch.is_grad_enabled() else float("nan"))

    result = run(PSL, KINDS["sentinel"], test=True, loss=nan_in_tests)
    assert all(one["loss"] != one["loss"] for one in result.evaluate_metrics_clientapp.values())
    assert {one.client for entry in result.history for one in entry.left_out} == {BAD}


def test_test_labels_that_are_all_ignored_count_nothing():
    found = run(PSL, KINDS["all ignored"], test=True).evaluate_metrics_clientapp[2]
    expected = run(PSL, nothing, test=True).evaluate_metrics_clientapp[2]
    for name in ("loss", "accuracy"):
        assert found[name] == expected[name]


def of_two(logits, labels):
    """Know two classes, and fail in ways of its own."""
    if int(labels.max()) > 1:
        raise KeyError("class 7")
    return functional.cross_entropy(logits, labels)


def no_tensor(logits, labels):
    return functional.cross_entropy(logits, labels) if int(labels.max()) <= 1 else 0.0


def cut_off(logits, labels):
    loss = functional.cross_entropy(logits, labels % 2)
    return loss if int(labels.max()) <= 1 else loss.detach()


@pytest.mark.parametrize("strategy", [PSL, SplitFedV1, SequentialSL, CycleSL])
@pytest.mark.parametrize("loss", [of_two, no_tensor, cut_off])
def test_a_loss_that_fails_for_one_clients_labels(strategy, loss):
    found, expected = run(strategy, KINDS["stray labels"], loss=loss), without(strategy)
    assert {one.client for one in found.history[0].left_out} == {BAD}
    assert_bit_equal(weights_of(found.arrays), weights_of(expected.arrays))


class Picky:
    """A metric that takes two classes."""

    def __init__(self, most=1):
        self.most, self.rows = most, 0

    def to(self, device):
        return self

    def update(self, logits, labels):
        if int(labels.max()) > self.most:
            raise RuntimeError("more classes than expected")
        self.rows += len(labels)

    def compute(self):
        return torch.tensor(float(self.rows))


def test_a_metric_that_fails_for_one_clients_labels():
    def margin(logits, labels):
        return functional.cross_entropy(logits, labels % 2)

    found = run(PSL, KINDS["stray labels"], test=True, loss=margin, metrics={"rows": Picky()})
    assert found.evaluate_metrics_clientapp[2]["rows"] == 24.0
    assert {one.client for one in found.history[0].left_out} == {BAD}
    with pytest.raises(ConfigError, match="metrics: 'rows' can't take logits"):
        run(PSL, nothing, loss=margin, metrics={"rows": Picky(most=-1)})
