"""The script of attacks that do more than look runs, on made-up images."""

import pytest
import torch
from malicious import HINDRANCES, hijacking, known_weights, main, simulating
from spots import images
from torch.utils.data import TensorDataset

PRIVATE, PUBLIC = images(100, 0, size=28), images(60, 1, size=28)


def test_hijacking_is_judged_round_by_round():
    found = hijacking(PRIVATE, PUBLIC, rounds=2, seed=0, steps=2, warm_up=2)
    assert len(found) == 2
    assert all(one < 0.5 for one in found)  # nothing yet, after so few steps


@pytest.mark.parametrize("name", ["5 clients", "NoPeek 10", "clip 10, noise 2"])
def test_hijacking_with_a_hindrance(name):
    found, plain = (
        hijacking(images(160, 0, size=28), PUBLIC, rounds=1, seed=0, steps=2, warm_up=2, **one)
        for one in (HINDRANCES[name], {})
    )
    assert len(found) == 1
    assert found != plain


def test_known_weights_are_what_hijacking_is_compared_with():
    assert known_weights(PRIVATE, PUBLIC, 0) > 0.5


def test_simulating_counts_labels():
    labels = torch.arange(100) % 10
    parts = [TensorDataset(PRIVATE[i], labels[i]) for i in torch.arange(100).chunk(5)]
    known = PUBLIC, torch.arange(60) % 10
    found = simulating(parts, known, seed=0, defence=[], rounds=1, steps=1, attack_steps=2)
    assert [*found] == ["guess", "clusters", "sdar", "without its critic"]
    assert all(0 <= one <= 1 for one in found.values())


def test_data_that_is_not_there_is_said(tmp_path):
    with pytest.raises(SystemExit, match="has no MNIST"):
        main(["--data-dir", str(tmp_path)])
