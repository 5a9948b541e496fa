"""The data sets that come with the comparison, and their models."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from experiment import Experiment
from torch import Tensor, nn

from flsplit.auxiliary import MeanOverRest
from flsplit.errors import ConfigError

CUT = "conv1"
NUM_CLASSES = 10


def digits(data_dir: str) -> Experiment:
    """Return the handwritten digits of scikit-learn, 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return Experiment(
        model=lambda: small_network(1, 1, 4),
        cut=CUT,
        train=(images[train], labels[train]),
        test=(images[test], labels[test]),
        title="handwritten digits (scikit-learn)",
    )


def from_torchvision(
    kind: str, model: Callable[[], nn.Module], target: float, data_dir: str
) -> Experiment:
    """Return images of torchvision, as it keeps them in a folder; values are -1 … 1."""
    train, test = (torchvision_arrays(kind, data_dir, train=part) for part in (True, False))
    return Experiment(
        model=model, cut=CUT, train=train, test=test, title=kind, target=target,
        train_size=20_000, test_size=2_000,
    )  # fmt: skip


def torchvision_arrays(kind: str, data_dir: str, *, train: bool) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) and labels of one of torchvision's data sets.

    Raises
    ------
    ConfigError
        If it doesn't lie there; nothing is downloaded.
    """
    if not Path(data_dir).is_dir():
        raise ConfigError(f"--data-dir={data_dir!r} is no folder; where does {kind} lie?")
    from flsplit.vision import load_torchvision

    try:
        found = getattr(load_torchvision().datasets, kind)(
            root=data_dir, train=train, download=False
        )
    except RuntimeError as error:
        raise ConfigError(f"--data-dir={data_dir!r} has no {kind}: {error}") from error
    images = torch.as_tensor(found.data).float() / 127.5 - 1
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(found.targets).long()


def small_network(channels: int, stride: int, size: int) -> nn.Module:
    """Return a small convolutional network; the clients compute up to ``conv1``."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Sequential(
                nn.Conv2d(channels, 8, 5, stride=stride, padding=2), nn.GroupNorm(4, 8), nn.ReLU()
            ),
            conv2=nn.Sequential(
                nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU()
            ),
            head=nn.Sequential(
                nn.Flatten(),
                nn.Linear(16 * size * size, 64),
                nn.ReLU(),
                nn.Linear(64, NUM_CLASSES),
            ),
        )
    )


def pooled_classifier(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a very small auxiliary model: the mean of each channel, and a linear layer."""
    return nn.Sequential(MeanOverRest(), nn.Linear(shape[0], num_classes))
