"""Labels from constructed gradients."""

import pytest
import torch

from flsplit.errors import ConfigError
from flsplit.privacy import (
    auc,
    cluster_attack,
    cosine_attack,
    loss_membership,
    nearest_membership,
    norm_attack,
)


def test_auc_by_hand():
    """Of the pairs (0.9, 0.5), (0.9, 0.1), (0.5, 0.5), (0.5, 0.1) one is a tie: 3.5 of 4."""
    scores = torch.tensor([0.9, 0.5, 0.5, 0.1])
    assert auc(scores, torch.tensor([1, 0, 1, 0])) == 3.5 / 4
    assert auc(-scores, torch.tensor([1, 0, 1, 0])) == 0.5 / 4


def test_auc_of_one_kind_is_refused():
    with pytest.raises(ConfigError, match="3 positive and 0 negative"):
        auc(torch.zeros(3), torch.ones(3))


def two_classes(n=400, share=0.2, seed=0):
    """Return gradients (σ(z) - y) w of a logistic loss with an unsure model, and labels."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, generator=rng) < share
    z = torch.randn(n, generator=rng) * 0.5 + torch.logit(torch.tensor(share))
    w = torch.randn(6, generator=rng)
    return (torch.sigmoid(z) - labels.float())[:, None] * w, labels


def test_attacks_on_logistic_gradients():
    gradients, labels = two_classes()
    assert cosine_attack(gradients, labels) == 1.0  # the sign of σ(z) - y is the label
    assert norm_attack(gradients, labels) > 0.99  # |σ(z) - 1| is about 1 - share, |σ(z)| share


def test_attacks_fail_on_noise():
    _, labels = two_classes()
    noise = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    # 80 positive, 320 negative: the AUC of guessing has a standard deviation of 0.036.
    assert abs(norm_attack(noise, labels) - 0.5) < 0.12
    assert abs(cosine_attack(noise, labels) - 0.5) < 0.12


def test_clusters_of_softmax_gradients():
    """(p - e_y) W: with a model that is unsure, each class has a direction of its own."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (300,), generator=rng)
    p = torch.softmax(torch.randn(300, 5, generator=rng) * 0.3, dim=1)
    weight = torch.randn(5, 12, generator=rng)
    gradients = (p - torch.nn.functional.one_hot(labels, 5)) @ weight
    assert cluster_attack(gradients, labels, num_classes=5) > 0.98
    noise = torch.randn(300, 12, generator=rng)
    assert cluster_attack(noise, labels, num_classes=5) < 0.4


def test_membership_by_distance_and_by_loss():
    rng = torch.Generator().manual_seed(0)
    members, others = torch.randn(50, 4, generator=rng), torch.randn(50, 4, generator=rng)
    assert nearest_membership(members, others, members + 1e-4) == 1.0
    recorded = torch.randn(500, 4, generator=rng)
    assert abs(nearest_membership(members, others, recorded) - 0.5) < 0.18  # 3 deviations
    assert loss_membership(torch.tensor([0.1, 0.2]), torch.tensor([0.15, 0.3])) == 3 / 4


def test_known_rows_must_be_positive_ones():
    gradients, labels = two_classes(10, 0.5)
    with pytest.raises(ConfigError, match=r"known is 10, expected 1 to"):
        cosine_attack(gradients, labels, known=10)
    with pytest.raises(ConfigError, match="num_classes is 1"):
        cluster_attack(gradients, labels, num_classes=1)
