"""Who holds which examples: partitioners of flwr-datasets by name, and the clients' parts."""

import inspect
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import torch
from experiment import Experiment, as_dataset, check, labels_of
from flwr_datasets import partitioner as partitioners
from partitions import parsed
from sources import find_experiment
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from flsplit.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Parts:
    """What each client holds, and what all are judged on.

    Attributes
    ----------
    train : list
        Training examples by client.
    validation, test : object
        Data sets that no client trains on, the same for every client's model: rates are tuned on
        the one, results are of the other.
    shares : Tensor
        Which share of a client's training examples is of each class: (clients, classes).
    """

    train: list[Any]
    validation: Any
    test: Any
    shares: Tensor


def names() -> dict[str, Any]:
    """Return the partitioners that deal examples out, by the names that the command line has."""
    found = {}
    for one in partitioners.__all__:
        cls = getattr(partitioners, one)
        if one != "Partitioner" and not one.startswith("Vertical"):
            words = "".join(f"-{c.lower()}" if c.isupper() else c for c in one)
            found[words.removesuffix("-partitioner").lstrip("-")] = cls
    return found


def make_partitioner(partition: str, clients: int, seed: int, least: int) -> Any:
    """Return a partitioner, with what all of them are told.

    Raises
    ------
    ConfigError
        If there is none of that name (the nearest is named), or it refuses its arguments.
    """
    name, arguments = parsed(partition)
    known = names()
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(
            f"--partition: there is no partitioner {name!r}{hint} (there are {', '.join(known)})"
        )
    takes = inspect.signature(known[name]).parameters
    told = {"num_partitions": clients, "partition_by": "label", "seed": seed}
    told |= {"min_partition_size": least, "self_balancing": True}
    try:
        return known[name](**{k: v for k, v in told.items() if k in takes} | arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--partition: {partition}: {error}") from error


@lru_cache(maxsize=4)
def parts_of(
    source: str, data_dir: str, clients: int, partition: str, seed: int, train_size: int,
    test_size: int, least: int,
) -> Parts:  # fmt: skip
    """Deal the data out anew for a seed.

    A tenth of the training examples is held out for validation.

    Raises
    ------
    ConfigError
        If data and model don't fit, or the partitioner can't give each client ``least`` examples.
    """
    experiment = find_experiment(source, data_dir)
    rng = np.random.default_rng(seed)
    if experiment.data is not None:
        train, validation, test = _dealt_already(experiment, clients, seed, rng)
    else:
        whole, tests = (as_dataset(n, getattr(experiment, n)) for n in ("train", "test"))
        order = rng.permutation(len(whole))[: train_size or experiment.train_size or None]
        held_out = len(order) // 10
        validation, rest = chosen(whole, order[:held_out]), order[held_out:]
        dealt = deal(experiment, whole, rest, partition, clients, seed, least)
        train = [chosen(whole, own) for own in dealt]
        test_order = rng.permutation(len(tests))[: test_size or experiment.test_size or None]
        test = chosen(tests, test_order)
    labels = [labels_of(experiment, one) for one in train]
    known = {"training": torch.cat(labels), "test": labels_of(experiment, test, "test")}
    classes = check(experiment, train[0], known)
    if (fewest := min(map(len, train))) < least:
        raise ConfigError(
            f"--partition: {partition} leaves a client with {fewest} training examples, expected "
            f"at least {least} (--batch-size)"
        )
    counts = torch.stack([torch.bincount(one, minlength=classes) for one in labels]).double()
    return Parts(train, validation, test, counts / counts.sum(1, keepdim=True))


def deal(
    experiment: Experiment, whole: Any, indices: np.ndarray, partition: str, clients: int,
    seed: int, least: int,
) -> list[np.ndarray]:  # fmt: skip
    """Return each client's indices, of those given."""
    partitioner = make_partitioner(partition, clients, seed, least)
    if isinstance(whole, datasets.Dataset):
        table = whole.with_format(None).select(indices)
        if "label" not in table.column_names:
            table = table.add_column("label", labels_of(experiment, whole)[indices].tolist())
    else:
        labels = labels_of(experiment, whole)[torch.from_numpy(indices)]
        table = datasets.Dataset.from_dict({"label": labels.tolist()})
    places = datasets.Dataset.from_dict({"place": range(len(indices))})
    drop = [one for one in table.column_names if one == "place"]
    partitioner.dataset = datasets.concatenate_datasets(
        [table.remove_columns(drop), places], axis=1
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tries again when a client got too little
            if partitioner.num_partitions != clients:
                raise ConfigError(
                    f"--partition: {partition} makes {partitioner.num_partitions} parts, expected "
                    f"{clients} (--clients)"
                )
            parts = [partitioner.load_partition(i).with_format(None) for i in range(clients)]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"--partition: {partition} can't deal {len(indices)} examples to {clients} clients, "
            f"each at least {least} (--batch-size): {error}"
        ) from error
    return [indices[np.asarray(part["place"], dtype=np.int64)] for part in parts]


def chosen(dataset: Any, indices: np.ndarray) -> Any:
    """Return some examples of a data set."""
    if isinstance(dataset, TensorDataset):
        rows = torch.from_numpy(np.asarray(indices))
        return TensorDataset(*(tensor[rows] for tensor in dataset.tensors))
    return Subset(dataset, np.asarray(indices).tolist())


def _dealt_already(
    experiment: Experiment, clients: int, seed: int, rng: np.random.Generator
) -> tuple[list[Any], Any, Any]:
    assert experiment.data is not None
    train, validation, test = [], [], []
    for client in range(clients):
        own = experiment.data(client, clients, seed)
        if not (isinstance(own, tuple) and len(own) == 2):
            raise ConfigError(
                f"data of client {client} is a {type(own).__name__}, expected (train, test): "
                "methods are judged on test examples"
            )
        whole, tests = (
            as_dataset(name, one) for name, one in zip(("train", "test"), own, strict=True)
        )
        order = rng.permutation(len(whole))
        held_out = max(len(order) // 10, 1)
        validation.append(chosen(whole, order[:held_out]))
        train.append(chosen(whole, order[held_out:]))
        test += [tests] if len(tests) else []
    return train, ConcatDataset(validation), ConcatDataset(test)
