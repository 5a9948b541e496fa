"""Noise that hides a binary label in a gradient, with as little of it as that takes."""

import numpy as np
import torch
from torch import Tensor


def marvell_noise(rows: Tensor, positive: Tensor, power: float, rng: torch.Generator) -> Tensor:
    """Return noise for the gradients of two classes (Li et al. 2022, theorem 2 and its solution).

    Gradients of a class are taken for Gaussian around the class's mean, with the same variance in
    each direction; noise of class c has variance a_c along the difference Δ of the means and b_c in
    each other direction. They are such that the sum of both Kullback-Leibler divergences between
    the noisy classes is least, at a mean squared length of ``power`` times ‖Δ‖².

    ``rows`` are ``(n, d)``, and some of both kinds.
    """
    d = rows.shape[1]
    own = {True: rows[positive], False: rows[~positive]}
    delta = own[True].mean(0) - own[False].mean(0)
    gap = float(delta.square().sum())
    noise = torch.randn(rows.shape, generator=rng)
    if not gap or not power:
        return torch.zeros_like(noise)
    variances = [
        float((one - one.mean(0)).square().sum(1).mean()) / d for one in (own[True], own[False])
    ]
    share = len(own[True]) / len(rows)
    found = marvell_variances(gap, variances, d, share, power * gap)
    direction = delta / delta.norm()
    for kind, (along, across) in zip((positive, ~positive), found, strict=True):
        part = noise[kind]
        onto = (part @ direction)[:, None] * direction
        noise[kind] = onto * along**0.5 + (part - onto) * across**0.5
    return noise


def marvell_variances(
    gap: float, variances: list[float], d: int, share: float, power: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (along, across) Δ of the positive and of the negative class's noise.

    ``gap`` is ‖Δ‖², ``variances`` those of the positive and of the negative gradients in each of
    ``d`` directions, ``share`` that of positive rows.
    """
    from scipy.optimize import minimize  # takes a second, and few ask for it

    # In units of the power, so that one tolerance fits all steps of a training.
    v, u, g = max(variances[0] / power, 1e-9), max(variances[1] / power, 1e-9), gap / power

    def variances_of(x: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> list[float]:
        # Shares of the power, from any four numbers.
        e = np.exp(x - x.max())
        a1, b1, a0, b0 = e / e.sum()
        others = max(d - 1, 1)
        return [a1 / share, b1 / share / others, a0 / (1 - share), b0 / (1 - share) / others]

    def divergence(x: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
        a1, b1, a0, b0 = variances_of(x)
        p, q, r, s = a1 + v, a0 + u, b1 + v, b0 + u
        apart = p / q + q / p + (d - 1) * (r / s + s / r) - 2 * d + g * (1 / p + 1 / q)
        return float(apart)

    starts = np.array([[0.0, 0, 0, 0], [5, 0, 5, 0], [5, 0, 0, 0], [0, 0, 5, 0], [0, 5, 0, 0]])
    best = min((minimize(divergence, x, method="BFGS") for x in starts), key=lambda one: one.fun)
    a1, b1, a0, b0 = (float(one) * power for one in variances_of(best.x))
    return (a1, b1), (a0, b0)
