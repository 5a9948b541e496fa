"""Pictures to attack: bright spots."""

import torch


def images(n, seed, size=8):
    """Return smooth pictures: a bright spot anywhere."""
    rng = torch.Generator().manual_seed(seed)
    y, x, wide = torch.rand(3, n, 1, 1, generator=rng)
    grid = torch.linspace(0, 1, size)
    spot = (grid[:, None] - y).square() + (grid - x).square()
    return torch.exp(-spot / (0.02 + 0.1 * wide)).unsqueeze(1)
