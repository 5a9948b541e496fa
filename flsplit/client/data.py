"""A client's data: what ``data()`` may return, and what is said about the rest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from flsplit.client.batches import Examples
from flsplit.client.loaders import read_loader
from flsplit.client.spec import ClientSpec, Unpack, client_name
from flsplit.errors import DataError, FlsplitError
from flsplit.log import warn_once
from flsplit.message.raised import reason_of
from flsplit.message.round_plan import RoundPlan

_EXPECTED = (
    "expected a map-style torch Dataset, a DataLoader over one, or a pair (train, test) of them"
)
_TENSORS = "TensorDataset(inputs, labels) makes a data set of tensors"


@dataclass(frozen=True)
class ClientData:
    """A client's training and test examples; ``test`` may be empty."""

    train: Examples
    test: Examples | None

    @classmethod
    def load(cls, spec: ClientSpec, context: Context) -> "ClientData":
        """Call the user's ``data`` function and take what it returns.

        DataError if it raises, or returns neither a data set (or DataLoader) nor a pair of them.
        """
        client = client_name(context)
        try:
            loaded = spec.data(context)
        except FlsplitError:
            raise
        except Exception as error:
            raise DataError(f"data raised {reason_of(error)}") from error
        train, test = loaded if isinstance(loaded, tuple) and len(loaded) == 2 else (loaded, None)
        why = _why_not(train, spec.unpack)
        nothing = test is None or (isinstance(test, list) and not test)
        if why is None and not nothing:
            why = _why_not(test, spec.unpack)
        if why is not None:
            hint = f": {why}" if why else ""
            raise DataError(f"data returned {_described(loaded)}, {_EXPECTED}{hint}")
        return cls(
            _examples(train, client, "training", spec.unpack),
            None if test is None else _examples(test, client, "test", spec.unpack),
        )

    def warn(self, plan: RoundPlan) -> None:
        """Say once in a run which options of the DataLoaders aren't used."""
        for text in self.train.options.unused(plan):
            warn_once(plan.experiment, text)
        for text in self.test.options.unused_in_tests() if self.test is not None else ():
            warn_once(plan.experiment, text)


def _examples(source: Any, client: str, what: str, unpack: Unpack | None) -> Examples:
    if not isinstance(source, DataLoader):
        return Examples(source, client, what, unpack=unpack)
    sampler, options = read_loader(source)
    return Examples(source.dataset, client, what, source.collate_fn, unpack, sampler, options)


def _why_not(source: Any, unpack: Unpack | None) -> str | None:
    """Return why something is no data set, empty if its kind says it all; None if it is one."""
    dataset = source.dataset if isinstance(source, DataLoader) else source
    if isinstance(dataset, IterableDataset):
        return (
            f"{type(dataset).__name__} is an IterableDataset, whose examples can't be asked for by "
            "index, so neither in an order that follows from the seed nor a second time"
        )
    if not isinstance(source, DataLoader):  # which may collate what it likes
        if isinstance(source, type):
            return f"{source.__name__} is a class, not an object of it"
        if isinstance(source, Iterator):
            return "an iterator can be gone over once only; return what it was made of"
        if isinstance(source, list):
            return _why_no_examples(source, unpack)
        if _is_array(source) or (isinstance(source, tuple) and any(map(_is_array, source))):
            return _TENSORS
        if isinstance(source, Mapping):
            return "take them out of it: return (sets['train'], sets['test'])"
        if isinstance(source, tuple | str | bytes | range | nn.Module):
            return ""
    if not hasattr(dataset, "__getitem__"):
        return ""
    if not hasattr(dataset, "__len__"):
        return f"{type(dataset).__name__} has no __len__, so nobody knows how many examples it has"
    return None


def _why_no_examples(source: list[Any], unpack: Unpack | None) -> str | None:
    if not source:
        return "it is empty; a client whose data set has the length 0 is left out"
    if any(isinstance(o, Dataset | DataLoader) or hasattr(o, "__getitems__") for o in source):
        return "a pair is a tuple, (train, test)"
    if unpack is None and _is_array(source[0]):
        return _TENSORS
    if unpack is None and (source[0] is None or isinstance(source[0], str | bytes | int | float)):
        return "an example is a pair (inputs, label), or a dict with a label"
    return None


def _is_array(source: Any) -> bool:
    return hasattr(type(source), "__array__") and not isinstance(source, Dataset)


def _described(loaded: Any) -> str:
    """Return what came, in words: its type, and for a container those of what it holds."""
    kind = type(loaded).__name__
    if isinstance(loaded, type):
        return f"the class {loaded.__name__}"
    if isinstance(loaded, DataLoader):
        return f"a {kind} over {type(loaded.dataset).__name__}"
    if not isinstance(loaded, Mapping | tuple | list):
        return kind
    if not loaded:
        return f"an empty {kind}"
    if isinstance(loaded, Mapping):
        return f"a {kind} ({_few([f'{key!r}: {type(v).__name__}' for key, v in loaded.items()])})"
    return f"a {kind} of {len(loaded)} ({_few([type(one).__name__ for one in loaded])})"


def _few(parts: list[str]) -> str:
    return ", ".join(parts[:4]) + (", …" if len(parts) > 4 else "")
