"""Which data sets there are, and what their images look like.

Apart from ``data.py``, because the server needs to know it without loading any data.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher

NUM_CLASSES = 10


@dataclass(frozen=True)
class ImageDataset:
    """A data set of square images in ten classes.

    Attributes
    ----------
    channels : int
        1 for grey, 3 for colour.
    size : int
        Height and width in pixels.
    torchvision : str
        Name of torchvision's class for it; empty for scikit-learn's digits.
    """

    channels: int
    size: int
    torchvision: str = ""


DATASETS = {
    "digits": ImageDataset(1, 8),
    "mnist": ImageDataset(1, 28, "MNIST"),
    "fashion-mnist": ImageDataset(1, 28, "FashionMNIST"),
    "cifar10": ImageDataset(3, 32, "CIFAR10"),
}


def find_dataset(name: str) -> ImageDataset:
    """Return the data set called `name`.

    Raises
    ------
    ValueError
        If there is none; the message lists the known ones, the most similar name first.
    """
    if name in DATASETS:
        return DATASETS[name]
    known = sorted(DATASETS, key=lambda other: -SequenceMatcher(None, name.lower(), other).ratio())
    raise ValueError(f"dataset={name!r} is unknown, expected one of {', '.join(known)}")
