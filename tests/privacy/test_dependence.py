"""Distance correlation and mutual information against their closed forms."""

import math

import pytest
import torch

from flsplit.errors import ConfigError
from flsplit.privacy import dcor_unbiased, distance_correlation, mutual_information


def gaussians(rho, n, *, dims=1, seed=0):
    """Return pairs of standard normal rows whose coordinates correlate pairwise by rho."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, generator=rng, dtype=torch.float64)
    noise = torch.randn(n, dims, generator=rng, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def dcor_squared_of_gaussians(rho):
    """Székely, Rizzo, Bakirov 2007, theorem 7."""
    top = rho * math.asin(rho) + math.sqrt(1 - rho**2)
    top += -rho * math.asin(rho / 2) - math.sqrt(4 - rho**2) + 1
    return top / (1 + math.pi / 3 - math.sqrt(3))


def test_distance_correlation_by_hand():
    """x = 0, 1, 3 has distances 1, 3, 2 and y = 0, 0, 1 has 0, 1, 1; centred by hand."""
    x, y = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double()
    a = torch.tensor([[0.0, 1, 3], [1, 0, 2], [3, 2, 0]]).double()
    b = torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 1, 0]]).double()
    means_a, means_b = [4 / 3, 1.0, 5 / 3], [1 / 3, 1 / 3, 2 / 3]
    centred = [
        torch.tensor([[m[i][j] - mean[i] - mean[j] + all_ for j in range(3)] for i in range(3)])
        for m, mean, all_ in ((a.tolist(), means_a, 4 / 3), (b.tolist(), means_b, 4 / 9))
    ]
    first, second = centred
    expected = (first * second).mean() / ((first**2).mean() * (second**2).mean()).sqrt()
    assert distance_correlation(x, y).item() == pytest.approx(expected.sqrt().item(), abs=1e-7)


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_distance_correlation_of_gaussians(rho):
    x, y = gaussians(rho, 2000)
    # Over ten seeds the estimate's standard deviation is below 0.02.
    assert float(distance_correlation(x, y)) == pytest.approx(
        math.sqrt(dcor_squared_of_gaussians(rho)), abs=0.05
    )
    assert dcor_unbiased(x, y) == pytest.approx(dcor_squared_of_gaussians(rho), abs=0.06)


def test_what_is_a_similarity_of_the_other_correlates_perfectly():
    x, _ = gaussians(0.0, 50, dims=3)
    turned = x @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q * 2.5 + 7
    assert float(distance_correlation(x, turned)) == pytest.approx(1)
    assert dcor_unbiased(x, turned) == pytest.approx(1)


def test_independent_rows_in_many_dimensions():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 200, generator=rng), torch.randn(60, 300, generator=rng)
    assert float(distance_correlation(x, y)) > 0.9  # the bias that the docstring tells of
    assert abs(dcor_unbiased(x, y)) < 0.05


def test_rows_that_are_all_the_same():
    x, y = torch.ones(5, 3), torch.randn(5, 2).requires_grad_()
    found = distance_correlation(x, y)
    assert found.item() == pytest.approx(0, abs=1e-6)
    found.backward()
    assert torch.isfinite(y.grad).all()


def test_distance_correlation_is_differentiable():
    x, y = gaussians(0.5, 12, dims=2)
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: distance_correlation(x, rows), [y])


@pytest.mark.parametrize("rho", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("dims", [1, 2])
def test_mutual_information_of_gaussians(rho, dims):
    exact = -dims / 2 * math.log(1 - rho**2)
    found = [mutual_information(*gaussians(rho, 2000, dims=dims, seed=s)) for s in range(8)]
    # The mean of eight: one estimate has a standard error of 0.02 nats.
    assert sum(found) / len(found) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    ("rho", "mean", "off"),
    [
        (0.2, 0.029, 0.036),
        (0.3, 0.059, 0.043),
        (0.5, 0.158, 0.055),
        (0.7, 0.358, 0.067),
        (0.9, 0.861, 0.080),
        (0.98, 1.641, 0.070),
    ],
)
def test_how_far_off_single_estimates_are(rho, mean, off):
    """The table in docs/leakage.md."""
    exact, found = -0.5 * math.log(1 - rho**2), []
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        x, noise = torch.randn(2000, 1, generator=rng), torch.randn(2000, 1, generator=rng)
        found.append(mutual_information(x, rho * x + math.sqrt(1 - rho**2) * noise))
    # Three digits are written down; another machine's sums may order a few neighbours otherwise.
    assert sum(found) / 8 == pytest.approx(mean, abs=0.002)
    assert max(abs(one - exact) for one in found) == pytest.approx(off, abs=0.002)


def test_mutual_information_of_independent_rows():
    assert mutual_information(*gaussians(0.0, 2000)) == pytest.approx(0, abs=0.06)


def test_mutual_information_has_a_ceiling():
    x, _ = gaussians(0.0, 500)
    assert mutual_information(x, x) < 2 * math.log(500)  # of the same rows it is infinite


def test_unequal_numbers_of_rows_are_refused():
    x, y = torch.zeros(5, 2), torch.zeros(4, 2)
    with pytest.raises(ConfigError, match=r"\(5, 2\) and \(4, 2\): expected the same number"):
        distance_correlation(x, y)
    with pytest.raises(ConfigError, match="of 5 and 4 rows"):
        mutual_information(x, y)
    with pytest.raises(ConfigError, match="of 3 rows: it needs 4"):
        dcor_unbiased(x[:3], x[:3])
