"""What a DataLoader says: what is used, what is refused, and what holds instead of the rest."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from flsplit.client.samplers import OwnSampler
from flsplit.errors import DataError
from flsplit.message.round_plan import RoundPlan

_UNUSED = {
    "num_workers": 0,
    "prefetch_factor": 2,
    "persistent_workers": False,
    "worker_init_fn": None,
    "multiprocessing_context": None,
    "timeout": 0,
    "in_order": True,
    "pin_memory": False,
    "pin_memory_device": "",
}
"""What only matters to processes that load ahead, with torch's values where there are some."""


@dataclass(frozen=True)
class LoaderOptions:
    """What a DataLoader says about batches beside its data set, collate function and sampler."""

    notices: tuple[str, ...] = ()  # options that aren't used, each with what holds instead
    batch_size: int = 1  # compared with the server's
    drop_last: bool = False

    def unused(self, plan: RoundPlan) -> list[str]:
        """Return what isn't used in a round, each in a sentence."""
        said = list(self.notices)
        if self.batch_size not in (1, plan.batch_size):  # 1 is torch's default
            said.append(
                f"batch_size={self.batch_size} of the DataLoader is not used: batches are as large "
                f"as the server says, {plan.batch_size}"
            )
        if self.drop_last and not plan.drop_last:
            said.append(
                "drop_last=True of the DataLoader is not used: the server's drop_last is False"
            )
        return said

    def unused_in_tests(self) -> list[str]:
        """Return what isn't used of a loader of test data, whose batches are of no account."""
        if not self.drop_last:
            return list(self.notices)
        return [
            *self.notices,
            "drop_last=True of the test DataLoader is not used: all test examples are gone over",
        ]


def read_loader(loader: DataLoader[Any]) -> tuple[OwnSampler | None, LoaderOptions]:
    """Return a loader's sampler, if it is one of the user's own, and its other options.

    DataError if batches are made otherwise than from so many indices of a sampler.
    """
    inner = loader.batch_sampler
    if inner is None:
        raise _refused(
            "batch_size=None: its data set makes batches itself, expected single examples"
        )
    if type(inner) is not BatchSampler:
        raise _refused(
            f"batch_sampler={type(inner).__name__}: how large a batch is is the server's to say, "
            "expected a sampler of single examples (sampler=)"
        )
    options = LoaderOptions(_notices(loader), inner.batch_size, inner.drop_last)
    sampler = inner.sampler  # also that of a BatchSampler that was given
    if _is_torchs(sampler, loader.dataset):
        if loader.generator is not None or getattr(sampler, "generator", None) is not None:
            said = "generator= of the DataLoader is not used: the order follows from the run's seed"
            options = replace(options, notices=(*options.notices, said))
        return None, options
    if not hasattr(type(sampler), "__len__"):
        raise _refused(
            f"sampler={type(sampler).__name__}, which has no length, expected one whose len() is "
            "the number of examples of an epoch"
        )
    return OwnSampler(sampler, loader.dataset), options


def _refused(what: str) -> DataError:
    return DataError(f"data returned a DataLoader with {what}")


def _is_torchs(sampler: Any, dataset: Any) -> bool:
    if getattr(sampler, "data_source", None) is not dataset:
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler._num_samples is None
    return type(sampler) is SequentialSampler


def _notices(loader: DataLoader[Any]) -> tuple[str, ...]:
    given = {name: getattr(loader, name, default) for name, default in _UNUSED.items()}
    changed = [
        f"{name}={value if isinstance(value, int | float | str) else _name(value)}"
        for name, value in given.items()
        if value not in (None, _UNUSED[name])
    ]
    said = []
    if changed:
        said.append(
            f"{', '.join(changed)} of the DataLoader {'is' if len(changed) == 1 else 'are'} not "
            "used: examples are read in the client's own process, when a step needs them"
        )
    method: Callable[..., Any] = type(loader).__iter__
    if method is not DataLoader.__iter__:
        said.append(
            f"the __iter__ of {type(loader).__name__} is not used: of a DataLoader the data set, "
            "the sampler and collate_fn are"
        )
    return tuple(said)


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
