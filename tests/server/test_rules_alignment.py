"""LeaderAlignment, by vectors and angles worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flsplit.errors import NonFiniteError
from flsplit.server.products import KeptProducts
from flsplit.server.step import StepContext, StepResult
from flsplit.strategies.rules import LeaderAlignment

RIGHT, DOWN = math.pi / 2, math.pi


def context(size, progress=0.0):
    names = tuple(str(i) for i in range(size))
    shares = dict.fromkeys(names, 1 / size)
    return StepContext(names, shares, 1, 1, 0, progress, np.random.default_rng(0))


def result(vectors, losses=None):
    rows = [torch.as_tensor(v, dtype=torch.float32) for v in vectors]
    names = [str(i) for i in range(len(rows))]
    return StepResult(
        dict(zip(names, losses or [1.0] * len(rows), strict=True)), {},
        [torch.zeros_like(rows[0][:1]), torch.zeros_like(rows[0][1:])],
        {name: torch.ones(2, 1) for name in names}, 0,
        client_server_gradients={
            n: [v[:1].clone(), v[1:].clone()] for n, v in zip(names, rows, strict=True)
        },
    )  # fmt: skip


def aligned(vectors, progress=0.0, losses=None, **options):
    """Return the server's gradient, the metrics and the result."""
    found = LeaderAlignment(**options)(context(len(vectors), progress), result(vectors, losses))
    metrics = {k.removeprefix("leader-alignment."): v for k, v in found.metrics.items()}
    return torch.cat(found.server_gradients).tolist(), metrics, found


FAN = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]  # at 0, 90 and 45 degrees


def test_a_fan_of_three():
    gradient, metrics, _ = aligned(FAN)
    # Scores 67.5, 67.5 and 45 degrees; K = 20 % of 3 is one client: the one in the middle.
    assert metrics["score-mean"] == pytest.approx(math.radians(60), abs=1e-7)
    assert metrics["dispersion"] == pytest.approx(math.radians(math.sqrt(112.5)), abs=1e-7)
    assert (metrics["k-percent"], metrics["leaders"]) == (20.0, 1.0)
    # To the leader 45, 45 and 0; the mean is 30.
    for name, degrees in zip("012", (45, 45, 0), strict=True):
        assert metrics[f"angle.{name}"] == pytest.approx(math.radians(degrees), abs=1e-7)
    assert metrics["threshold"] == pytest.approx(math.radians(30), abs=1e-7)
    assert metrics["kept"] == metrics["kept.2"] == 1.0
    assert gradient == [1.0, 1.0]


@pytest.mark.parametrize(("reduction", "gradient"), [("sum", [2.0, 2.0]), ("mean", [2 / 3] * 2)])
def test_a_permissive_threshold_keeps_all(reduction, gradient):
    found, metrics, _ = aligned(FAN, eta=-1.0, loss_reduction=reduction)
    spread = math.sqrt(450)  # of 45, 45, 0
    assert metrics["threshold"] == pytest.approx(math.radians(30 + spread), abs=1e-7)
    assert found == pytest.approx(gradient)


def test_the_threshold_is_a_right_angle_at_most_and_zero_at_least():
    _, metrics, _ = aligned([(1.0, 0.0), (-1.0, 0.1), (1.0, 0.1)], eta=-9.0)
    assert metrics["threshold"] == RIGHT
    assert metrics["kept.1"] == 0.0
    _, metrics, _ = aligned(FAN, eta=9.0)
    assert metrics["threshold"] == 0.0
    assert metrics["kept"] == 1.0  # the leader itself, at 0


def test_with_nobody_below_the_threshold_the_nearest_is_kept():
    """Four clients at 10 degrees of the leader and one at 90, η = 2 > 1/√4."""
    angles = [10, -10, 10, -10]
    vectors = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in angles]
    _, metrics, _ = aligned([*vectors, (0.0, 1.0)], eta=2.0, lgi="off")
    assert metrics["kept"] == 1.0
    nearest = min("01234", key=lambda n: metrics[f"angle.{n}"])
    assert metrics[f"kept.{nearest}"] == 1.0


def test_ties_stay():
    """All at the same angle to the leader, which is their mean, at any η that is not negative."""
    vectors = [(1.0, 0.3, 0.0), (1.0, -0.3, 0.0), (1.0, 0.0, 0.3), (1.0, 0.0, -0.3)]
    for eta in (0.0, 1.0, 100.0):
        _, metrics, _ = aligned(vectors, eta=eta, lgi="off")
        assert metrics["kept"] == 4.0


def test_k_grows_with_progress_and_agreement():
    """Dispersions 0 (first step), then the fan's, then half way: equation 2 by hand."""
    rule, options = LeaderAlignment(k_min=20, k_max=80), context(3, progress=0.5)
    narrow = [(1.0, 0.0), (1.0, 0.2), (1.0, 0.4)]
    ratios, dispersions = [], []
    for vectors in (FAN, FAN, narrow, FAN):
        found = rule(options, result(vectors))
        ratios.append(found.metrics["leader-alignment.k-percent"])
        dispersions.append(found.metrics["leader-alignment.dispersion"])
    assert dispersions[2] < dispersions[0]
    assert ratios == pytest.approx([20.0, 20.0, 20 + 0.5 * 1.0 * 60, 20.0])
    assert rule.state_dict() == {"extremes": [dispersions[2], dispersions[0]]}
    other = LeaderAlignment(k_min=20, k_max=80)
    other.load_state_dict(rule.state_dict())
    again = other(options, result(narrow))
    assert again.metrics["leader-alignment.k-percent"] == pytest.approx(50.0)


def test_the_reported_loss_has_the_term_of_equation_7():
    _, metrics, found = aligned(FAN, losses=[1.0, 2.0, 4.0], eta=-1.0, lam=0.5)
    term = 0.5 * (1 - math.cos(math.radians(45)))
    assert metrics["loss"] == pytest.approx(7 + 2 * term)
    assert found.losses == {"0": 1.0, "1": 2.0, "2": 4.0}


def test_projection_turns_kept_gradients_to_the_leader():
    """g = (1, 0), leader (1, 1)/√2: g + λ |g| (ĝ_lead - cos 45° ĝ) = (1 + λ(√½ - √½), λ √½)."""
    gradient, _, _ = aligned(FAN, eta=-1.0, lam=0.2, active_alignment="projection")
    turned = 0.2 * math.sqrt(0.5)
    assert gradient == pytest.approx([1 + turned + 1, turned + 1 + 1])


def test_excluded_clients_can_be_skipped():
    assert aligned(FAN)[2].skipped == set()
    assert aligned(FAN, excluded_clients="skip")[2].skipped == {"0", "1"}


def test_without_gda_the_leader_alone_is_stepped_with():
    gradient, metrics, _ = aligned(FAN, gda="off", loss_reduction="mean", k_min=60)
    assert metrics["leaders"] == 2.0
    assert gradient == pytest.approx([1.0, 0.5])  # mean of (1, 0) and (1, 1)


@pytest.mark.parametrize(
    ("vectors", "why"),
    [
        ([(1.0, 0.0), (0.0, 0.0)], "server gradient of client '1' is zero"),
        ([(1.0, 0.0), (float("nan"), 0.0)], "server gradient of client '1' is NaN"),
        ([(float("inf"), 0.0), (1.0, 0.0)], "server gradient of client '0' is NaN or inf"),
        ([(1.0, 0.0), (-1.0, 0.0)], "leader gradient of clients '0', '1' is zero"),
    ],
)
def test_gradients_without_a_direction_are_refused(vectors, why):
    with pytest.raises(NonFiniteError, match=why):
        aligned(vectors, k_min=100.0, k_max=100.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([-0.5, 0.0, 0.3]))
def test_permuting_the_clients_permutes_the_result(seed, eta):
    rng = np.random.default_rng(seed)
    vectors, order = rng.normal(size=(5, 7)), rng.permutation(5)
    gradient, metrics, _ = aligned(list(vectors), eta=eta)
    other, permuted, _ = aligned(list(vectors[order]), eta=eta)
    assert other == pytest.approx(gradient, abs=1e-5)
    for new, old in enumerate(order):
        for key in ("angle", "kept"):
            assert permuted[f"{key}.{new}"] == pytest.approx(metrics[f"{key}.{old}"], abs=1e-7)


def test_inner_products_are_float64_however_large_the_layers():
    """Over more than one block; float32 would be off by 1e-7 of the norm, and lose small angles."""
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(70_000, generator=rng)
    second = first + 1e-4 * torch.randn(70_000, generator=rng)
    layers = [[v[:3].clone(), None, v[3:].view(-1, 1).clone()] for v in (first, second)]
    expected = torch.stack([first, second]).double()
    torch.testing.assert_close(
        KeptProducts(layers).gram(), expected @ expected.T, rtol=1e-13, atol=0
    )
