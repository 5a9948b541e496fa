"""What is compared on: model, cut, data and metrics, of this folder or of somebody else.

A file has a function ``experiment()`` that returns a dict of :class:`Experiment`'s fields; it may
take ``data_dir``. A folder is an ordinary flsplit app, whose ``data`` function deals the data out.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import TensorDataset

from flsplit.client.batches import Examples
from flsplit.errors import ConfigError
from flsplit.nested import as_arguments
from flsplit.vision import load_torchvision

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
    optimizer, loss, unpack
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
    grid: Mapping[str, list[float]] = field(default_factory=dict)
    target: float = 85.0
    title: str = ""
    notes: str = ""
    train_size: int = 0
    test_size: int = 0

    def examples(self, dataset: Any, what: str = "training") -> Examples:
        """Return a data set whose batches are inputs and labels, as a client reads them."""
        return Examples(dataset, "of the comparison", what, unpack=self.unpack)


@lru_cache(maxsize=2)
def find_experiment(source: str, data_dir: str) -> Experiment:
    """Return what a data set's name, a Python file or an app's folder stands for.

    Raises
    ------
    ConfigError
        If it is none of these, or what it gives doesn't fit together.
    """
    from task import DATASETS  # which needs this module

    path = Path(source)
    if source in DATASETS:
        found = DATASETS[source](data_dir)
    elif path.is_file():
        found = _from_file(path, data_dir)
    elif (path / "pyproject.toml").is_file():
        found = _from_app(path)
    else:
        near = get_close_matches(source, DATASETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--dataset: there is no {source!r}{hint} (there are {', '.join(DATASETS)}; or name a "
            "Python file, or a folder with a pyproject.toml)"
        )
    return found


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
        raise ConfigError(f"the model gives {_shown(logits)}, expected logits (b, classes)")
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
            raise ConfigError(f"{what} labels are {_shown(wrong)}, expected one tensor of classes")
        labels = torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64)
    if not len(labels):
        raise ConfigError(f"there are no {what} examples")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ConfigError(
            f"{what} labels are {_shown(labels)} of {labels.dtype}, expected whole numbers (N,): "
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
            f"{name} is {_shown(given)}, expected (inputs, labels) as arrays or a data set"
        )
    return given


def digest(source: str) -> str:
    """Return what tells a file, or an app's files, from others; nothing for a data set's name."""
    path = Path(source)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = [path / "pyproject.toml", *sorted(path.rglob("*.py"))]
    return hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()[:12] if files else ""


def _from_file(path: Path, data_dir: str) -> Experiment:
    spec = importlib.util.spec_from_file_location(f"compared_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--dataset: {path} is no Python file")
    with suppress(ImportError):
        load_torchvision()  # first: torchmetrics imports it, too
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its classes can be pickled, then
    spec.loader.exec_module(module)
    make = getattr(module, "experiment", None)
    if not callable(make):
        raise ConfigError(f"--dataset: {path} has no function experiment()")
    given = make(data_dir) if inspect.signature(make).parameters else make()
    return _from_dict(path, given)


def _from_dict(path: Path, given: Any) -> Experiment:
    where = f"experiment() of {path}"
    if isinstance(given, Experiment):
        given = vars(given)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} returned {_shown(given)}, expected a dict")
    known = {one.name for one in fields(Experiment)}
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{where} has {name!r}{hint} (it may have {', '.join(sorted(known))})"
            )
    needed = ["model", "cut", *([] if "data" in given else ["train", "test"])]
    if missing := [name for name in needed if given.get(name) is None]:
        raise ConfigError(f"{where} has no {missing[0]!r}")
    return Experiment(**{"title": path.stem, **given})


def _from_app(folder: Path) -> Experiment:
    """Return what an app's ClientApp is made of; its run config is the one of pyproject.toml."""
    with (folder / "pyproject.toml").open("rb") as file:
        flower = tomllib.load(file).get("tool", {}).get("flwr", {}).get("app", {})
    place = flower.get("components", {}).get("clientapp", "")
    name, _, attribute = place.partition(":")
    if not attribute:
        raise ConfigError(f"--dataset: {folder}/pyproject.toml names no clientapp")
    config = flower.get("config", {})
    sys.path.append(str(folder.resolve()))  # for good: its functions may import more of it
    app = getattr(importlib.import_module(name), attribute)
    spec = getattr(app, "flsplit", None)
    if spec is None:
        raise ConfigError(f"--dataset: {place} of {folder} was not made by flsplit.client_app")

    def context(client: int = 0, clients: int = 1, seed: int = 0) -> Context:
        node = {"partition-id": client, "num-partitions": clients}
        own = {"seed": seed} if "seed" in config else {}
        return Context(1, client + 1, node, RecordDict(), config | own)

    by_name = callable(spec.cut) and "context" not in inspect.signature(spec.cut).parameters
    if by_name or isinstance(spec.cut, Mapping):
        raise ConfigError(f"--dataset: {place} of {folder} has several cuts, expected one")
    more = {"loss": spec.loss} if spec.loss else {}
    return Experiment(
        model=lambda: spec.build_model(context()),
        cut=spec.cut_for(context()),
        data=lambda *which: spec.data(context(*which)),
        optimizer=spec.optimizer,
        unpack=spec.unpack,
        title=folder.resolve().name,
        **more,
    )


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
