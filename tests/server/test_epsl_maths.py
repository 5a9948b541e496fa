"""EPSL's two aggregations, by numbers worked out by hand."""

import pytest
import torch
from reference import plain_net
from torch import nn

from flsplit.server.client_batch import ClientBatch
from flsplit.strategies import EPSL
from tests.server.one_step import RecordedSegment, taken

# One weight w = 2 and logits (w·s, 0). With labels 0: dl/do = (p - 1, 1 - p) for p = σ(w·s), so
# the gradient by s is w (p - 1), the one by w is s (p - 1).

AGGREGATIONS = ["replay", "shared_delta"]


class OneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, s):
        return torch.cat([self.w * s, torch.zeros_like(s)], dim=1)


def sigma(x):
    return torch.sigmoid(torch.tensor(x)).item()


def run(phi, aggregation, rows, examples, reduction="mean"):
    batches = [
        ClientBatch(name, torch.tensor(own).view(-1, 1), torch.zeros(len(own)).long(), size)
        for (name, own), size in zip(rows.items(), examples, strict=True)
    ]
    strategy = EPSL(model=plain_net(), cut="front", phi=phi, aggregation=aggregation)
    return taken(strategy, RecordedSegment(OneWeight()), batches, reduction=reduction)


def cut(result, name):
    return result.told[name].gradient.flatten().tolist()


def counted(result):
    shared = {name: one.shared_rows for name, one in result.told.items()}
    return result.round.entry.rows, shared


def test_replay_of_two_clients():
    """b = 2, m = 1: position 0 is one row at the mean activation, position 1 each client's own."""
    rows = {"a": [1.0, 0.5], "b": [-1.0, 2.0]}
    result = run(0.5, "replay", rows, (3, 1))  # λ = 0.75 and 0.25
    z = {n: [sigma(2 * s) - 1 for s in own] for n, own in rows.items()}
    mean_s = 0.75 * 1.0 + 0.25 * -1.0
    mean_z = 0.75 * z["a"][0] + 0.25 * z["b"][0]
    server = mean_s * mean_z / 2 + 0.75 * 0.5 * z["a"][1] / 2 + 0.25 * 2.0 * z["b"][1] / 2
    assert result.gradients[0].item() == pytest.approx(server, abs=1e-6)
    shared = 2 * mean_z / 2  # w · z̄ / b
    assert cut(result, "a") == pytest.approx([shared, 2 * z["a"][1] / 2], abs=1e-6)
    assert cut(result, "b") == pytest.approx([shared, 2 * z["b"][1] / 2], abs=1e-6)
    assert counted(result) == (3, {"a": 1, "b": 1})
    assert [name for name, _ in result.round.losses] == ["a", "b"]
    for name, found in result.round.losses:
        loss = sum(-torch.log(torch.sigmoid(torch.tensor(2 * s))).item() for s in rows[name]) / 2
        assert found == pytest.approx(loss, abs=1e-6)


def test_shared_delta_goes_through_each_clients_own_activation():
    result = run(1.0, "shared_delta", {"a": [1.0], "b": [-1.0]}, (3, 1))
    mean_z = 0.75 * (sigma(2.0) - 1) + 0.25 * (sigma(-2.0) - 1)
    server = 0.75 * 1.0 * mean_z + 0.25 * -1.0 * mean_z
    assert result.gradients[0].item() == pytest.approx(server, abs=1e-6)
    for name in "ab":
        assert cut(result, name) == pytest.approx([2 * mean_z], abs=1e-6)
    assert counted(result) == (2, {"a": 1, "b": 1})


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_unequal_batches_share_the_positions_they_have(aggregation):
    """Row weights λ/b: a's two rows weigh 0.25 each, b's one 0.5; position 1 is a's alone."""
    result = run(1.0, aggregation, {"a": [1.0, 3.0], "b": [1.0]}, (1, 1))
    z = [sigma(2.0) - 1, sigma(6.0) - 1]
    assert cut(result, "a") == pytest.approx(z, abs=1e-6)  # w z / b
    assert cut(result, "b") == pytest.approx([2 * z[0]], abs=1e-6)
    server = 0.75 * 1.0 * z[0] + 0.25 * 3.0 * z[1]
    assert result.gradients[0].item() == pytest.approx(server, abs=1e-6)
    assert counted(result) == (2 if aggregation == "replay" else 3, {"a": 2, "b": 1})


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_that_sum_to_more_than_one_leave_the_clients_gradients_alone(aggregation):
    """``reduction='sum'``: the server's gradient is S times as large, the clients' the same."""
    rows = {"a": [1.0, 0.5], "b": [-1.0, 2.0]}
    mean = run(0.5, aggregation, rows, (1, 1))
    total = run(0.5, aggregation, rows, (1, 1), reduction="sum")
    for name in rows:
        torch.testing.assert_close(total.told[name].gradient, mean.told[name].gradient)
    torch.testing.assert_close(total.gradients[0], 2 * mean.gradients[0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_permuting_the_clients_permutes_the_result(aggregation):
    rows, examples = {"a": [1.0, 0.5], "b": [-1.0, 2.0], "c": [0.1]}, {"a": 5, "b": 3, "c": 2}
    first = run(0.5, aggregation, rows, examples.values())
    other = run(0.5, aggregation, {n: rows[n] for n in "cab"}, [examples[n] for n in "cab"])
    for name in rows:
        torch.testing.assert_close(first.told[name].gradient, other.told[name].gradient)
    torch.testing.assert_close(first.gradients[0], other.gradients[0])
