"""Compares FSL-SAGE and CSE-FSL with SplitFed V1, V2 and FedAvg: accuracy against bytes.

    python apps/compare/decoupled.py --dataset digits
    python apps/compare/decoupled.py --dataset mnist --data-dir /path/to/data

All use Adam on both sides. Each method's learning rate is tuned first, over the same values (one
seed, validation data); then it runs with every seed. FedAvg's accuracies are those of
SplitFed V1, which computes the same; its bytes are two whole models per client and round.
``decoupled_ablation.py`` varies FSL-SAGE's settings.
"""

import argparse
import json
import logging
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from matplotlib.figure import Figure
from task import CUT, build_model, partition
from torch import nn
from torch.optim import Adam
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.auxiliary import BuildAuxiliary, MeanOverRest
from flsplit.cut import split
from flsplit.seeds import seeded
from flsplit.strategies import CSEFSL, FSLSAGE, SplitFedV1, SplitFedV2

PRESETS = {"digits": (1400, 397), "mnist": (10_000, 2_000)}  # training and test examples
NAMES = {
    "fsl-sage": "FSL-SAGE",
    "cse-fsl": "CSE-FSL",
    "splitfed-v1": "SplitFed V1",
    "splitfed-v2": "SplitFed V2",
    "fedavg": "FedAvg",
}
RATES = (0.001, 0.003, 0.01, 0.03)

Run = dict[str, Any]


def main() -> None:
    options = parse(__doc__.splitlines()[0])
    book = Book(options)
    runs = {}
    for method in NAMES:
        if method in options.methods:
            rate = book.tuned(method, {})
            runs[method] = [book.run(method, rate, seed) for seed in options.seeds]
    if set(runs) != set(NAMES) - {"fedavg"}:
        return  # the others are run elsewhere, or later
    runs["fedavg"] = [as_fedavg(run, options) for run in runs["splitfed-v1"]]
    draw_accuracy(runs, options.out / f"{options.dataset}-decoupled.png", options)
    draw_cosines(runs, options.out / f"{options.dataset}-cosines.png")
    text = table("method", {NAMES[method]: found for method, found in runs.items()}, options)
    (options.out / f"{options.dataset}-decoupled.md").write_text(text + "\n")
    print(text)


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dataset", choices=sorted(PRESETS), default="digits")
    parser.add_argument("--data-dir", default="", help="where torchvision's MNIST lies")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=1.0, help="Dirichlet; inf is IID")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own = [method for method in NAMES if method != "fedavg"]
    parser.add_argument("--methods", nargs="+", choices=own, default=own)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--upload-every", type=int, default=5)
    parser.add_argument("--align-every", type=int, default=5)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--out", type=Path, default=Path("compare-results"))
    return parser.parse_args()


# --- running ---------------------------------------------------------------------------------


class Book:
    """The finished runs, in a file; one that is there is not run again."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        logging.getLogger("flwr").setLevel(logging.ERROR)
        options.out.mkdir(parents=True, exist_ok=True)
        self.options, self.path = options, options.out / "decoupled.jsonl"
        self.runs: list[Run] = []
        if self.path.exists():
            self.runs = [json.loads(line) for line in self.path.read_text().splitlines()]

    def run(
        self, method: str, rate: float, seed: int, *, tuning: bool = False, **changed: Any
    ) -> Run:
        """Return a run, from the file if it is there."""
        o = self.options
        key = {
            "method": method, "rate": rate, "seed": seed, "tuning": tuning, "dataset": o.dataset,
            "clients": o.clients, "rounds": o.rounds,
            "batch_size": o.batch_size, "local_steps": o.local_steps, "alpha": str(o.alpha),
            "q": o.upload_every, "l": o.align_every, "auxiliary": "linear",
        }  # fmt: skip
        key |= changed
        for one in self.runs:
            if all(one.get(name) == value for name, value in key.items()):
                return one
        started = time.perf_counter()
        done = key | train(key, o.data_dir)
        self.runs.append(done)
        with self.path.open("a") as file:
            file.write(json.dumps(done) + "\n")
        spent = time.perf_counter() - started
        what = {k: v for k, v in key.items() if k in changed or k in ("rate", "seed")}
        print(f"{method} {what}: {100 * done['accuracy'][-1]:.1f} % ({spent:.0f} s)", flush=True)
        return done

    def tuned(self, method: str, changed: dict[str, Any]) -> float:
        """Return the rate that is best on validation data."""
        seed = self.options.seeds[0]
        runs = [self.run(method, rate, seed, tuning=True, **changed) for rate in RATES]
        best = max(runs, key=lambda run: statistics.mean(run["accuracy"][-3:]))
        return float(best["rate"])


def train(key: Run, data_dir: str) -> Run:
    """Train with one method and return what came of it, round by round."""
    sizes = PRESETS[key["dataset"]]
    parts = partition(
        key["dataset"], data_dir, key["clients"], float(key["alpha"]), key["seed"], *sizes,
        key["batch_size"],
    )  # fmt: skip
    judged = parts.validation if key["tuning"] else parts.test
    with seeded(key["seed"]):
        model = build_model(key["dataset"])

    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        index = int(context.node_config["partition-id"])
        return parts.train[index], judged[index]

    auxiliary = auxiliary_of(key)
    app = client_app(
        model=lambda: build_model(key["dataset"]), cut=CUT, data=data, optimizer=Adam, device="cpu",
        auxiliary=auxiliary if callable(auxiliary) else None,
    )  # fmt: skip
    strategy = make(key, auxiliary)(
        model=model, cut=CUT, server_optimizer=Adam, server_lr=key["rate"],
        batch_size=key["batch_size"], local_steps=key["local_steps"], drop_last=True,
        seed=key["seed"], device="cpu",
    )  # fmt: skip
    result = strategy.start(
        LocalGrid(app, key["clients"], progress=False), ArrayRecord(model.state_dict()),
        num_rounds=key["rounds"],
    )  # fmt: skip
    history = result.history
    return {
        "accuracy": history.series("accuracy")[1],
        "bytes": history.bytes_so_far(),
        "metrics": [entry.metrics for entry in history],
        "whole-bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "auxiliary-bytes": history[0].traffic.logical["auxiliary-down"] // key["clients"],
    }


def auxiliary_of(key: Run) -> str | BuildAuxiliary:
    """Return flsplit's name of the auxiliary model, or a function that builds it."""

    def pooled(shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Sequential(MeanOverRest(), nn.Linear(shape[0], num_classes))

    def whole(shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build what the server has, with weights of its own."""
        return split(build_model(key["dataset"]), CUT).server

    return {"pooled": pooled, "whole": whole}.get(key["auxiliary"], key["auxiliary"])


def make(key: Run, auxiliary: str | BuildAuxiliary) -> Any:
    """Return what makes the strategy from the common options."""
    own = {"upload_every": key["q"], "auxiliary": auxiliary}
    if key["method"] == "fsl-sage":
        return partial(FSLSAGE, align_every=key["l"], **own)
    if key["method"] == "cse-fsl":
        return partial(CSEFSL, **own)
    return {"splitfed-v1": SplitFedV1, "splitfed-v2": SplitFedV2}[key["method"]]


def as_fedavg(run: Run, options: argparse.Namespace) -> Run:
    """Return FedAvg's run: the accuracies of SplitFed V1, with whole models up and down."""
    each = 2 * options.clients * run["whole-bytes"]
    return run | {"bytes": [each * (r + 1) for r in range(len(run["accuracy"]))]}


# --- results ---------------------------------------------------------------------------------


def bytes_to(run: Run, target: float) -> int | None:
    """Return the bytes at which the mean of three rounds first reaches the target."""
    accuracy = run["accuracy"]
    for index in range(len(accuracy)):
        if statistics.mean(accuracy[max(index - 2, 0) : index + 1]) >= target:
            return int(run["bytes"][index])
    return None


def spread(values: list[float], digits: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def cells(runs: list[Run], targets: list[float]) -> str:
    """Return rate, last accuracy, bytes per round and bytes to the targets, as table cells."""
    last = spread([100 * statistics.mean(run["accuracy"][-3:]) for run in runs])
    each = runs[0]["bytes"][-1] / len(runs[0]["bytes"]) / 1e6
    reached = " | ".join(megabytes_to(runs, target) for target in targets)
    return f"{runs[0]['rate']:g} | {last} | {each:.3f} | {reached}"


def megabytes_to(runs: list[Run], target: float) -> str:
    reached = [found / 1e6 for run in runs if (found := bytes_to(run, target)) is not None]
    missing = "" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)} seeds)"
    return spread(reached, 2) + missing if reached else "not reached"


def table(what: str, rows: dict[str, list[Run]], options: argparse.Namespace) -> str:
    """Return a table with a row for each of some runs."""
    targets = "".join(f" MB to {100 * target:g} % |" for target in options.targets)
    lines = [f"| {what} | learning rate | accuracy, % | MB a round |{targets}"]
    lines.append("|---" * (4 + len(options.targets)) + "|")
    lines += [f"| {name} | {cells(runs, options.targets)} |" for name, runs in rows.items()]
    return "\n".join(lines)


def mean_of(runs: list[Run], metric: str) -> tuple[list[int], list[float]]:
    """Return the rounds that have a metric, and its mean over the seeds."""
    rounds, values = [], []
    for index in range(len(runs[0]["metrics"])):
        found = [r["metrics"][index][metric] for r in runs if metric in r["metrics"][index]]
        if found:
            rounds.append(index + 1)
            values.append(statistics.mean(found))
    return rounds, values


def draw_accuracy(runs: dict[str, list[Run]], path: Path, options: argparse.Namespace) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for method, found in runs.items():
        accuracy = [
            statistics.mean(one) for one in zip(*(r["accuracy"] for r in found), strict=True)
        ]
        rounds = range(1, len(accuracy) + 1)
        style = "--" if method == "fedavg" else "-"
        by_round.plot(rounds, accuracy, style, label=NAMES[method])
        by_bytes.plot([n / 1e6 for n in found[0]["bytes"]], accuracy, style, label=NAMES[method])
    by_round.set(xlabel="round", ylabel="test accuracy")
    by_bytes.set(xlabel="MB sent for training (logical)", xscale="log")
    for axes in (by_round, by_bytes):
        for target in options.targets:
            axes.axhline(target, color="grey", linestyle=":")
        axes.grid(alpha=0.3)
    by_round.legend()
    figure.savefig(path, dpi=110)


def draw_cosines(runs: dict[str, list[Run]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shown = [
        ("fsl-sage", "auxiliary-cosine", "FSL-SAGE, the round's uploads", "-"),
        ("fsl-sage", "cosine-before-alignment", "FSL-SAGE, buffer before alignment", "v"),
        ("fsl-sage", "cosine-after-alignment", "FSL-SAGE, buffer after alignment", "^"),
        ("cse-fsl", "auxiliary-cosine", "CSE-FSL, the round's uploads", "-"),
    ]
    for method, metric, label, style in shown:
        axes.plot(*mean_of(runs[method], metric), style, label=label)
        print(f"{label}: mean {statistics.mean(mean_of(runs[method], metric)[1]):.3f}")
    axes.set(xlabel="round", ylabel="cosine of ĝ and the true cut-layer gradient")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
