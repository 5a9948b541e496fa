"""CutGradientAveraging and SplitLr, by numbers worked out by hand."""

import numpy as np
import pytest
import torch

from flsplit.errors import SegmentMismatchError
from flsplit.server.step import StepContext, StepResult
from flsplit.strategies.rules import CutGradientAveraging, SplitLr


def context(names, progress=0.0, seed=0):
    shares = dict.fromkeys(names, 1 / len(names))
    return StepContext(tuple(names), shares, 1, 1, 0, progress, np.random.default_rng(seed))


def result(**cut):
    gradients = {name: torch.tensor(rows) for name, rows in cut.items()}
    return StepResult(dict.fromkeys(cut, 0.0), {}, [], gradients, 0)


def averaged(rule, progress=0.0, **cut):
    return rule(context(list(cut), progress), result(**cut))


A, B = [[1.0, 2.0], [3.0, 4.0]], [[5.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("averaging", "expected"),
    [
        ("position_mean", [[3.0, 1.0], [2.0, 2.0]]),
        ("position_sum", [[6.0, 2.0], [4.0, 4.0]]),
        ("batch_mean", [[2.5, 1.5], [2.5, 1.5]]),
    ],
)
def test_three_readings_of_the_average(averaging, expected):
    found = averaged(CutGradientAveraging(1.0, averaging), a=A, b=B)
    assert found.cut_gradients["a"].tolist() == found.cut_gradients["b"].tolist() == expected
    assert found.shared_rows == {"a": 2, "b": 2}
    assert found.repeated == ({"a", "b"} if averaging == "batch_mean" else set())


@pytest.mark.parametrize(
    ("averaging", "of_a", "of_b"),
    [
        # per sample: a has 2·[1], 2·[3]; b has 1·[5]. Position 0: (2+5)/2, position 1: 6.
        ("position_mean", [[1.75], [3.0]], [[3.5]]),
        ("position_sum", [[3.5], [3.0]], [[7.0]]),
        ("batch_mean", [[13 / 6], [13 / 6]], [[13 / 3]]),
    ],
)
def test_unequal_batches_average_what_they_have_per_sample(averaging, of_a, of_b):
    found = averaged(CutGradientAveraging(1.0, averaging), a=[[1.0], [3.0]], b=[[5.0]])
    torch.testing.assert_close(found.cut_gradients["a"], torch.tensor(of_a))
    torch.testing.assert_close(found.cut_gradients["b"], torch.tensor(of_b))
    assert found.shared_rows == {"a": 2, "b": 1}


@pytest.mark.parametrize(("phi", "active"), [(0, 0), (0.1, 1), (0.3, 3), (0.31, 4), (1, 10)])
def test_the_share_of_active_clients_is_rounded_up(phi, active):
    cut = {f"c{i}": [[float(i)]] for i in range(10)}
    found = averaged(CutGradientAveraging(phi), **cut)
    assert found.metrics == {"cut-gradient-averaging.active": active}
    assert len(found.shared_rows) == active


def test_active_clients_are_drawn_anew():
    names = [f"c{i}" for i in range(6)]
    drawn = {
        tuple(CutGradientAveraging(0.5)(context(names, seed=s), result(**dict.fromkeys(names, A)))
              .shared_rows)
        for s in range(20)
    }  # fmt: skip
    assert len(drawn) > 5


@pytest.mark.parametrize(("progress", "averages"), [(0.0, 0), (0.25, 1), (0.49, 1), (0.5, 0)])
def test_phases_are_a_part_of_the_run(progress, averages):
    found = averaged(CutGradientAveraging(1.0, phases=[0.25, 0.5]), progress, a=A, b=B)
    assert bool(found.shared_rows) == bool(averages)


def test_clients_that_do_not_step_are_not_drawn():
    given = result(a=A, b=B, c=B)
    given.skipped = {"b"}
    found = CutGradientAveraging(1.0)(context(["a", "b", "c"]), given)
    assert found.shared_rows == {"a": 2, "c": 2}
    assert found.cut_gradients["b"].tolist() == B


def test_clients_with_other_shapes_are_named():
    with pytest.raises(SegmentMismatchError, match="client 'b' has shape"):
        averaged(CutGradientAveraging(1.0), a=A, b=[[1.0]])


def test_permuting_the_clients_permutes_the_result():
    found = averaged(CutGradientAveraging(1.0), a=A, b=B)
    other = averaged(CutGradientAveraging(1.0), b=B, a=A)
    for name in "ab":
        assert torch.equal(found.cut_gradients[name], other.cut_gradients[name])


@pytest.mark.parametrize(("alpha", "factor"), [(0, 1.0), (0.5, 2.0), (1, 4.0), (1.5, 8.0)])
def test_the_servers_rate_grows_with_the_clients(alpha, factor):
    found = SplitLr(alpha)(context("abcd"), result(a=A, b=A, c=A, d=A))
    assert found.server_lr_factor == factor
