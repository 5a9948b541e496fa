"""Where an experiment comes from: this folder, or somebody else's file or app.

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
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from experiment import Experiment, shown
from flwr.app import Context, RecordDict
from presets import gapsl_cifar10
from task import digits, from_torchvision, small_network

from flsplit.errors import ConfigError, did_you_mean
from flsplit.vision import load_torchvision

DATASETS: dict[str, Callable[[str], Experiment]] = {
    "digits": digits,
    "mnist": partial(from_torchvision, "MNIST", partial(small_network, 1, 2, 7), 85.0),
    "fashion-mnist": partial(
        from_torchvision, "FashionMNIST", partial(small_network, 1, 2, 7), 75.0
    ),
    "cifar10": partial(from_torchvision, "CIFAR10", partial(small_network, 3, 2, 8), 40.0),
    "gapsl-cifar10": gapsl_cifar10,
}


@lru_cache(maxsize=2)
def find_experiment(source: str, data_dir: str) -> Experiment:
    """Return what a data set's name, a Python file or an app's folder stands for.

    Raises
    ------
    ConfigError
        If it is none of these, or what it gives doesn't fit together.
    """
    path = Path(source)
    if source in DATASETS:
        found = DATASETS[source](data_dir)
    elif path.is_file():
        found = _from_file(path, data_dir)
    elif (path / "pyproject.toml").is_file():
        found = _from_app(path)
    else:
        hint = did_you_mean(source, DATASETS)
        raise ConfigError(
            f"--dataset: there is no {source!r}{hint} (there are {', '.join(DATASETS)}; or name a "
            "Python file, or a folder with a pyproject.toml)"
        )
    return found


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
    sys.path.append(str(path.parent.resolve()))  # for good: it may import its neighbours
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
        raise ConfigError(f"{where} returned {shown(given)}, expected a dict")
    known = {one.name for one in fields(Experiment)}
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
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
        share=spec.share,
        title=folder.resolve().name,
        **more,
    )
