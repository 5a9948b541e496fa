"""Parts that hide: NoPeek, shuffled batches, noise on gradients that give labels away."""

import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flsplit.client_parts.client_part import ClientPart, ClientWhere, PartWhere
from flsplit.client_parts.distance import distance_correlation
from flsplit.client_parts.marvell import marvell_noise
from flsplit.client_parts.stock import CUT_GRADIENT, OUTPUT_GRADIENT, check_number, check_place
from flsplit.errors import ConfigError
from flsplit.nested import tensors_of
from flsplit.seeds import generator


class NoPeek(ClientPart):
    """Add ``alpha`` times the distance correlation of inputs and smashed data to the loss.

    Vepakomma et al. 2020 (https://arxiv.org/abs/2008.09161). What it makes small is that number; a
    decoder may still find a lot. Inputs that are whole numbers (tokens) don't count.

    Parameters
    ----------
    alpha : float
        The weight.
    """

    name = "no-peek"

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        check_number(self, "alpha", alpha, above_zero=False)

    def loss(self, where: ClientWhere, inputs: Any, smashed: Any, labels: Any) -> Tensor | None:
        """Return the term; none of a batch of one."""
        values = [one for one in tensors_of(smashed) if one.requires_grad and len(one) > 1]
        seen = [one.flatten(1) for one in tensors_of(inputs) if one.is_floating_point()]
        if not values or not seen:
            return None
        x = torch.cat([one.to(seen[0].dtype) for one in seen], dim=1)
        return self.alpha * torch.stack([distance_correlation(x, one) for one in values]).sum()


class Shuffle(ClientPart):
    """Shuffle the rows of every batch, smashed data and labels together.

    The order of a client's examples follows from the run's seed, which the server knows: it can
    tell which rows of two epochs are the same example. This permutation follows from a number that
    the client draws and keeps. It hides nothing of a row itself, and rows that hardly change can
    be found again. Sums over rows are added up in another order, so last digits differ from run
    to run.
    """

    name = "shuffle"

    def __init__(self) -> None:
        self._key = secrets.randbits(48)

    def order(self, where: ClientWhere, num_rows: int) -> Tensor:
        """Return the permutation."""
        secret = generator(self._key, "shuffle", where.client, where.round, where.step)
        return torch.randperm(num_rows, generator=secret)

    def state_dict(self) -> dict[str, Any]:
        """Return the secret."""
        return {"key": self._key}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with that."""
        self._key = int(state.get("key", self._key))


class LabelNoise(ClientPart):
    """Add Gaussian noise to gradients that labels can be told by.

    It protects labels that the *server* has from clients that see cut-layer gradients, or in a
    U-shaped split, with ``place="output-gradient"``, the clients' labels from the server. Of two
    classes, ``marvell`` chooses the noise's covariance as Li et al. 2022
    (https://arxiv.org/abs/2102.08504) do: least sum of both Kullback-Leibler divergences between
    the classes' gradients at a given power. Otherwise, and where the labels of a batch are not of
    two classes, noise is the same in all directions.

    Parameters
    ----------
    power : float
        The noise's expected squared length, per row: of ``marvell`` in units of the squared
        distance between the classes' mean gradients, else of the rows' mean squared length.
    marvell : bool
        Whether to choose the covariance.
    place : {'cut-gradient', 'output-gradient'}
        What it is added to: by the server on the way down, or by clients on the way up.
    """

    name = "label-noise"

    def __init__(self, power: float, marvell: bool = True, place: str = CUT_GRADIENT) -> None:
        self.power, self.marvell, self.place = power, marvell, place
        check_place(self, place, CUT_GRADIENT, OUTPUT_GRADIENT)
        check_number(self, "power", power, above_zero=False)
        if not isinstance(marvell, bool):
            raise ConfigError(f"client part 'label-noise': marvell is {marvell!r}, expected a bool")

    def down(self, where: PartWhere, cut_gradient: Tensor) -> Tensor:
        """Add the noise on the way down."""
        return self._noisy(where, cut_gradient) if self.place == CUT_GRADIENT else cut_gradient

    def output_gradient(self, where: ClientWhere, gradient: Tensor) -> Tensor:
        """Add the noise on the way up."""
        return self._noisy(where, gradient) if self.place == OUTPUT_GRADIENT else gradient

    def _noisy(self, where: PartWhere, gradient: Tensor) -> Tensor:
        rows = gradient.detach().cpu().float().reshape(len(gradient), -1)
        labels = where.labels
        plain = isinstance(labels, Tensor) and labels.ndim == 1
        classes = torch.unique(labels) if plain else []
        if self.marvell and len(classes) == 2:
            noise = marvell_noise(rows, labels.cpu() == classes[1].cpu(), self.power, where.rng)
        else:
            sigma = (self.power * rows.square().sum(1).mean() / rows.shape[1]).sqrt()
            noise = torch.randn(rows.shape, generator=where.rng) * sigma
        return gradient + noise.reshape(gradient.shape).to(gradient)
