"""A client's data: mini-batches that depend on the seed and the client's name alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

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
        if type(self.dataset) is TensorDataset and self.collate is default_collate:
            # What an item after the other and stacking them comes to, at a tenth of the time.
            rows = torch.tensor(indices, dtype=torch.int64)
            batch: Any = [tensor[rows] for tensor in self.dataset.tensors]
        elif hasattr(self.dataset, "__getitems__"):
            batch = self.collate(self.dataset.__getitems__(list(indices)))
        else:
            batch = self.collate([self.dataset[index] for index in indices])
        inputs, labels = self.unpack(batch)
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


def steps_per_round(num_examples: int, plan: RoundPlan, client: str) -> int:
    """Return how many mini-batches a client has this round, those it sits out included.

    Raises
    ------
    DataError
        If there are none.
    """
    if num_examples == 0:
        raise DataError(f"client {client!r} has no training examples: its partition is empty")
    if plan.batch_sizes:
        return len(plan.batch_sizes)
    full, rest = divmod(num_examples, plan.batch_size)
    per_epoch = full + (1 if rest and not plan.drop_last else 0)  # the ragged last one, if kept
    if per_epoch == 0:
        raise DataError(
            f"client {client!r} has {num_examples} examples, fewer than batch-size = "
            f"{plan.batch_size}, and drop-last leaves none"
        )
    return plan.local_steps or plan.local_epochs * per_epoch


class Order:
    """In which order a client goes over its examples: a new permutation every epoch.

    It is drawn from the run's seed, the client's name and the epoch's number, and depends on
    nothing else; so does the batch after so many examples ``drawn`` since the run began.
    """

    def __init__(self, num_examples: int, seed: int, client: str) -> None:
        self.num_examples, self.seed, self.client = num_examples, seed, client
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, plan: RoundPlan, step: int, drawn: int) -> tuple[list[int], int]:
        """Return the examples of a step, and how many were drawn after it."""
        epoch, offset = divmod(drawn, self.num_examples)
        if plan.batch_sizes:
            return self._exactly(plan.rows_at(step), epoch, offset), drawn + plan.rows_at(step)
        if plan.drop_last and self.num_examples - offset < plan.batch_size:
            epoch, offset = epoch + 1, 0
        order = self._order if epoch == self._epoch else self._of(epoch)
        chosen: list[int] = order[offset : offset + plan.batch_size].tolist()
        return chosen, epoch * self.num_examples + offset + len(chosen)

    def _exactly(self, rows: int, epoch: int, offset: int) -> list[int]:
        """Return as many examples as planned; what an epoch lacks comes from the next."""
        chosen: list[int] = []
        while len(chosen) < rows:
            chosen += self._of(epoch)[offset : offset + rows - len(chosen)].tolist()
            epoch, offset = epoch + 1, 0
        return chosen

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            rng = generator(self.seed, "data", self.client, epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_examples, generator=rng)
        return self._order
