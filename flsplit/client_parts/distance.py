"""Distance correlation, differentiable: what NoPeek minimises, and what leakage is measured by."""

import torch
from torch import Tensor

from flsplit.errors import ConfigError


def distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the sample distance correlation of the rows of ``x`` and ``y``, from 0 to 1.

    dCor² = dCov²(x, y) / √(dCov²(x, x) dCov²(y, y)), with dCov² the mean product of the doubly
    centred matrices of Euclidean distances (Székely, Rizzo, Bakirov 2007,
    https://arxiv.org/abs/0803.4101). Of few rows in many dimensions it is near 1 whatever they
    are: compare with what noise of the same shape gives, or take ``dcor_unbiased``.

    Parameters
    ----------
    x, y : torch.Tensor
        ``(n, ...)``; rows are flattened. Differentiable in both.

    Returns
    -------
    torch.Tensor
        A scalar; 0 where all rows of one of them are the same.

    Raises
    ------
    ConfigError
        If they have not the same number of rows, or fewer than 2.
    """
    a, b = (_centred(one) for one in row_distances(x, y))
    least = torch.finfo(b.dtype)
    # A root has no derivative at 0, where all rows of one are the same or nothing is common.
    scale = ((a * a).mean() * (b * b).mean()).clamp(min=least.tiny).sqrt()
    return ((a * b).mean().clamp(min=0) / scale + least.eps**2).sqrt()


def row_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices ``(n, n)`` of the rows' Euclidean distances, in ``y``'s precision.

    ConfigError if they have not the same number of rows, or fewer than 2.
    """
    if x.shape[:1] != y.shape[:1] or x.ndim == 0 or len(x) < 2:
        raise ConfigError(
            f"distance correlation of shapes {tuple(x.shape)} and {tuple(y.shape)}: expected the "
            "same number of rows, at least 2"
        )
    dtype = y.dtype if y.dtype in (torch.float32, torch.float64) else torch.float32
    rows = [one.flatten(1) if one.ndim > 1 else one[:, None] for one in (x.to(y.device), y)]
    # Not by matrix products: of two equal rows they don't give 0.
    exact = "donot_use_mm_for_euclid_dist"
    found = [torch.cdist(one.to(dtype), one.to(dtype), compute_mode=exact) for one in rows]
    return found[0], found[1]


def _centred(distances: Tensor) -> Tensor:
    by_row = distances.mean(0, keepdim=True)
    return distances - by_row - by_row.T + distances.mean()
