"""A client's data: mini-batches that depend on the seed and the client's name alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from flsplit.client.spec import ClientSpec, Unpack
from flsplit.errors import DataError
from flsplit.message.round_plan import RoundPlan
from flsplit.seeds import generator


@dataclass(frozen=True)
class Examples:
    """A map-style data set, how its examples become a batch, and a batch inputs and labels."""

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any]
    unpack: Unpack

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs ``(b, ...)`` and labels ``(b, ...)`` of the examples at ``indices``."""
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(list(indices))
        else:
            items = [self.dataset[index] for index in indices]
        inputs, labels = self.unpack(self.collate(items))
        if not (isinstance(inputs, Tensor) and isinstance(labels, Tensor)):
            raise DataError(
                f"a batch is ({type(inputs).__name__}, {type(labels).__name__}), expected two "
                "tensors (inputs, labels); client_app's unpack= can make them"
            )
        return inputs, labels


@dataclass(frozen=True)
class ClientData:
    """A client's training and test examples; ``test`` may be empty."""

    train: Examples
    test: Examples | None

    @classmethod
    def load(cls, spec: ClientSpec, context: Context) -> "ClientData":
        """Call the user's ``data`` function and take what it returns.

        Raises
        ------
        DataError
            If it returns neither a data set (or DataLoader) nor a pair of them.
        """
        loaded = spec.data(context)
        train, test = loaded if isinstance(loaded, tuple) and len(loaded) == 2 else (loaded, None)
        return cls(
            _examples(train, spec.unpack), None if test is None else _examples(test, spec.unpack)
        )


def _examples(source: Any, unpack: Unpack | None) -> Examples:
    if isinstance(source, DataLoader):
        dataset, collate = source.dataset, source.collate_fn
    else:
        dataset, collate = source, default_collate
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(
            f"data returned {type(dataset).__name__}, expected a map-style torch Dataset, a "
            "DataLoader over one, or a pair (train, test) of them"
        )
    return Examples(dataset, collate, unpack or _unpack_pair)


def _unpack_pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    what = f"a dict with {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
    raise DataError(
        f"a batch is {what}, expected (inputs, labels); say how to take it apart, e.g. "
        "client_app(..., unpack=lambda batch: (batch['img'], batch['label']))"
    )


def steps_per_epoch(num_examples: int, plan: RoundPlan) -> int:
    """Return how many mini-batches an epoch has, the ragged last one included if it is kept."""
    full, rest = divmod(num_examples, plan.batch_size)
    return full + (1 if rest and not plan.drop_last else 0)


def steps_per_round(num_examples: int, plan: RoundPlan, client: str) -> int:
    """Return how many mini-batches a client has this round.

    Raises
    ------
    DataError
        If there are none.
    """
    if num_examples == 0:
        raise DataError(f"client {client!r} has no training examples: its partition is empty")
    per_epoch = steps_per_epoch(num_examples, plan)
    if per_epoch == 0:
        raise DataError(
            f"client {client!r} has {num_examples} examples, fewer than batch-size = "
            f"{plan.batch_size}, and drop-last leaves none"
        )
    return plan.local_steps or plan.local_epochs * per_epoch


def batch_indices(num_examples: int, plan: RoundPlan, client: str, position: int) -> list[int]:
    """Return the examples of the mini-batch at ``position``, counted since the run began.

    Every epoch is a new permutation, drawn from the run's seed, the client's name and the
    epoch's number.
    """
    epoch, index = divmod(position, steps_per_epoch(num_examples, plan))
    order = torch.randperm(num_examples, generator=generator(plan.seed, "data", client, epoch))
    chosen: list[int] = order[index * plan.batch_size : (index + 1) * plan.batch_size].tolist()
    return chosen
