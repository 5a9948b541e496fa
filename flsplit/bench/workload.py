"""The networks and data that training is measured with: handwritten digits, which need no download.

``images`` is heavy enough that computing dominates: digits enlarged to 3x32x32, smashed data of
4 MiB per batch. ``quickstart`` is the small network of the quickstart app on digits as they are.
"""

import itertools
from collections import OrderedDict
from functools import cache

import torch
from flwr.app import Context
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from flsplit.bench.figures import BenchError
from flsplit.seeds import generator

CUT = "client"
BATCH_SIZE = 32
LR = 1e-3

IMAGES, QUICKSTART = "images", "quickstart"

_QUICKSTART_EXAMPLES = 64  # per client, however many there are


def build_model(context: Context) -> nn.Module:
    """Return the network of the workload that the run config names."""
    return network(str(context.run_config["workload"]))


def network(workload: str) -> nn.Module:
    """Return a workload's network, whole."""
    halves = _images() if workload == IMAGES else _quickstart()
    return nn.Sequential(OrderedDict(zip((CUT, "server"), halves, strict=True)))


def load_partition(context: Context) -> TensorDataset:
    """Return a client's training data."""
    first, count = context.node_config["partition-id"], context.node_config["num-partitions"]
    return partition(str(context.run_config["workload"]), int(first), int(count))


def partition(workload: str, first: int, count: int) -> TensorDataset:
    """Return the data of client ``first`` of ``count``."""
    images, labels = _digits()
    if workload == IMAGES:
        enlarged = functional.interpolate(images[first::count], size=32, mode="bilinear")
        return TensorDataset(enlarged.repeat(1, 3, 1, 1), labels[first::count])
    order = torch.randperm(len(labels), generator=generator(0, "bench", first))
    chosen = order[:_QUICKSTART_EXAMPLES]
    return TensorDataset(images[chosen], labels[chosen])


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Return images ``(1797, 1, 8, 8)`` and labels ``(1797,)``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BenchError(
            "the digits come with scikit-learn, which is not installed: pip install 'flsplit[apps]'"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(digits.target)


def _images() -> tuple[nn.Module, nn.Module]:
    def convolutions(*channels: int, strides: tuple[int, ...]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for (before, after), stride in zip(itertools.pairwise(channels), strides, strict=True):
            conv = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1)
            layers += [conv, nn.ReLU()]
        return layers

    client = nn.Sequential(*convolutions(3, 32, 64, 128, strides=(1, 2, 1)))
    server = nn.Sequential(
        *convolutions(128, 256, 256, 512, strides=(2, 2, 2)),
        *(nn.Flatten(), nn.Linear(512 * 2 * 2, 10)),
    )
    return client, server


def _quickstart() -> tuple[nn.Module, nn.Module]:
    def stage(in_channels: int, out_channels: int, halved: bool) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.GroupNorm(num_groups=8, num_channels=out_channels),
            nn.ReLU(),
            nn.MaxPool2d(2) if halved else nn.Identity(),
        )

    client = stage(1, 16, halved=False)
    server = nn.Sequential(
        *(stage(16, 32, halved=True), stage(32, 64, halved=False)),
        *(nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    return client, server
