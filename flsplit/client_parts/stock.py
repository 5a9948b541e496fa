"""The client parts that flsplit has: clipping, noise, and a proximal term."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.client_parts.client_part import ClientPart, ClientWhere
from flsplit.errors import ConfigError
from flsplit.finite import clip_gradients

SMASHED, CUT_GRADIENT, GRADIENTS = "smashed", "cut-gradient", "gradients"
OUTPUTS, OUTPUT_GRADIENT = "outputs", "output-gradient"
"""What crosses a U-shaped split's second cut: down, and up."""


def check_place(part: ClientPart, place: object, *places: str) -> None:
    """Raise ConfigError if a part is to act where it can't."""
    if place not in places:
        *others, last = map(repr, places)
        raise ConfigError(
            f"client part {part.name!r}: place is {place!r}, expected {', '.join(others)} or {last}"
        )


def check_number(part: ClientPart, name: str, value: object, *, above_zero: bool) -> None:
    """Raise ConfigError if an argument is no number above 0, or no number from 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value > 0 if above_zero else value >= 0):  # type: ignore[operator]
        least = "more than 0" if above_zero else "at least 0"
        raise ConfigError(f"client part {part.name!r}: {name} is {value!r}, expected {least}")


def check_count(part: ClientPart, name: str, value: object) -> None:
    """Raise ConfigError if an argument is no integer from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"client part {part.name!r}: {name} is {value!r}, expected an integer from 1"
        )


class Clip(ClientPart):
    """Scale down what is longer than ``norm`` (L2), by norm / its length; leave the rest.

    Parameters
    ----------
    norm : float
        The longest allowed.
    per : {'sample', 'batch'}
        Whether each row of a batch is measured, or all of it together.
    place : {'smashed', 'cut-gradient', 'output-gradient', 'gradients'}
        What is clipped. The factor of smashed data is differentiated, too. Gradients of the
        client segment are those of a batch's mean and clipped per batch, all parameters
        together, as `torch.nn.utils.clip_grad_norm_` does.
    """

    name = "clip"

    def __init__(self, norm: float = 1.0, per: str = "sample", place: str = SMASHED) -> None:
        self.norm, self.per, self.place = norm, per, place
        check_place(self, place, SMASHED, CUT_GRADIENT, OUTPUT_GRADIENT, GRADIENTS)
        check_number(self, "norm", norm, above_zero=True)
        if per not in ("sample", "batch"):
            raise ConfigError(f"client part 'clip': per is {per!r}, expected 'sample' or 'batch'")
        if place == GRADIENTS and per == "sample":
            raise ConfigError(
                "client part 'clip': the client segment's gradients are those of a whole batch; "
                "clip them per='batch', or clip the smashed data per sample"
            )

    def smashed(self, where: ClientWhere, smashed: Tensor) -> Tensor:
        """Clip smashed data."""
        return self._clipped(smashed) if self.place == SMASHED else smashed

    def cut_gradient(self, where: ClientWhere, gradient: Tensor) -> Tensor:
        """Clip the cut-layer gradient."""
        return self._clipped(gradient) if self.place == CUT_GRADIENT else gradient

    def output_gradient(self, where: ClientWhere, gradient: Tensor) -> Tensor:
        """Clip the gradient that goes up at the second cut."""
        return self._clipped(gradient) if self.place == OUTPUT_GRADIENT else gradient

    def gradients(self, where: ClientWhere, parameters: Sequence[nn.Parameter]) -> None:
        """Clip the client segment's gradients."""
        if self.place == GRADIENTS:
            clip_gradients(parameters, self.norm)

    def _clipped(self, tensor: Tensor) -> Tensor:
        dims = tuple(range(1 if self.per == "sample" else 0, tensor.ndim))
        length = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True) if dims else tensor.abs()
        # clamp, not a division by what may be 0: what is short enough keeps its bits.
        return tensor * (self.norm / length.clamp(min=self.norm))


class Noise(ClientPart):
    """Add Gaussian noise with standard deviation ``sigma`` to every element.

    Parameters
    ----------
    sigma : float
        The standard deviation.
    place : {'smashed', 'cut-gradient', 'output-gradient', 'gradients'}
        What it is added to.
    """

    name = "noise"

    def __init__(self, sigma: float, place: str = SMASHED) -> None:
        self.sigma, self.place = sigma, place
        check_place(self, place, SMASHED, CUT_GRADIENT, OUTPUT_GRADIENT, GRADIENTS)
        check_number(self, "sigma", sigma, above_zero=False)

    def smashed(self, where: ClientWhere, smashed: Tensor) -> Tensor:
        """Add noise to smashed data."""
        return smashed + self._noise(where, smashed) if self.place == SMASHED else smashed

    def cut_gradient(self, where: ClientWhere, gradient: Tensor) -> Tensor:
        """Add noise to the cut-layer gradient."""
        return gradient + self._noise(where, gradient) if self.place == CUT_GRADIENT else gradient

    def output_gradient(self, where: ClientWhere, gradient: Tensor) -> Tensor:
        """Add noise to the gradient that goes up at the second cut."""
        noisy = self.place == OUTPUT_GRADIENT
        return gradient + self._noise(where, gradient) if noisy else gradient

    def gradients(self, where: ClientWhere, parameters: Sequence[nn.Parameter]) -> None:
        """Add noise to the client segment's gradients."""
        for parameter in parameters if self.place == GRADIENTS else ():
            if parameter.grad is not None:
                if parameter.grad.is_sparse:
                    raise ConfigError(
                        "client part 'noise': a gradient of the client segment is sparse, and "
                        "noise would not be; make the Embedding without sparse=True"
                    )
                parameter.grad += self._noise(where, parameter.grad)

    def _noise(self, where: ClientWhere, like: Tensor) -> Tensor:
        # Drawn on the processor in float32, so that all devices and dtypes get the same numbers.
        return (torch.randn(like.shape, generator=where.rng) * self.sigma).to(like)


class Proximal(ClientPart):
    """FedProx's term on the client segment: add μ/2 ‖w − w_round‖² to what a client minimises.

    w_round are its trainable parameters as they were when the round began.
    (https://arxiv.org/abs/1812.06127)

    Parameters
    ----------
    mu : float
        The weight μ.
    """

    name = "proximal"
    needs_round_start = True

    def __init__(self, mu: float) -> None:
        self.mu = mu
        check_number(self, "mu", mu, above_zero=False)

    def loss(self, where: ClientWhere, inputs: Any, smashed: Any, labels: Any) -> Tensor | None:
        """Return the term."""
        own = dict(where.segment.named_parameters())
        far = [(own[name] - start).square().sum() for name, start in where.round_start.items()]
        return self.mu / 2 * torch.stack(far).sum() if far else None
