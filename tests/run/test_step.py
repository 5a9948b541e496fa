"""A step: shares and weights, what is counted and drawn, and what a method is refused."""

from types import SimpleNamespace

import pytest
import torch
from flwr.app import ArrayRecord
from reference import fresh, noisy_net, plain_net
from torch import nn
from torch.nn import functional

from flsplit.cut import split
from flsplit.errors import MethodError, NonFiniteError
from flsplit.losses import Criterion
from flsplit.run import ParallelStrategy
from flsplit.run.shares import client_shares
from flsplit.server.client_batch import ClientBatch
from tests.server.one_step import MadeUpRound, RecordedSegment, make_step


def batch(name, rows, examples, shape=(6,)):
    rng = torch.Generator().manual_seed(rows)
    labels = torch.zeros(rows, dtype=torch.int64)
    return ClientBatch(name, torch.randn(rows, *shape, generator=rng), labels, examples)


BATCHES = [batch("0", 4, 30), batch("1", 4, 50), batch("2", 2, 20)]
IMAGES = [batch("0", 4, 30, (3, 4, 4)), batch("1", 4, 50, (3, 4, 4))]


def segment_of(build=plain_net):
    return RecordedSegment(split(fresh(build), "front").server)


def step_of(build=plain_net, batches=BATCHES, **options):
    return make_step(segment_of(build), batches, **options)


# --- shares and weights ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ("examples", {"0": 0.3, "1": 0.5, "2": 0.2}),
        ("batch", {"0": 0.4, "1": 0.4, "2": 0.2}),
        ("equal", {"0": 1 / 3, "1": 1 / 3, "2": 1 / 3}),
    ],
)
def test_shares_follow_data_rows_or_nothing(shares, expected):
    assert client_shares(BATCHES, shares) == pytest.approx(expected)
    assert step_of(shares=shares).shares == pytest.approx(expected)


@pytest.mark.parametrize("shares", ["examples", "batch", "equal"])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 49, 1000])
def test_shares_sum_to_one_for_any_number_of_clients(shares, count):
    many = [batch(str(i), 1 + i % 3, 1 + i % 7) for i in range(count)]
    assert sum(client_shares(many, shares).values()) == pytest.approx(1.0, rel=1e-12)


def test_shares_are_renormalised_over_the_clients_in_the_step():
    expected = {"0": 3 / 8, "1": 5 / 8}
    assert client_shares(BATCHES[:2], "examples") == pytest.approx(expected)
    step = step_of()
    assert step.gradients(step.batches[:2]).weights == pytest.approx(expected)


def test_one_client_has_exactly_all():
    """No rounding, or one client would not be bit-equal to training the whole model."""
    for examples in (1, 3, 7, 49):
        assert client_shares([batch("0", 3, examples)], "examples") == {"0": 1.0}


def test_a_sum_weighs_s_times_the_mean():
    mean = step_of()
    assert mean.weights == mean.shares == client_shares(BATCHES, "examples")
    total = step_of(reduction="sum")
    assert total.weights == pytest.approx({"0": 0.9, "1": 1.5, "2": 0.6})
    assert total.gradients().weights == total.weights
    equal = step_of(reduction="sum", shares="equal")
    assert equal.weights == pytest.approx({"0": 1.0, "1": 1.0, "2": 1.0})


def test_correct_answers_are_counted_where_labels_are_classes():
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    criterion = Criterion(nn.functional.cross_entropy, torch.device("cpu"))

    def count(logits, labels):
        return criterion(logits, labels)[1][1:]

    assert count(logits, torch.tensor([1, 1, 1])) == (2, 3)
    assert count(logits, torch.tensor([1, 1, -100])) == (1, 2)
    assert count(logits, torch.tensor([[0.0, 1.0]] * 3)) == (0, 0)
    assert count(logits[:, 0], torch.tensor([0.0, 1.0, 0.0])) == (0, 0)
    masks = torch.zeros(2, 4, 4, dtype=torch.int64)
    assert count(torch.zeros(2, 3, 4, 4), masks) == (32, 32)


def test_progress_goes_from_0_towards_1():
    def progress(server_round, index):
        round_ = MadeUpRound(server_round, num_rounds=2)
        return step_of(round_=round_, index=index, num_steps=4).progress

    assert [progress(1, 0), progress(1, 2), progress(2, 0), progress(2, 3)] == [0, 0.25, 0.5, 0.875]


# --- what is counted -------------------------------------------------------------------------


@pytest.mark.parametrize("per_client", [False, True])
def test_every_gradients_rows_are_counted_but_each_batchs_loss_once(per_client):
    round_ = MadeUpRound()
    step = step_of(round_=round_)
    found = step.gradients(per_client=per_client)
    assert found.rows == round_.entry.rows == 10
    step.gradients(step.batches[:1])
    assert round_.entry.rows == 10 + 4
    step.update(found)
    step.end(replies_expected=False)
    assert round_.losses == list(found.losses.items())


def test_the_rows_of_backward_passes_are_counted():
    round_ = MadeUpRound()
    step = step_of(round_=round_)
    forward = step.forward(step.pooled())
    assert round_.entry.rows == 0
    gradients, by_rows = step.backward(forward, torch.ones_like(forward.outputs))
    assert round_.entry.rows == len(by_rows) == 10
    assert len(gradients) == 4


def test_a_fleets_clock_is_told_of_each_computation():
    told = []

    def stepped(steps, *, started, **rows):
        assert steps == [("0", 3), ("1", 3), ("2", 3)]
        told.append(tuple(rows[f"{kind}_rows"] for kind in ("forward", "backward", "logit")))

    step = step_of(round_=MadeUpRound(clock=SimpleNamespace(stepped=stepped)), index=3, num_steps=4)
    step.gradients()
    forward = step.forward(step.pooled())
    step.logit_gradients(forward.outputs)
    step.backward(forward, torch.ones_like(forward.outputs))
    assert told == [(10, 10, 10), (10, 0, 0), (0, 0, 10), (0, 10, 0)]


def test_forward_and_backward_by_hand_give_what_gradients_gives():
    step = step_of()
    forward = step.forward(step.pooled())
    by_logits = step.logit_gradients(forward.outputs)
    weighted = torch.cat([step.weights[name] * g for name, g in by_logits.items()])
    gradients, by_rows = step.backward(forward, weighted)
    found = step_of().gradients()
    for one, other in zip(gradients, found.server_gradients, strict=True):
        torch.testing.assert_close(one, other)
    pieces = torch.split(by_rows, [4, 4, 2])
    for (name, cut), piece in zip(found.cut_gradients.items(), pieces, strict=True):
        torch.testing.assert_close(piece / step.weights[name], cut)


# --- what is drawn ---------------------------------------------------------------------------


def losses_of(step, times, **options):
    return [tuple(step.gradients(**options).losses.values()) for _ in range(times)]


@pytest.mark.parametrize("pools", [True, False])
def test_each_computation_draws_masks_of_its_own(pools):
    drawn = losses_of(step_of(noisy_net, IMAGES, pools=pools), 3)
    assert len(set(drawn)) == 3
    assert losses_of(step_of(noisy_net, IMAGES, pools=pools), 3) == drawn
    others = {"round_": MadeUpRound(seed=1)}, {"index": 1, "num_steps": 2}
    for other in others:
        redrawn = losses_of(step_of(noisy_net, IMAGES, pools=pools, **other), 3)
        assert not set(redrawn) & set(drawn)


def test_what_a_method_draws_follows_the_runs_seed():
    def drawn(seed, index=0):
        step = step_of(round_=MadeUpRound(seed=seed), index=index)
        first = step.rng.random()
        assert step.rng.random() != first  # one stream for the step
        return first, torch.rand(1, generator=step.generator("mine")).item()

    assert drawn(0) == drawn(0)
    for other in (drawn(1), drawn(0, index=1)):
        assert all(one != two for one, two in zip(drawn(0), other, strict=True))


def test_shuffled_rows_are_all_clients_rows_once():
    step = step_of()
    mixed = [one for batches in step.shuffled_rows(4) for one in batches]
    assert [len(one) for one in mixed] == [4, 4, 2]
    rows = torch.cat([one.smashed for one in mixed])
    assert not torch.equal(rows, step.pooled())
    assert sorted(rows.tolist()) == sorted(step.pooled().tolist())


# --- what becomes of it ----------------------------------------------------------------------


def test_clients_are_told_what_was_replied_and_others_nothing():
    step = step_of(index=2, num_steps=3)
    found = step.gradients()
    step.update(found, lr_factor=3.0)
    ((gradients, factor),) = step._segment.steps
    assert factor == 3.0
    for one, other in zip(gradients, found.server_gradients, strict=True):
        assert torch.equal(one, other)
    replied = {name: found.cut_gradients[name] for name in ("0", "2")}
    step.reply(replied, shared_rows={"0": 3}, repeated=["0"])
    told = step.end(replies_expected=True)
    assert set(told) == {"0", "1", "2"}
    assert {one.step for one in told.values()} == {2}
    assert told["0"].gradient is replied["0"]
    assert (told["0"].shared_rows, told["0"].repeated) == (3, True)
    assert (told["2"].shared_rows, told["2"].repeated) == (0, False)
    assert told["1"].gradient is None


def test_a_server_that_stays_as_it_is_on_purpose_is_fine():
    step = step_of()
    step.leave()
    assert {one.gradient for one in step.end(replies_expected=False).values()} == {None}
    assert step._segment.steps == []


# --- what a method is refused ----------------------------------------------------------------


class Forgetful(ParallelStrategy):
    def step(self, step):
        step.reply(step.gradients().cut_gradients)


def test_a_step_that_forgets_the_server_is_refused():
    model = plain_net()
    strategy = Forgetful(model=model, cut="front", device="cpu")
    strategy.begin(ArrayRecord(model.state_dict()))
    with pytest.raises(
        MethodError, match=r"^round 2, step 1: Forgetful\.step ended without update\(\)"
    ):
        strategy.take_step(MadeUpRound(2, num_rounds=3), 1, 4, BATCHES)


OK = torch.zeros(4, 6)
REPLIES = [
    "shape", "another's shape", "NaN", "inf", "unknown client", "None", "text", "list",
    "no gradients", "one gradient", "gradients in a list",
]  # fmt: skip


@pytest.mark.parametrize(
    ("replied", "what"),
    [
        ({"0": torch.zeros(1, 6)}, r"client '0' with a tensor of shape \(1, 6\).*shape \(4, 6\)"),
        ({"0": OK, "2": OK}, r"client '2' with a tensor of shape \(4, 6\).*shape \(2, 6\)"),
        ({"0": OK * float("nan")}, "client '0' with NaN or infinite values"),
        ({"1": OK + float("inf")}, "client '1' with NaN or infinite values"),
        ({"3": OK}, "client '3', expected one of '0', '1', '2'"),
        ({"0": None}, r"client '0' with None, expected a cut-layer gradient of shape \(4, 6\)"),
        ({"0": "all"}, "client '0' with 'all', expected"),
        ({"0": [0.0]}, "client '0' with a list, expected"),
        (None, "None, expected a dict"),
        (OK, r"a tensor of shape \(4, 6\), expected a dict"),
        ([OK], "a list, expected a dict"),
    ],
    ids=REPLIES,
)
def test_replies_that_no_client_can_step_with_are_refused(replied, what):
    step = step_of()
    with pytest.raises(MethodError, match=rf"^Mine\.step replied (to|with) {what}"):
        step.reply(replied)


UPDATES = ["too few", "none", "None", "dict", "tensor", "shape", "number"]


def gradients_but(**changed):
    shapes = [(10, 6), (10,), (3, 10), (3,)]
    return [changed.get(f"at{i}", torch.ones(shape)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (gradients_but()[:3], "a list, expected 4 gradients, one per trainable parameter"),
        ([], "a list, expected 4 gradients"),
        (None, "None, expected 4 gradients"),
        ({"0": torch.ones(3)}, "a dict, expected 4 gradients"),
        (torch.ones(4), r"a tensor of shape \(4,\), expected 4 gradients"),
        (
            gradients_but(at2=torch.ones(10, 3)),
            r"a tensor of shape \(10, 3\) for parameter 2, expected a gradient of shape \(3, 10\)",
        ),
        (gradients_but(at1=0.5), r"0\.5 for parameter 1, expected a gradient of shape \(10,\)"),
    ],
    ids=UPDATES,
)
def test_updates_with_something_else_than_gradients_are_refused(given, what):
    step = step_of()
    with pytest.raises(MethodError, match=rf"^Mine\.step updated with {what}"):
        step.update(given)
    assert step._segment.steps == []
    with pytest.raises(MethodError, match="ended without update"):
        step.end(replies_expected=True)


def test_parameters_without_a_gradient_may_have_none():
    step = step_of()
    before = [p.detach().clone() for p in step._segment.parameters]
    step.update(gradients_but(at2=None))
    moved = [
        not torch.equal(p, old) for p, old in zip(step._segment.parameters, before, strict=True)
    ]
    assert moved == [True, True, False, True]


def test_an_update_that_is_not_finite_moves_nothing():
    step = step_of()
    with pytest.raises(
        NonFiniteError, match=r"server segment is NaN or infinite \(round 1, step 0"
    ):
        step.update(gradients_but(at1=torch.full((10,), float("nan"))))
    assert step._segment.steps == []


class Overflowing(nn.Module):
    """BatchNorm, and a weight whose gradient is infinite where the loss is not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.head(self.norm(x)) + self.weight.sqrt()


@pytest.mark.parametrize("per_client", [False, True])
def test_gradients_that_are_not_finite_leave_buffers_as_they_were(per_client):
    step = make_step(RecordedSegment(Overflowing()), BATCHES)
    before = list(map(torch.clone, step._segment.buffers))
    with pytest.raises(NonFiniteError, match=r"NaN or infinite \(round 1, step 0, clients '0'"):
        step.update(step.gradients(per_client=per_client))
    for buffer, old in zip(step._segment.module.buffers(), before, strict=True):
        assert torch.equal(buffer, old)
    assert step._segment.steps == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [("fine", "'fine'"), (None, "None"), ([1.0], "a list")],
)
def test_only_numbers_are_recorded(value, shown):
    round_ = MadeUpRound()
    step = step_of(round_=round_)
    step.record({"depth": 2, "width": torch.tensor(0.5)})
    assert round_.metrics == {"depth": 2.0, "width": 0.5}
    with pytest.raises(
        MethodError,
        match=rf"^Mine\.step recorded 'note' as {shown}, expected a number$",
    ):
        step.record({"note": value})


def test_logit_gradients_are_of_the_loss_that_was_given():
    segment = RecordedSegment(
        split(fresh(plain_net), "front").server,
        loss=lambda logits, labels: 2 * functional.cross_entropy(logits, labels),
    )
    twice, once = make_step(segment, BATCHES), step_of()
    outputs = once.forward(once.pooled()).outputs
    expected = once.logit_gradients(outputs)
    for name, found in twice.logit_gradients(outputs).items():
        torch.testing.assert_close(found, 2 * expected[name])


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (lambda s: s.update(s.gradients(), lr_factor=float("nan")), "updated with lr_factor nan"),
        (lambda s: s.gradients([]), "asked for the gradients of no batches"),
        (lambda s: s.record("loss 0.5"), "recorded 'loss 0.5', expected a dict of numbers"),
        (lambda s: s.record(None), "recorded None, expected a dict of numbers"),
        (
            lambda s: s.reply({"a": torch.zeros(s.batches[0].smashed.shape, dtype=torch.int64)}),
            "replied to client 'a' with torch.int64, expected floating point",
        ),
    ],
)
def test_what_makes_no_sense_names_the_method_and_what_came(act, why):
    with pytest.raises(MethodError, match=f"Mine.step {why}"):
        act(make_step(*_small()))


def _small():
    segment = RecordedSegment(nn.Linear(3, 2))
    return segment, [ClientBatch("a", torch.ones(2, 3), torch.tensor([0, 1]), 2)]
