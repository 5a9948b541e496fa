"""Replay and SharedDelta, by numbers worked out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from flsplit.server.gradients import ClientBatch
from flsplit.server.passes import Replay, SharedDelta
from flsplit.server.segment import ServerSegment

# One weight w = 2 and logits (w·s, 0). With labels 0: dl/do = (p - 1, 1 - p) for p = σ(w·s), so
# the gradient by s is w (p - 1), the one by w is s (p - 1).


class OneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, s):
        return torch.cat([self.w * s, torch.zeros_like(s)], dim=1)


def sigma(x):
    return torch.sigmoid(torch.tensor(x)).item()


def run(server_pass, rows, weights):
    segment = ServerSegment(
        OneWeight(), loss=functional.cross_entropy, optimizer=torch.optim.SGD, lr=0.1,
        device=torch.device("cpu"),
    )  # fmt: skip
    batches = [
        ClientBatch(name, torch.tensor(own).view(-1, 1), torch.zeros(len(own)).long(), 1)
        for name, own in rows.items()
    ]
    return server_pass(segment, batches, weights)


def column(tensor):
    return tensor.flatten().tolist()


def test_replay_of_two_clients():
    """b = 2, m = 1: position 0 is one row at the mean activation, position 1 each client's own."""
    rows, lam = {"a": [1.0, 0.5], "b": [-1.0, 2.0]}, {"a": 0.75, "b": 0.25}
    result = run(Replay(0.5), rows, lam)
    z = {n: [sigma(2 * s) - 1 for s in own] for n, own in rows.items()}
    mean_s = 0.75 * 1.0 + 0.25 * -1.0
    mean_z = 0.75 * z["a"][0] + 0.25 * z["b"][0]
    server = mean_s * mean_z / 2 + 0.75 * 0.5 * z["a"][1] / 2 + 0.25 * 2.0 * z["b"][1] / 2
    assert result.server_gradients[0].item() == pytest.approx(server, abs=1e-6)
    shared = 2 * mean_z / 2  # w · z̄ / b
    assert column(result.cut_gradients["a"]) == pytest.approx([shared, 2 * z["a"][1] / 2], abs=1e-6)
    assert column(result.cut_gradients["b"]) == pytest.approx([shared, 2 * z["b"][1] / 2], abs=1e-6)
    assert (result.rows, result.shared_rows) == (3, {"a": 1, "b": 1})
    for name, own in rows.items():
        loss = sum(-torch.log(torch.sigmoid(torch.tensor(2 * s))).item() for s in own) / 2
        assert result.losses[name] == pytest.approx(loss, abs=1e-6)


def test_shared_delta_goes_through_each_clients_own_activation():
    rows, lam = {"a": [1.0], "b": [-1.0]}, {"a": 0.75, "b": 0.25}
    result = run(SharedDelta(1.0), rows, lam)
    mean_z = 0.75 * (sigma(2.0) - 1) + 0.25 * (sigma(-2.0) - 1)
    server = 0.75 * 1.0 * mean_z + 0.25 * -1.0 * mean_z
    assert result.server_gradients[0].item() == pytest.approx(server, abs=1e-6)
    for name in "ab":
        assert column(result.cut_gradients[name]) == pytest.approx([2 * mean_z], abs=1e-6)
    assert (result.rows, result.shared_rows) == (2, {"a": 1, "b": 1})


@pytest.mark.parametrize("kind", [Replay, SharedDelta])
def test_unequal_batches_share_the_positions_they_have(kind):
    """Row weights λ/b: a's two rows weigh 0.25 each, b's one 0.5; position 1 is a's alone."""
    rows, lam = {"a": [1.0, 3.0], "b": [1.0]}, {"a": 0.5, "b": 0.5}
    result = run(kind(1.0), rows, lam)
    z = [sigma(2.0) - 1, sigma(6.0) - 1]
    assert column(result.cut_gradients["a"]) == pytest.approx(z, abs=1e-6)  # w z / b
    assert column(result.cut_gradients["b"]) == pytest.approx([2 * z[0]], abs=1e-6)
    server = 0.75 * 1.0 * z[0] + 0.25 * 3.0 * z[1]
    assert result.server_gradients[0].item() == pytest.approx(server, abs=1e-6)
    assert result.shared_rows == {"a": 2, "b": 1}
    assert result.rows == (2 if kind is Replay else 3)


@pytest.mark.parametrize("kind", [Replay, SharedDelta])
def test_weights_that_sum_to_more_than_one_leave_the_clients_gradients_alone(kind):
    """``reduction='sum'``: the server's gradient is S times as large, the clients' the same."""
    rows = {"a": [1.0, 0.5], "b": [-1.0, 2.0]}
    mean = run(kind(0.5), rows, {"a": 0.5, "b": 0.5})
    total = run(kind(0.5), rows, {"a": 1.0, "b": 1.0})
    for name in rows:
        torch.testing.assert_close(total.cut_gradients[name], mean.cut_gradients[name])
    torch.testing.assert_close(total.server_gradients[0], 2 * mean.server_gradients[0])


@pytest.mark.parametrize("kind", [Replay, SharedDelta])
def test_permuting_the_clients_permutes_the_result(kind):
    rows, lam = {"a": [1.0, 0.5], "b": [-1.0, 2.0], "c": [0.1]}, {"a": 0.5, "b": 0.3, "c": 0.2}
    first = run(kind(0.5), rows, lam)
    other = run(kind(0.5), {n: rows[n] for n in "cab"}, lam)
    for name in rows:
        torch.testing.assert_close(first.cut_gradients[name], other.cut_gradients[name])
    torch.testing.assert_close(first.server_gradients[0], other.server_gradients[0])
