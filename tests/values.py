"""What all methods compute, to compare two checkouts bit for bit.

Trains every method on the quickstart's model and data over LocalGrid, for a few rounds: as the
quickstart has them, and with dropout on both sides of the cut, where the order of random numbers
shows, too. Run it for either checkout, then compare:

    PYTHONPATH=/path/to/old python tests/values.py old.json
    PYTHONPATH=/path/to/new python tests/values.py new.json
    python tests/values.py --compare old.json new.json

Only names that every version of flsplit has are imported. A version from before the link
``flsplit/strategies`` is found through PYTHONPATH if one makes that link, ``ln -s ../strategies``.
"""

import argparse
import hashlib
import importlib
import json
import logging
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flwr.app
import torch
from torch import nn
from torch.optim import SGD

import flsplit

NUM_CLIENTS = 10
NUM_ROUNDS = 3
DROPOUT = 0.2

# By method: the class, and the options that let what the method adds happen within three rounds.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sequential-sl": ("SequentialSL", {}),
    "psl": ("PSL", {}),
    "splitfed-v1": ("SplitFedV1", {}),
    "splitfed-v2": ("SplitFedV2", {}),
    "sglr": ("SGLR", {"phi": 0.5, "alpha": 0.5}),
    "epsl": ("EPSL", {"phi": 0.5}),
    "gapsl": ("GAPSL", {}),
    "fsl-sage": ("FSLSAGE", {"align_every": 1, "align_epochs": 10, "upload_every": 2}),
    "cse-fsl": ("CSEFSL", {"upload_every": 2}),
    # And the readings of a method that take another way through the code.
    "sglr, sums": ("SGLR", {"averaging": "position_sum"}),
    "sglr, batches": ("SGLR", {"averaging": "batch_mean"}),
    "epsl, shared delta": ("EPSL", {"aggregation": "shared_delta"}),
    "gapsl, low memory": ("GAPSL", {"low_memory": True}),
    "fsl-sage, in the round": (
        "FSLSAGE",
        {"align_every": 2, "align_epochs": 10, "align": "in_round"},
    ),
    "cse-fsl, first stage": ("CSEFSL", {"auxiliary": "first-stage", "average_auxiliary": False}),
}


def main() -> None:
    """Train and write, or compare what was written."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON: one to write, or two to compare")
    parser.add_argument("--compare", action="store_true", help="compare two files")
    parser.add_argument("--only", nargs="*", help="of these methods alone")
    given = parser.parse_args()
    if given.compare:
        old, new = (json.loads(file.read_text()) for file in given.files)
        sys.exit(compare(old, new))
    torch.set_num_threads(1)  # more of them change the last bits
    logging.getLogger("flwr").setLevel(logging.WARNING)
    found = measure(given.only or list(METHODS))
    # A float is written so that reading it gives the same float, bit for bit.
    given.files[0].write_text(json.dumps(found, indent=1) + "\n")


# --- training --------------------------------------------------------------------------------


def measure(names: list[str]) -> dict[str, Any]:
    """Return by setting and method what a run computes and sends."""
    sys.path.append(str(quickstart_folder()))
    from quickstart.task import build_model

    print(f"flsplit of {Path(flsplit.__file__).parent}, torch {torch.__version__}")
    return {
        setting: {name: _guarded(name, build) for name in names}
        for setting, build in (("plain", build_model), ("dropout", with_dropout(build_model)))
    }


def quickstart_folder() -> Path:
    """Return the quickstart app of the flsplit that is measured, or else the one beside this."""
    checkouts = (Path(flsplit.__file__).parents[1], Path(__file__).parents[1])
    folders = [checkout / "apps" / "quickstart" for checkout in checkouts]
    return next(folder for folder in folders if folder.is_dir())


def with_dropout(build: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    """Return what builds the same network with dropout before and after the cut."""

    def build_with_dropout(context: Any) -> nn.Module:
        network = build(context)
        for name in ("conv1", "hidden"):
            stage = network.get_submodule(name)
            setattr(network, name, nn.Sequential(*stage.children(), nn.Dropout(DROPOUT)))
        return network

    return build_with_dropout


def _guarded(name: str, build: Callable[[Any], nn.Module]) -> dict[str, Any]:
    try:
        found = train(name, build)
    except Exception as error:  # the other methods are to be seen all the same
        found = {"error": f"{type(error).__name__}: {error}"}
    print(f"{name:24} {found.get('error') or found['seconds']}")
    return found


def train(name: str, build: Callable[[Any], nn.Module]) -> dict[str, Any]:
    """Return a digest of the weights, the history's numbers, bytes by category, and seconds."""
    from quickstart.data import load_partition
    from quickstart.task import CUT

    with (quickstart_folder() / "pyproject.toml").open("rb") as file:
        config = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    context = flwr.app.Context(1, 1, {}, flwr.app.RecordDict(), config)
    optimizer = partial(SGD, momentum=0.9)
    torch.manual_seed(config["seed"])
    model = build(context)
    cls, own = METHODS[name]
    options = {
        "model": model,
        "cut": CUT,
        "server_lr": config["learning-rate"],
        "server_optimizer": optimizer,
        "batch_size": config["batch-size"],
        "seed": config["seed"],
        "share_client_segments": True,
    }
    strategy = make_strategy(name.split(",")[0], cls, options | own)
    app = flsplit.client_app(model=build, cut=CUT, data=load_partition, optimizer=optimizer)
    grid = flsplit.LocalGrid(app, NUM_CLIENTS, run_config=config, progress=False)
    started = time.perf_counter()
    result = strategy.start(grid, flwr.app.ArrayRecord(model.state_dict()), num_rounds=NUM_ROUNDS)
    seconds = time.perf_counter() - started
    return {
        "weights": digest(result.arrays),
        "client-weights": {
            client: digest(arrays) for client, arrays in sorted(result.client_segments.items())
        },
        "numbers": result.history.numbers(),
        "logical-bytes": {
            category: sum(entry.traffic.logical[category] for entry in result.history)
            for category in result.history[0].traffic.logical
        },
        "seconds": round(seconds, 2),
    }


def make_strategy(name: str, cls: str, options: dict[str, Any]) -> Any:
    """Return a method by its class, or by its name where the class isn't there."""
    methods = importlib.import_module("flsplit.strategies")
    if hasattr(methods, cls):
        return getattr(methods, cls)(**options)
    for module in ("flsplit.strategies", "flsplit.run", "flsplit"):
        if hasattr(importlib.import_module(module), "make_strategy"):
            return importlib.import_module(module).make_strategy(name, **options)
    raise LookupError(f"neither {cls} nor make_strategy is where it was")


def digest(arrays: flwr.app.ArrayRecord) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, in their order."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        values = array.numpy()
        found.update(f"{name} {values.dtype} {values.shape}\n".encode())
        found.update(values.tobytes())
    return found.hexdigest()


# --- comparison ------------------------------------------------------------------------------


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print what differs; return 1 if something does."""
    differ = 0
    for setting in old | new:
        for name in old.get(setting, {}) | new.get(setting, {}):
            one, other = (found.get(setting, {}).get(name, {}) for found in (old, new))
            different = list(differences("", one, other))
            different += [found["error"] for found in (one, other) if "error" in found]
            differ += bool(different)
            took = f"{one.get('seconds')} s, {other.get('seconds')} s"
            print(f"{setting:8} {name:24} {'DIFFERS' if different else 'equal'} ({took})")
            for line in different[:8]:
                print(f"    {line}")
            if len(different) > 8:
                print(f"    and {len(different) - 8} more")
    print(f"{differ} differ" if differ else "all equal, bit for bit")
    return bool(differ)


def differences(where: str, one: Any, other: Any) -> Iterator[str]:
    """Give a line for every value that isn't the same; seconds may differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one | other:
            if where or key != "seconds":
                yield from differences(f"{where}/{key}", one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(f"{where}/{index}", left, right)
    elif repr(one) != repr(other):  # NaN equals NaN here, and 1 doesn't equal 1.0
        yield f"{where}: {one!r} became {other!r}"


if __name__ == "__main__":
    main()
