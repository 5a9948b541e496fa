"""What is compared on: model, cut, data and metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import TensorDataset

from flsplit.client.batches import Examples
from flsplit.errors import ConfigError
from flsplit.nested import as_arguments

MOMENTUM = partial(SGD, momentum=0.9)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Model, cut, data and metrics.

    Attributes
    ----------
    model : callable
        Returns a new unsplit classifier, which gives logits (b, classes).
    cut : str
        The last submodule that clients compute.
    train, test : pair of arrays, or map-style data set
        Inputs and classes (N,), as arrays or tensors; or a data set as `client_app` takes it, of
        torchvision or Hugging Face for instance.
    data : callable, optional
        In place of both, data that are dealt out already: takes (client, clients, seed), returns a
        client's (train, test).
    metrics : mapping of str to torchmetrics.Metric
        Further metrics, over the test set.
    optimizer, loss, unpack, share
        As in `client_app`, for both segments.
    grid : mapping of str to list of float
        Learning rates that tuning begins with, in the place of a method's own.
    target : float
        Accuracy in percent whose costs are told.
    title, notes : str
        How pages call the data, and what only their page says.
    train_size, test_size : int
        So many examples where nothing else is said; 0 for all.
    """

    model: Callable[[], nn.Module]
    cut: str
    train: Any = None
    test: Any = None
    data: Callable[[int, int, int], Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., Any] = MOMENTUM
    loss: Callable[..., Any] = functional.cross_entropy
    unpack: Callable[[Any], Any] | None = None
    share: Sequence[str] = ()
    grid: Mapping[str, list[float]] = field(default_factory=dict)
    target: float = 85.0
    title: str = ""
    notes: str = ""
    train_size: int = 0
    test_size: int = 0

    def examples(self, dataset: Any, what: str = "training") -> Examples:
        """Return a data set whose batches are inputs and labels, as a client reads them."""
        return Examples(dataset, "of the comparison", what, unpack=self.unpack)


def check(experiment: Experiment, train: Any, labels: Mapping[str, Tensor]) -> int:
    """Return the number of classes; refuse what doesn't fit the model.

    Raises
    ------
    ConfigError
        If the model can't take the inputs or gives no logits, or labels are no classes of it.
    """
    model = experiment.model()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model returned a {type(model).__name__}, expected an nn.Module")
    inputs, _ = experiment.examples(train).batch(range(min(2, len(train))))
    try:
        with torch.no_grad():
            logits = call(model.eval(), inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the model can't take the data: {why}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ConfigError(f"the model gives {shown(logits)}, expected logits (b, classes)")
    classes = int(logits.shape[1])
    for what, one in labels.items():
        low, high = int(one.min()), int(one.max())
        if low < 0 or high >= classes:
            raise ConfigError(
                f"{what} labels are {low} to {high}, but the model has {classes} classes "
                f"(0 to {classes - 1})"
            )
    return classes


def call(model: nn.Module, inputs: Any) -> Any:
    """Return what a model makes of a batch's inputs, of whatever nesting."""
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


def labels_of(experiment: Experiment, dataset: Any, what: str = "training") -> Tensor:
    """Return the labels (N,) of a data set."""
    plain = not (experiment.unpack or getattr(dataset, "target_transform", None))
    targets = getattr(dataset, "targets", None)
    if isinstance(dataset, TensorDataset) and plain:
        labels = dataset.tensors[1]
    elif isinstance(targets, list | Tensor) and plain:
        labels = torch.as_tensor(targets)  # torchvision's, without reading every image
    else:
        examples, size = experiment.examples(dataset, what), len(dataset)
        starts = range(0, size, 512)
        batches = [examples.batch(range(at, min(at + 512, size)))[1] for at in starts]
        wrong = next((one for one in batches if not isinstance(one, Tensor)), None)
        if wrong is not None:
            raise ConfigError(f"{what} labels are {shown(wrong)}, expected one tensor of classes")
        labels = torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64)
    if not len(labels):
        raise ConfigError(f"there are no {what} examples")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ConfigError(
            f"{what} labels are {shown(labels)} of {labels.dtype}, expected whole numbers (N,): "
            "the comparison is of classifiers"
        )
    return labels.long()


def as_dataset(name: str, given: Any) -> Any:
    """Return a map-style data set; a pair of arrays becomes one."""
    if isinstance(given, tuple | list) and len(given) == 2 and all(map(_is_array, given)):
        inputs, labels = map(torch.as_tensor, given)
        if len(inputs) != len(labels):
            raise ConfigError(f"{name} has {len(inputs)} inputs and {len(labels)} labels")
        return TensorDataset(inputs, labels if labels.is_floating_point() else labels.long())
    map_style = hasattr(given, "__len__") and hasattr(given, "__getitem__")
    if not map_style or _is_array(given) or isinstance(given, dict | tuple):
        raise ConfigError(
            f"{name} is {shown(given)}, expected (inputs, labels) as arrays or a data set"
        )
    return given


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
