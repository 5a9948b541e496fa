"""Shares, weights and counting."""

import pytest
import torch

from flsplit.server.step import ClientBatch, client_shares, count_correct, loss_weights


def batch(name, rows, examples):
    return ClientBatch(name, torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.int64), examples)


BATCHES = [batch("0", 4, 30), batch("1", 4, 50), batch("2", 2, 20)]


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


@pytest.mark.parametrize("shares", ["examples", "batch", "equal"])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 49, 1000])
def test_shares_sum_to_one_for_any_number_of_clients(shares, count):
    many = [batch(str(i), 1 + i % 3, 1 + i % 7) for i in range(count)]
    assert sum(client_shares(many, shares).values()) == pytest.approx(1.0, rel=1e-12)


def test_shares_are_renormalised_over_the_clients_in_the_step():
    assert client_shares(BATCHES[:2], "examples") == pytest.approx({"0": 3 / 8, "1": 5 / 8})


def test_one_client_has_exactly_all():
    """No rounding, or one client would not be bit-equal to training the whole model."""
    for examples in (1, 3, 7, 49):
        assert client_shares([batch("0", 3, examples)], "examples") == {"0": 1.0}


def test_sum_is_s_times_the_mean():
    shares = client_shares(BATCHES, "examples")
    assert loss_weights(shares, "mean") == shares
    assert loss_weights(shares, "sum") == pytest.approx({"0": 0.9, "1": 1.5, "2": 0.6})
    equal = client_shares(BATCHES, "equal")
    assert loss_weights(equal, "sum") == pytest.approx({"0": 1.0, "1": 1.0, "2": 1.0})


def test_correct_answers_are_counted_where_labels_are_classes():
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert count_correct(logits, torch.tensor([1, 1, 1])) == (2, 3)
    assert count_correct(logits, torch.tensor([[0.0, 1.0]] * 3)) == (0, 0)
    assert count_correct(logits[:, 0], torch.tensor([0.0, 1.0, 0.0])) == (0, 0)
    assert count_correct(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)) == (0, 0)
