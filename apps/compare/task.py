"""Data and model of the comparison: the same for every method."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flsplit.auxiliary import MeanOverRest

CUT = "conv1"
NUM_CLASSES = 10
INPUTS = {  # channels, the first layer's stride, height and width before the head
    "digits": (1, 1, 4),
    "mnist": (1, 2, 7),
    "cifar10": (3, 2, 8),
}


@dataclass(frozen=True)
class Parts:
    """What each client holds.

    Attributes
    ----------
    train : list of TensorDataset
        Training examples, dealt out with skewed labels.
    validation, test : list of TensorDataset
        Examples of all labels, dealt out evenly: what a client's model is judged on. Learning
        rates are tuned on the one, results are of the other.
    """

    train: list[TensorDataset]
    validation: list[TensorDataset]
    test: list[TensorDataset]


@lru_cache(maxsize=1)
def load(dataset: str, data_dir: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images (values -1 … 1) and labels, test images and labels."""
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, test = order[:1400], order[1400:]
        return images[train], labels[train], images[test], labels[test]
    train, test = (_from_torchvision(dataset, data_dir, train=part) for part in (True, False))
    return *train, *test


def _from_torchvision(dataset: str, data_dir: str, *, train: bool) -> tuple[Tensor, Tensor]:
    """Return images and labels of MNIST or CIFAR-10 as torchvision keeps them in a folder."""
    if not Path(data_dir).is_dir():
        raise SystemExit(f"--data-dir={data_dir!r} is no folder; where does {dataset} lie?")
    from flsplit.vision import load_torchvision

    kind = getattr(load_torchvision().datasets, dataset.upper())
    try:
        found = kind(root=data_dir, train=train, download=False)
    except RuntimeError as error:
        raise SystemExit(f"--data-dir={data_dir!r} has no {dataset}: {error}") from error
    images = torch.as_tensor(found.data).float() / 127.5 - 1
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)  # (N, C, H, W)
    return images.contiguous(), torch.as_tensor(found.targets).long()


@lru_cache(maxsize=2)
def partition(
    dataset: str, data_dir: str, clients: int, alpha: float, seed: int, train_size: int,
    test_size: int, least: int,
) -> Parts:  # fmt: skip
    """Deal the data out: labels by Dirichlet(alpha), or evenly where alpha is infinite.

    Every class is divided among the clients in shares drawn from Dirichlet(alpha), and drawn again
    until each client has ``least`` examples.
    """
    images, labels, test_images, test_labels = load(dataset, data_dir)
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(len(labels))[:train_size])
    held_out = len(order) // 10
    validation, train = order[:held_out], order[held_out:]
    test = torch.from_numpy(rng.permutation(len(test_labels))[:test_size])
    dealt = deal_by_label(labels[train].numpy(), clients, alpha, rng, least)
    return Parts(
        [TensorDataset(images[train[i]], labels[train[i]]) for i in dealt],
        [TensorDataset(images[i], labels[i]) for i in validation.chunk(clients)],
        [TensorDataset(test_images[i], test_labels[i]) for i in test.chunk(clients)],
    )


def deal_by_label(
    labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator, least: int
) -> list[Tensor]:
    """Return each client's indices."""
    if math.isinf(alpha):
        return [torch.from_numpy(part) for part in np.array_split(np.arange(len(labels)), clients)]
    for _ in range(10_000):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            shares = rng.dirichlet([alpha] * clients).cumsum()[:-1]
            for part, own in zip(
                parts, np.split(members, (shares * len(members)).astype(int)), strict=True
            ):
                part += own.tolist()
        if min(map(len, parts)) >= least:
            return [torch.tensor(part) for part in parts]
    raise SystemExit(f"can't deal {len(labels)} examples to {clients} clients, each {least}")


def build_model(dataset: str) -> nn.Module:
    """Return a small convolutional network; the clients compute up to ``conv1``."""
    channels, stride, size = INPUTS[dataset]
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
