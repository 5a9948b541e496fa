"""Every random number in a run follows from the run's seed and a client's name.

Nothing is drawn from a generator that lives on between steps, so a step can be computed
again, in another process or after a crash, with the same result.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def derive_seed(seed: int, *labels: str | int) -> int:
    """Return a seed for one use, e.g. ``derive_seed(0, "client", "3", round, step)``.

    Parameters
    ----------
    seed : int
        The run's seed.
    *labels : str or int
        What the random numbers are for. Different labels give independent seeds.

    Returns
    -------
    int
        A number from 0 to 2**63 - 1.
    """
    text = "\x1f".join(map(str, (seed, *labels)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch, NumPy and Python inside the block; outside they go on as if it weren't there.

    Parameters
    ----------
    seed : int
        The seed.
    device : torch.device, optional
        A GPU whose generator is seeded as well as the processor's; others are left alone.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=cuda):
        # torch.manual_seed() would seed every GPU, too, and where there is none remember for that
        # the whole call stack, which takes longer than a step of a small network.
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - datasets' transforms use the global one
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """Return a torch generator (CPU) seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))
