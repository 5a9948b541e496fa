"""Decoders: identity is found, noise is not; an attack on one's own data is refused."""

import math
from itertools import product

import pytest
import torch
from spots import images
from torch import nn

from flsplit.errors import ConfigError
from flsplit.privacy import invert, reconstruct, ssim
from flsplit.seeds import seeded

KNOWN, PRIVATE = images(300, 0), images(40, 1)


def test_identity_reconstructs_perfectly():
    found = reconstruct((KNOWN, KNOWN), (PRIVATE, PRIVATE), epochs=1)
    assert found.mse < 1e-6
    assert found.explained > 0.9999
    assert found.ssim > 0.999
    assert found.cross_entropy == pytest.approx(found.floor, abs=1e-4)
    torch.testing.assert_close(found.pictures, PRIVATE, atol=0.01, rtol=0)


def test_noise_reconstructs_nothing():
    rng = torch.Generator().manual_seed(2)
    noise = torch.randn(300, 4, 4, 4, generator=rng), torch.randn(40, 4, 4, 4, generator=rng)
    found = reconstruct((noise[0], KNOWN), (noise[1], PRIVATE), epochs=5)
    assert found.explained < 0.05
    assert found.mse > 0.95 * found.guess
    assert found.ssim < 0.3


def test_a_convolution_is_inverted_and_rows_too():
    with seeded(0):
        segment = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()).requires_grad_(False)
    found = reconstruct((segment(KNOWN), KNOWN), (segment(PRIVATE), PRIVATE), epochs=2)
    assert found.explained > 0.95
    flat = reconstruct(
        (KNOWN.flatten(1), KNOWN.flatten(1)), (PRIVATE.flatten(1), PRIVATE.flatten(1)), epochs=1
    )
    assert flat.explained > 0.9999
    assert math.isnan(flat.ssim)


def test_the_numbers_by_hand():
    """An attacker whose smashed data says nothing says the mean: 1/4 of black and white."""
    known = torch.tensor([[0.0], [1.0]]).repeat(20, 1)
    private = torch.tensor([[0.0, 1.0, 1.0, 0.0]]).repeat(3, 1) * 0.999
    inputs = known.expand(40, 4)
    found = reconstruct((torch.zeros(40, 2), inputs), (torch.zeros(3, 2), private), epochs=0)
    assert found.guess == pytest.approx(0.25, abs=1e-3)
    assert found.mse == pytest.approx(0.25, abs=1e-3)
    assert found.cross_entropy == pytest.approx(math.log(2), abs=1e-3)


def test_data_that_it_was_trained_on_is_refused():
    private = torch.cat([PRIVATE, KNOWN[:3]])
    with pytest.raises(ConfigError, match="3 of 43 private inputs are among the attacker's own"):
        reconstruct((KNOWN, KNOWN), (private, private))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="300 rows of smashed data and 299"):
        reconstruct((KNOWN, KNOWN[:299]), (PRIVATE, PRIVATE))
    with pytest.raises(ConfigError, match=r"\(1, 8, 8\) and \(1, 8, 8\), the private ones \(4,\)"):
        reconstruct((KNOWN, KNOWN), (torch.zeros(40, 4), PRIVATE))


def test_similarity_window_by_window():
    x, y = images(2, 3, 9), (images(2, 3, 9) + 0.1 * images(2, 4, 9)).clamp(0, 1)
    found = []
    for one, other in zip(x.double(), y.double(), strict=True):
        for row, column in product(range(3), range(3)):  # 9 - 7 + 1 places for the window
            a, b = (part[0, row : row + 7, column : column + 7].flatten() for part in (one, other))
            (va, both), (_, vb) = torch.cov(torch.stack([a, b])).tolist()
            means = 2 * a.mean() * b.mean() + 1e-4, a.mean() ** 2 + b.mean() ** 2 + 1e-4
            found.append(means[0] * (2 * both + 9e-4) / (means[1] * (va + vb + 9e-4)))
    assert ssim(x, y) == pytest.approx(sum(map(float, found)) / 18)
    assert ssim(x, x) == pytest.approx(1.0)


def test_inversion_without_data():
    """A linear segment with known weights is inverted; without them something else comes out."""
    with seeded(0):
        segment = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh()).requires_grad_(False)
    private = PRIVATE[:4]
    found = invert(
        segment(private), lambda: segment, (1, 8, 8), rounds=6, segment_steps=0, smoothness=0.0
    )
    assert (found - private).square().mean() < 0.05 * private.var()
    blind = invert(
        segment(private),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh()),
        (1, 8, 8), rounds=3, input_steps=20, segment_steps=20,
    )  # fmt: skip
    assert blind.shape == private.shape
    assert 0 <= blind.min() <= blind.max() <= 1
