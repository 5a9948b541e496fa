"""GAPSL's alignment, by vectors and angles worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_net

from flsplit.errors import NonFiniteError
from flsplit.server.gradients import StepGradients
from flsplit.server.products import KeptGradients
from flsplit.strategies import GAPSL

RIGHT = math.pi / 2
MODEL = plain_net()


class VectorStep:
    """A step whose clients' server gradients are given vectors."""

    keeps_labels = False

    def __init__(self, vectors, progress=0.0, losses=None):
        vectors = [torch.as_tensor(v, dtype=torch.float32) for v in vectors]
        self.clients = [str(i) for i in range(len(vectors))]
        self.shares = dict.fromkeys(self.clients, 1 / len(vectors))
        self.progress, self.rng = progress, np.random.default_rng(0)
        self.found = StepGradients(
            losses=dict(zip(self.clients, losses or [1.0] * len(vectors), strict=True)),
            logits={},
            cut_gradients={name: torch.ones(2, 1) for name in self.clients},
            weights=self.shares,
            rows=0,
            clients=KeptGradients(self.clients, [[v[:1].clone(), v[1:].clone()] for v in vectors]),
        )
        self.metrics = {}

    def gradients(self, *, per_client, low_memory):
        assert per_client
        return self.found

    def update(self, gradients):
        self.gradient = torch.cat(gradients).tolist()

    def reply(self, cut_gradients):
        self.told = set(cut_gradients)

    def record(self, metrics):
        self.metrics = {k.removeprefix("leader-alignment."): v for k, v in metrics.items()}


def gapsl(**options):
    return GAPSL(model=MODEL, cut="front", **options)


def aligned(vectors, progress=0.0, losses=None, **options):
    """Return the server's gradient, the metrics and the step."""
    step = VectorStep(vectors, progress, losses)
    gapsl(**options).step(step)
    return step.gradient, step.metrics, step


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


def test_a_fan_of_three_by_its_inner_products():
    step = SimpleNamespace(
        clients=list("012"), shares=dict.fromkeys("012", 1 / 3), progress=0.0,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    found = gapsl().align(np.array(FAN) @ np.array(FAN).T, step)
    assert np.degrees(found.scores) == pytest.approx([67.5, 67.5, 45.0])
    assert np.degrees(found.dispersion) == pytest.approx(math.sqrt(112.5))
    assert found.ratio == 20.0
    assert found.leaders.tolist() == found.kept.tolist() == [False, False, True]
    assert np.degrees(found.angles) == pytest.approx([45.0, 45.0, 0.0], abs=1e-5)
    assert np.degrees(found.threshold) == pytest.approx(30.0, abs=1e-5)
    assert found.lead_norm == pytest.approx(math.sqrt(2))


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


def begun():
    strategy = gapsl(k_min=20, k_max=80)
    strategy.begin(ArrayRecord(MODEL.state_dict()))
    return strategy


def test_k_grows_with_progress_and_agreement():
    """Dispersions 0 (first step), then the fan's, then half way: equation 2 by hand."""
    strategy = begun()
    narrow = [(1.0, 0.0), (1.0, 0.2), (1.0, 0.4)]
    ratios, dispersions = [], []
    for vectors in (FAN, FAN, narrow, FAN):
        step = VectorStep(vectors, progress=0.5)
        strategy.step(step)
        ratios.append(step.metrics["k-percent"])
        dispersions.append(step.metrics["dispersion"])
    assert dispersions[2] < dispersions[0]
    assert ratios == pytest.approx([20.0, 20.0, 20 + 0.5 * 1.0 * 60, 20.0])
    state = strategy.state_dict()
    assert state["dispersion-extremes"] == [dispersions[2], dispersions[0]]
    other, again = begun(), VectorStep(narrow, progress=0.5)
    other.load_state_dict(state)
    other.step(again)
    assert again.metrics["k-percent"] == pytest.approx(50.0)


def test_the_reported_loss_has_the_term_of_equation_7():
    _, metrics, step = aligned(FAN, losses=[1.0, 2.0, 4.0], eta=-1.0, lam=0.5)
    term = 0.5 * (1 - math.cos(math.radians(45)))
    assert metrics["loss"] == pytest.approx(7 + 2 * term)
    assert step.found.losses == {"0": 1.0, "1": 2.0, "2": 4.0}


def test_projection_turns_kept_gradients_to_the_leader():
    """g = (1, 0), leader (1, 1)/√2: g + λ |g| (ĝ_lead - cos 45° ĝ) = (1 + λ(√½ - √½), λ √½)."""
    gradient, _, _ = aligned(FAN, eta=-1.0, lam=0.2, active_alignment="projection")
    turned = 0.2 * math.sqrt(0.5)
    assert gradient == pytest.approx([1 + turned + 1, turned + 1 + 1])


def test_excluded_clients_can_be_skipped():
    assert aligned(FAN)[2].told == {"0", "1", "2"}
    assert aligned(FAN, excluded_clients="skip")[2].told == {"2"}


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
