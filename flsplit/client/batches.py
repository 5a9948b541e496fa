"""Mini-batches: inputs and labels, each any nesting of tensors with one row per example."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import TensorDataset, default_collate

from flsplit.client.loaders import LoaderOptions
from flsplit.client.samplers import OwnSampler
from flsplit.client.spec import Unpack
from flsplit.errors import DataError, located
from flsplit.nested import leaves_of
from flsplit.seeds import derive_seed

_HINT = (
    "say how to take it apart, e.g. client_app(..., unpack=lambda batch: (batch['img'], "
    "batch['label']))"
)


@dataclass(frozen=True)
class Examples:
    """A map-style data set, and how its examples become a batch of inputs and labels."""

    dataset: Any  # has a length, and an item for every index
    client: str  # whose it is; errors say so
    what: str  # ``training`` or ``test``, likewise
    collate: Callable[[list[Any]], Any] = default_collate  # makes a batch of a list of items
    # Makes inputs and labels of a batch; ``None`` for batches that say what is what
    unpack: Unpack | None = None
    sampler: OwnSampler | None = None  # says which examples are gone over, where not all are
    options: LoaderOptions = field(default_factory=LoaderOptions)  # what else the DataLoader said

    def __len__(self) -> int:
        """Return how many examples are gone over in an epoch, now."""
        counted = self.dataset if self.sampler is None else self.sampler
        try:
            return len(counted)
        except Exception as error:
            raise DataError(
                f"data returned {type(self.dataset).__name__}, expected a length: "
                f"{type(error).__name__}: {error} ({self.what} data of client {self.client!r})"
            ) from error

    def in_order(self, run: str) -> Sequence[int]:
        """Return the examples that are gone over where there are no epochs, as in a test."""
        if self.sampler is None:
            return range(len(self))
        seed = derive_seed(0, self.what, self.client)
        with located(f"client {self.client!r}"):
            indices: list[int] = self.sampler.draw(seed, 0, run).tolist()
        return indices

    def batch(self, indices: Sequence[int]) -> tuple[Any, Any]:
        """Return inputs and labels of the examples at ``indices``.

        DataError if the data set, the collate function or ``unpack`` fails; if inputs or labels are
        no nesting of tensors, or don't have one row per example in front.
        """
        read = self._read(indices)
        if self.unpack:
            inputs, labels = self._unpacked(self.unpack, read)
        elif isinstance(read, tuple | list) and len(read) == 2:
            inputs, labels = read
        else:
            inputs, labels = self._from_names(read)
        rows = len(indices)
        for name, tree in (("inputs", inputs), ("labels", labels)):
            plain = isinstance(tree, Tensor) and not tree.is_nested
            if plain and tree.ndim and tree.size(0) == rows:
                continue  # nearly always
            self._check_tensors(name, tree)
            self._check_rows(name, tree, rows)
        return inputs, labels

    def _read(self, indices: Sequence[int]) -> Any:
        if type(self.dataset) is TensorDataset and self.collate is default_collate:
            # What an item after the other and stacking them comes to, at a tenth of the time.
            try:
                rows = torch.tensor(indices, dtype=torch.int64)
                return list(map(itemgetter(rows), self.dataset.tensors))
            except Exception as error:
                raise self._failed(f"examples {_few(indices)} can't be read", error) from error
        items = self._items(indices)
        try:
            return self.collate(items)
        except Exception as error:
            kinds = ", ".join(sorted({type(item).__name__ for item in items}))
            name = getattr(self.collate, "__name__", type(self.collate).__name__)
            raise self._failed(
                f"{name} can't make a batch of examples {_few(indices)}, each a {kinds}", error
            ) from error

    def _items(self, indices: Sequence[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            try:
                return list(self.dataset.__getitems__(list(indices)))
            except Exception as error:
                raise self._failed(f"examples {_few(indices)} can't be read", error) from error
        items = []
        for index in indices:
            try:
                items.append(self.dataset[index])
            except Exception as error:
                raise self._failed(f"example {index} can't be read", error) from error
        return items

    def _unpacked(self, unpack: Unpack, batch: Any) -> tuple[Any, Any]:
        try:
            pair: Any = unpack(batch)
        except Exception as error:
            raise self._failed(
                f"unpack can't take a batch that is {_described(batch)}", error
            ) from error
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise self._wrong(f"unpack returned {_described(pair)}, expected (inputs, labels)")
        return pair[0], pair[1]

    def _from_names(self, batch: Any) -> tuple[Any, Any]:
        """Return inputs and labels of a dict with labels, as Hugging Face has them."""
        is_dict = isinstance(batch, Mapping)
        names = [name for name in ("labels", "label") if is_dict and name in batch]
        if len(names) != 1 or len(batch) == 1:
            raise self._wrong(f"a batch is {_described(batch)}, expected (inputs, labels); {_HINT}")
        return {k: v for k, v in batch.items() if k != names[0]}, batch[names[0]]

    def _check_tensors(self, name: str, tree: Any) -> None:
        leaves = list(leaves_of(tree, whole=PackedSequence))
        if not leaves:
            raise self._wrong(f"the {name} of a batch hold nothing ({tree!r}), expected tensors")
        for place, leaf in leaves:
            if not isinstance(leaf, Tensor | PackedSequence):
                raise self._wrong(
                    f"{name}{place} of a batch is {_leaf(leaf)}, expected a tensor: {_remedy(leaf)}"
                )
            if isinstance(leaf, Tensor) and leaf.is_nested:
                raise self._wrong(
                    f"{name}{place} of a batch is a nested tensor, expected a plain one: pad its "
                    "rows (torch.nested.to_padded_tensor)"
                )

    def _check_rows(self, name: str, tree: Any, rows: int) -> None:
        fronts = list(_fronts(tree))
        wrong = [(place, shape) for place, shape in fronts if shape[:1] != (rows,)]
        if not wrong or (name == "inputs" and len(wrong) < len(fronts)):
            return  # inputs may have a mask or positions beside what has the rows
        place, shape = wrong[0]
        second = shape[1:2] == (rows,)
        raise self._wrong(
            f"{name}{place}: shape is {shape}, expected {rows} rows: the first dimension must be "
            "that of the batch, with one row per example"
            + ("; here the second seems to be (batch_first=True? unpack= can swap them)" * second)
        )

    def _wrong(self, text: str) -> DataError:
        return DataError(f"{text} ({self.what} data of client {self.client!r})")

    def _failed(self, what: str, error: Exception) -> DataError:
        return self._wrong(f"{what}: {type(error).__name__}: {error}")


def refused_keywords(inputs: Mapping[str, Any], client: str, error: Exception) -> DataError:
    """Return what to say where a model can't take the keys of a batch as keyword arguments."""
    return DataError(
        f"the inputs of a batch are {_described(inputs)}, and the model of client {client!r} can't "
        f"take these as keyword arguments ({error}); {_HINT}"
    )


def _fronts(tree: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for place, leaf in leaves_of(tree, whole=PackedSequence):
        if isinstance(leaf, PackedSequence):
            yield place, (int(leaf.batch_sizes[0]),)
        else:
            yield place, tuple(leaf.size(i) for i in range(leaf.ndim))


def _few(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return f"[{shown}{', …' if len(indices) > 8 else ''}]"


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with {sorted(map(str, batch))}"
    if isinstance(batch, tuple | list):
        kinds = ", ".join(type(part).__name__ for part in batch)
        return f"a {type(batch).__name__} of {len(batch)} ({kinds})"
    return type(batch).__name__


def _leaf(leaf: Any) -> str:
    shown = repr(leaf)
    return (
        "None"
        if leaf is None
        else f"{type(leaf).__name__} {shown if len(shown) < 40 else ''}".strip()
    )


def _remedy(leaf: Any) -> str:
    if leaf is None:
        return "leave it out in unpack="
    if isinstance(leaf, str):
        return "turn text into numbers in the data set or collate_fn"
    if isinstance(leaf, int | float):
        return "a number per batch is the model's to know, one per example a tensor with rows"
    if hasattr(leaf, "__array__"):
        return "torch.as_tensor makes one, in the data set, collate_fn or unpack="
    return "make tensors of it in the data set, collate_fn or unpack="
