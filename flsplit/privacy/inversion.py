"""Inputs back from smashed data by a server that has neither data nor the client's weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from flsplit.seeds import generator, seeded


def invert(
    smashed: Tensor,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *,
    rounds: int = 20,
    input_steps: int = 50,
    segment_steps: int = 50,
    smoothness: float = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> Tensor:
    """Return inputs that a clone of the client segment maps to ``smashed``, as UnSplit does.

    Erdoğan, Küpçü, Çiçek 2022 (https://arxiv.org/abs/2108.09033): inputs and the weights of a
    clone are fitted in turns, with total variation as a prior on images. The attacker knows the
    architecture of the client segment and how inputs are scaled, and sees smashed data of one
    moment. It is for networks of few layers before the cut: it fails (pictures of nothing) after
    several layers or pooling, on noise, and on inputs without a prior. Where the segment's weights
    are known, give them in what ``build`` returns, and 0 ``segment_steps``.

    Parameters
    ----------
    smashed : torch.Tensor
        ``(n, ...)``.
    build : callable
        Returns a client segment; it is run in evaluation mode.
    shape : tuple of int
        Of one input.
    rounds, input_steps, segment_steps : int
        How often inputs and clone take turns, and the steps of each turn.
    smoothness : float
        The weight of total variation, for inputs of 3 dimensions.
    bounds : tuple of float
        The least and the greatest value of an input.
    seed : int
        Where inputs and clone start.

    Returns
    -------
    torch.Tensor
        ``(n, *shape)``.
    """
    smashed = smashed.detach().cpu().float()
    with seeded(seed):
        clone = build().cpu().eval()
    low, high = bounds
    middle = torch.full((len(smashed), *shape), (low + high) / 2)
    guess = (
        middle + torch.randn(middle.shape, generator=generator(seed, "invert")) * (high - low) / 100
    )
    guess.requires_grad_()
    by_inputs = torch.optim.Adam([guess], lr=0.02 * (high - low))
    weights = [p for p in clone.parameters() if p.requires_grad]
    by_weights = torch.optim.Adam(weights, lr=1e-3) if weights and segment_steps else None
    scale = smashed.square().mean().clamp(min=torch.finfo(smashed.dtype).tiny)

    def distance() -> Tensor:
        return functional.mse_loss(clone(guess), smashed) / scale

    for _ in range(rounds):
        for _ in range(input_steps):
            by_inputs.zero_grad()
            prior = smoothness * _variation(guess) / (high - low) ** 2
            torch.autograd.backward(distance() + prior)
            by_inputs.step()
            with torch.no_grad():
                guess.clamp_(low, high)
        for _ in range(segment_steps if by_weights else 0):
            assert by_weights is not None
            by_weights.zero_grad()
            torch.autograd.backward(distance())
            by_weights.step()
    return guess.detach()


def _variation(images: Tensor) -> Tensor:
    if images.ndim != 4:
        return images.new_zeros(())
    down, right = images.diff(dim=-2), images.diff(dim=-1)
    return down.square().mean() + right.square().mean()
