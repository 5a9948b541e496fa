"""The networks and data that training is measured with: handwritten digits, which need no download.

``images`` is heavy enough that computing dominates: digits enlarged to 3x32x32, smashed data of
4 MiB per batch. ``quickstart`` is the small network of the quickstart app on digits as they are.
"""

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
    client, server = _images() if workload == IMAGES else _quickstart()
    return nn.Sequential(OrderedDict(client=client, server=server))


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
    client = nn.Sequential(
        *_convolution(3, 32, stride=1),
        *_convolution(32, 64, stride=2),
        *_convolution(64, 128, stride=1),
    )
    server = nn.Sequential(
        *_convolution(128, 256, stride=2),
        *_convolution(256, 256, stride=2),
        *_convolution(256, 512, stride=2),
        nn.Flatten(),
        nn.Linear(512 * 2 * 2, 10),
    )
    return client, server


def _convolution(in_channels: int, out_channels: int, *, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
    return [conv, nn.ReLU()]


def _quickstart() -> tuple[nn.Module, nn.Module]:
    client = _stage(1, 16, halve=False)
    server = nn.Sequential(
        _stage(16, 32, halve=True),
        _stage(32, 64, halve=False),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    return client, server


def _stage(in_channels: int, out_channels: int, *, halve: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(num_groups=8, num_channels=out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2) if halve else nn.Identity(),
    )
