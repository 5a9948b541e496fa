"""A DataLoader's own sampler, whose indices follow from the run's seed."""

import copy
import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from flsplit.errors import DataError
from flsplit.log import warn_once
from flsplit.seeds import seeded


@dataclass(frozen=True)
class OwnSampler:
    """A sampler that a user gave to a DataLoader, with the data set that it is for.

    Each time it is gone over it is as ``data()`` made it, and all random numbers that it draws,
    from generators of its own too, are seeded. So its indices are the same in a process that has
    kept it and in one that has just made it.
    """

    sampler: Any
    dataset: Any

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return type(self.sampler).__name__

    def __len__(self) -> int:
        """Return how many indices it says an epoch has."""
        return len(self.sampler)

    def draw(self, seed: int, epoch: int, run: str) -> Tensor:
        """Return the indices ``(n,)`` of an epoch.

        The seed is torch's, NumPy's, Python's and that of the generators which the sampler holds;
        the epoch is handed to its ``set_epoch``, if it has one.

        DataError if the sampler fails, or yields something else than as many indices as it says.
        """
        try:
            own = self._copied()
            if hasattr(own, "set_epoch"):
                own.set_epoch(epoch)
            before = _numbers(own)
            with seeded(seed):
                for held in _held(own):
                    _reseed(held, seed)
                indices = [operator.index(index) for index in islice(own, len(self) + 1)]
        except Exception as error:
            raise DataError(
                f"the sampler {self.name} of the DataLoader failed in epoch {epoch}, expected "
                f"whole numbers: {type(error).__name__}: {error}"
            ) from error
        if len(indices) != len(self):
            found = "more" if len(indices) > len(self) else str(len(indices))
            raise DataError(
                f"the sampler {self.name} of the DataLoader yields {found} indices in epoch "
                f"{epoch}, its length says {len(self)}"
            )
        changed = [name for name, value in _numbers(own).items() if before.get(name) != value]
        if changed and not hasattr(own, "set_epoch"):
            warn_once(
                run,
                f"the sampler {self.name} of the DataLoader changes its {changed[0]!r} as it is "
                "gone over; every epoch begins with the sampler as data() made it instead. A "
                "method set_epoch(epoch) is called with the epoch's number",
            )
        return torch.tensor(indices, dtype=torch.int64)

    def _copied(self) -> Any:
        # Data sets may be large, or hold open files; samplers only ask for their length.
        shared = {id(one): one for one in _held(self.sampler) if isinstance(one, Dataset)}
        shared[id(self.dataset)] = self.dataset
        return copy.deepcopy(self.sampler, shared)


def _attributes(thing: Any) -> dict[str, Any]:
    return getattr(thing, "__dict__", {})


def _numbers(sampler: Any) -> dict[str, float]:
    return {name: v for name, v in _attributes(sampler).items() if isinstance(v, int | float)}


def _held(sampler: Any) -> Iterator[Any]:
    """Yield what a sampler holds, and the samplers in it."""
    for value in _attributes(sampler).values():
        if isinstance(value, Sampler):
            yield from _held(value)
        else:
            yield value


def _reseed(held: Any, seed: int) -> None:
    match held:
        case torch.Generator():
            held.manual_seed(seed)
        case random.Random():
            held.seed(seed)
        case np.random.RandomState():
            held.seed(seed % 2**32)
        case np.random.Generator():
            held.bit_generator.state = type(held.bit_generator)(seed).state
