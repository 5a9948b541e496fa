"""SGLR's averaged gradients and scaled rate, by numbers worked out by hand."""

import pytest
import torch
from reference import plain_net
from torch import nn

from flsplit.errors import SegmentMismatchError
from flsplit.server.client_batch import ClientBatch
from flsplit.strategies import SGLR
from flsplit.strategies.sglr import averaged
from tests.server.one_step import MadeUpRound, RecordedSegment, taken

A, B = [[1.0, 2.0], [3.0, 4.0]], [[5.0, 0.0], [1.0, 0.0]]


class Scale(nn.Module):
    """Smashed data times one: with the loss Σ logits · labels, labels are the cut gradients."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.one * x


def run(cut, progress=0.0, seed=0, **options):
    """Return what SGLR makes of the cut-layer gradients ``cut``."""
    batches = [
        ClientBatch(name, torch.ones(torch.tensor(rows).shape), torch.tensor(rows), 1)
        for name, rows in cut.items()
    ]
    strategy = SGLR(model=plain_net(), cut="front", **options)
    return taken(
        strategy, RecordedSegment(Scale(), loss=lambda logits, labels: (logits * labels).sum()),
        batches, round_=MadeUpRound(seed=seed), index=round(100 * progress), num_steps=100,
        shares="batch",
    )  # fmt: skip


def shared(result):
    return {name: one.shared_rows for name, one in result.told.items() if one.shared_rows}


def rows_of(result, name):
    return result.told[name].gradient.tolist()


def average(averaging="position_mean", **cut):
    return averaged({n: torch.tensor(rows) for n, rows in cut.items()}, list(cut), averaging)


@pytest.mark.parametrize(
    ("averaging", "expected"),
    [
        ("position_mean", [[3.0, 1.0], [2.0, 2.0]]),
        ("position_sum", [[6.0, 2.0], [4.0, 4.0]]),
        ("batch_mean", [[2.5, 1.5], [2.5, 1.5]]),
    ],
)
def test_three_readings_of_the_average(averaging, expected):
    found = average(averaging, a=A, b=B)
    assert found["a"].tolist() == found["b"].tolist() == expected
    stepped = run({"a": A, "b": B}, phi=1.0, averaging=averaging)
    assert rows_of(stepped, "a") == rows_of(stepped, "b") == expected
    assert shared(stepped) == {"a": 2, "b": 2}
    repeated = {name for name, one in stepped.told.items() if one.repeated}
    assert repeated == ({"a", "b"} if averaging == "batch_mean" else set())


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
    cut = {"a": [[1.0], [3.0]], "b": [[5.0]]}
    found, stepped = average(averaging, **cut), run(cut, phi=1.0, averaging=averaging)
    for name, expected in (("a", of_a), ("b", of_b)):
        torch.testing.assert_close(found[name], torch.tensor(expected))
        torch.testing.assert_close(stepped.told[name].gradient, torch.tensor(expected))
    assert shared(stepped) == {"a": 2, "b": 1}


@pytest.mark.parametrize(("phi", "active"), [(0, 0), (0.1, 1), (0.3, 3), (0.31, 4), (1, 10)])
def test_the_share_of_active_clients_is_rounded_up(phi, active):
    stepped = run({f"c{i}": [[float(i)]] for i in range(10)}, phi=phi)
    assert stepped.round.metrics["cut-gradient-averaging.active"] == active
    assert len(shared(stepped)) == active
    own = [name for name in stepped.told if name not in shared(stepped)]
    assert all(rows_of(stepped, name) == [[float(name[1:])]] for name in own)


def test_active_clients_are_drawn_anew():
    cut = {f"c{i}": A for i in range(6)}
    assert len({tuple(shared(run(cut, phi=0.5, seed=seed))) for seed in range(20)}) > 5


@pytest.mark.parametrize(("progress", "averages"), [(0.0, 0), (0.25, 1), (0.49, 1), (0.5, 0)])
def test_phases_are_a_part_of_the_run(progress, averages):
    stepped = run({"a": A, "b": B}, progress, phi=1.0, phases=[0.25, 0.5])
    assert bool(shared(stepped)) == bool(averages)


def test_only_active_clients_share():
    gradients = {name: torch.tensor(rows) for name, rows in (("a", A), ("b", [[9.0]]), ("c", B))}
    found = averaged(gradients, ["a", "c"], "position_mean")
    assert list(found) == ["a", "c"]
    assert found["a"].tolist() == found["c"].tolist() == [[3.0, 1.0], [2.0, 2.0]]
    assert gradients["b"].tolist() == [[9.0]]
    assert averaged(gradients, [], "position_mean") == {}


def test_clients_with_other_shapes_are_named():
    with pytest.raises(SegmentMismatchError, match="client 'b' has shape"):
        average(a=A, b=[[1.0]])


def test_permuting_the_clients_permutes_the_result():
    found, other = average(a=A, b=B), average(b=B, a=A)
    for name in "ab":
        assert torch.equal(found[name], other[name])


@pytest.mark.parametrize(("alpha", "factor"), [(0, 1.0), (0.5, 2.0), (1, 4.0), (1.5, 8.0)])
def test_the_servers_rate_grows_with_the_clients(alpha, factor):
    stepped = run(dict.fromkeys("abcd", A), phi=0.0, alpha=alpha)
    assert stepped.factor == stepped.round.metrics["split-lr.factor"] == factor
    # Of one mean loss over 8 rows, each client's own being 1 + 2 + 3 + 4.
    assert stepped.gradients[0].item() == pytest.approx(10.0)
