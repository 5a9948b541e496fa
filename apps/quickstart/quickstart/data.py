"""The data: which client holds what.

The training examples are dealt out label by label in shares drawn from a Dirichlet distribution,
so that clients differ in their labels and in how many examples they have. The test examples are
dealt out evenly: together the clients are tested on the whole test set. Which example lies where
depends on the seed, the number of clients and ``alpha``, and on nothing else.

Libraries of data are imported where they are used: a simulation loads the ClientApp in the server's
process, too, where they would take 200 MiB for nothing.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor
from torch.utils.data import TensorDataset

from quickstart.images import ImageDataset, find_dataset

MIN_EXAMPLES = 2  # every client trains on at least so many


@dataclass(frozen=True)
class Arrays:
    """A whole data set: images (N, channels, size, size) with values 0 to 255, labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_partition(context: Context) -> tuple[TensorDataset, TensorDataset]:
    """Load what one client holds.

    Parameters
    ----------
    context : Context
        The client's: ``partition-id`` and ``num-partitions`` of its node config, and ``dataset``,
        ``data-dir``, ``seed`` and ``alpha`` of the run config.

    Returns
    -------
    tuple of TensorDataset
        Training and test examples. The test part is empty if there are more clients than test
        examples.
    """
    partition_id, num_partitions = _partition(context)
    name, data_dir, seed = _source(context)
    alpha = float(context.run_config["alpha"])

    data = _load(name, data_dir, seed)
    train = _deal_by_label(name, data_dir, seed, num_partitions, alpha)[partition_id]
    test = _deal_evenly(len(data.test_labels), num_partitions, seed)[partition_id]
    return (
        _examples(data.train_images[train], data.train_labels[train]),
        _examples(data.test_images[test], data.test_labels[test]),
    )


def load_test_set(context: Context) -> TensorDataset:
    """Load the whole test set, for an evaluation on the server: the clients' parts together."""
    data = _load(*_source(context))
    return _examples(data.test_images, data.test_labels)


def _source(context: Context) -> tuple[str, str, int]:
    """Return the data set's name, where it lies, and the seed."""
    config = context.run_config
    return str(config["dataset"]), str(config["data-dir"]), int(config["seed"])


def _partition(context: Context) -> tuple[int, int]:
    """Return which part is this client's, and of how many."""
    for key in ("partition-id", "num-partitions"):
        if key not in context.node_config:
            raise ValueError(
                f"the node config lacks {key}; start the SuperNode with, for instance, "
                "--node-config 'partition-id=0 num-partitions=10'"
            )
    partition_id = int(context.node_config["partition-id"])
    num_partitions = int(context.node_config["num-partitions"])
    if not 0 <= partition_id < num_partitions:
        raise ValueError(
            f"partition-id={partition_id} is not among the num-partitions={num_partitions} "
            f"partitions, which count from 0"
        )
    return partition_id, num_partitions


def _examples(images: Tensor, labels: Tensor) -> TensorDataset:
    """Scale the images to -1 … 1."""
    return TensorDataset(images.float() / 127.5 - 1.0, labels)


@lru_cache(maxsize=1)
def _load(name: str, data_dir: str, seed: int) -> Arrays:
    """Load a data set; once per process, however many clients the process serves."""
    source = find_dataset(name)
    if source.torchvision:
        return _load_torchvision(name, source, data_dir)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=digits.target
    )
    return Arrays(images[train], labels[train], images[test], labels[test])


def _load_torchvision(name: str, source: ImageDataset, data_dir: str) -> Arrays:
    """Load one of torchvision's data sets from a folder where it lies already."""
    from flsplit.vision import load_torchvision  # slow, and digits needs no torchvision

    if not data_dir or not Path(data_dir).is_absolute():
        # The app runs from a copy in another folder, where a relative path leads nowhere.
        raise ValueError(
            f"data-dir={data_dir!r} must be an absolute path for dataset={name!r}: the folder "
            f"that torchvision.datasets.{source.torchvision}(root=…) has downloaded to"
        )
    torchvision = load_torchvision()
    parts: list[Any] = []
    for train in (True, False):
        try:
            loader = getattr(torchvision.datasets, source.torchvision)
            parts.append(loader(root=data_dir, train=train, download=False))
        except RuntimeError as error:
            raise ValueError(f"data-dir={data_dir!r} does not hold {name}: {error}") from error
    images = [torch.as_tensor(part.data) for part in parts]
    images = [
        # CIFAR has its channels last, the grey ones have none.
        batch.unsqueeze(1) if source.channels == 1 else batch.permute(0, 3, 1, 2).contiguous()
        for batch in images
    ]
    labels = [torch.as_tensor(part.targets).long() for part in parts]
    return Arrays(images[0], labels[0], images[1], labels[1])


@lru_cache(maxsize=4)
def _deal_by_label(
    name: str, data_dir: str, seed: int, num_partitions: int, alpha: float
) -> list[Tensor]:
    """Deal the training examples out in shares from a Dirichlet distribution; return indices."""
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    if alpha <= 0:
        raise ValueError(f"alpha={alpha:g} must be greater than 0")
    labels = _load(name, data_dir, seed).train_labels.tolist()
    if len(labels) < MIN_EXAMPLES * num_partitions:
        raise ValueError(
            f"{len(labels)} training examples are too few for {num_partitions} clients, each of "
            f"which needs {MIN_EXAMPLES}"
        )
    partitioner = DirichletPartitioner(
        num_partitions,
        partition_by="label",
        alpha=alpha,
        min_partition_size=MIN_EXAMPLES,
        self_balancing=True,
        seed=seed,
    )
    partitioner.dataset = Dataset.from_dict({"index": list(range(len(labels))), "label": labels})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tries again when a client got too little
            parts = [partitioner.load_partition(i)["index"] for i in range(num_partitions)]
    except ValueError as error:
        raise ValueError(
            f"{len(labels)} training examples could not be dealt out to {num_partitions} clients "
            f"with alpha={alpha:g} so that each has {MIN_EXAMPLES}; take fewer clients or a "
            "larger alpha"
        ) from error
    return [torch.tensor(list(part)) for part in parts]


@lru_cache(maxsize=4)
def _deal_evenly(num_examples: int, num_partitions: int, seed: int) -> list[Tensor]:
    """Shuffle the examples and deal them out in equal parts; return their indices."""
    order = np.random.default_rng(seed).permutation(num_examples)
    return [torch.from_numpy(part) for part in np.array_split(order, num_partitions)]
