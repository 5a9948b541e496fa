"""Every random number in a run follows from the run's seed and a client's name.

Nothing is drawn from a generator that lives on between steps, so a step can be computed
again, in another process or after a crash, with the same result.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.random.mtrand as mtrand
import torch


def derive_seed(seed: int, *labels: str | int) -> int:
    """Return a seed for one use, e.g. ``derive_seed(0, "client", "3", round, step)``.

    Different labels give independent seeds, from 0 to 2**63 - 1.
    """
    text = "\x1f".join(map(str, (seed, *labels)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


_spare: list[Any] = []  # generators of NumPy that no block uses now


class _Here(threading.local):
    """Whether somebody in this thread goes on with what Python and NumPy would draw next."""

    goes_on: bool = True


_here = _Here()


class seeded:  # noqa: N801 - it is used as contextlib's own are
    """Seed torch, NumPy and Python inside the block; outside they go on as if it weren't there.

    A class, since one made of a generator, around another of torch's, took longer than a step of
    a small network.

    Of GPUs the generator of ``device`` is seeded as well as the processor's; others are left alone.
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._seed = seed
        self._cuda = device if device is not None and device.type == "cuda" else None

    def __enter__(self) -> None:
        """Remember all generators' states, and seed them."""
        self._outside = _taken() if _here.goes_on else None
        _here.goes_on = True
        self._torch = torch.default_generator.get_state()
        # torch.manual_seed() would seed every GPU, too, and where there is none remember for that
        # the whole call stack.
        torch.default_generator.manual_seed(self._seed)
        if self._cuda is not None:
            self._on_gpu = torch.cuda.get_rng_state(self._cuda)
            with torch.cuda.device(self._cuda):
                torch.cuda.manual_seed(self._seed)
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)  # noqa: NPY002 - datasets' transforms use the global one

    def __exit__(self, *exc_info: object) -> None:
        """Set them back."""
        if self._outside is None:
            _here.goes_on = False
        else:
            _put_back(*self._outside)
        torch.default_generator.set_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._on_gpu, self._cuda)


@contextmanager
def set_aside() -> Iterator[None]:
    """Remember Python's and NumPy's states once, for all :func:`seeded` blocks inside this one.

    To take them out and put them back takes longer than a step of a small network. What draws
    from them between those blocks draws what the last one has left.
    """
    before, outside = _here.goes_on, _taken()
    _here.goes_on = False
    try:
        yield
    finally:
        _here.goes_on = before
        _put_back(*outside)


def _taken() -> tuple[Any, Any, Any]:
    """Return the states of Python's and NumPy's generators, and NumPy's itself."""
    states = random.getstate(), np.random.get_state(), mtrand.get_bit_generator()  # noqa: NPY002
    # Another generator in its place need not be put back to a state.
    mtrand.set_bit_generator(_spare.pop() if _spare else np.random.MT19937())
    return states


def _put_back(python: Any, numpy: Any, own: Any) -> None:
    random.setstate(python)
    _spare.append(mtrand.get_bit_generator())
    mtrand.set_bit_generator(own)
    if numpy[3]:  # a normal number that it has in hand
        np.random.set_state(numpy)  # noqa: NPY002


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """Return a torch generator (CPU) seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))
