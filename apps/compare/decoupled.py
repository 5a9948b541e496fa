"""Compares FSL-SAGE and CSE-FSL with SplitFed V1, V2 and FedAvg: accuracy against bytes.

    python apps/compare/decoupled.py --dataset digits
    python apps/compare/decoupled.py --dataset mnist --data-dir /path/to/data
    python apps/compare/decoupled.py --dataset digits --ablate

All use Adam on both sides. Each method's learning rate is tuned first (one seed, validation
data); then it runs with every seed. FedAvg's accuracies are those of SplitFed V1,
which computes the same; its bytes are two whole models per client and round.
"""

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from matplotlib.figure import Figure
from task import CUT, build_model, partition
from torch.optim import Adam
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
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
RATES = (0.001, 0.003)

Run = dict[str, Any]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    book = Book(options)
    runs = {}
    for method in NAMES:
        if method in options.methods:
            rate = book.tuned(method, {})
            runs[method] = [book.run(method, rate, seed) for seed in options.seeds]
    if set(runs) != set(NAMES) - {"fedavg"}:
        return  # the others are run elsewhere, or later
    runs["fedavg"] = [as_fedavg(run, options) for run in runs["splitfed-v1"]]
    lines = [table(runs, options)]
    draw_accuracy(runs, options.out / f"{options.dataset}-decoupled.png", options)
    draw_cosines(runs, options.out / f"{options.dataset}-cosines.png")
    if options.ablate:
        lines.append(ablation(book, options))
    text = "\n\n".join(lines)
    (options.out / f"{options.dataset}-decoupled.md").write_text(text + "\n")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--ablate", action="store_true", help="vary q, l, the model and alpha")
    parser.add_argument("--out", type=Path, default=Path("compare-results"))
    return parser.parse_args()


# --- running ---------------------------------------------------------------------------------


class Book:
    """The finished runs, in a file; one that is there is not run again."""

    def __init__(self, options: argparse.Namespace) -> None:
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

    app = client_app(
        model=lambda: build_model(key["dataset"]), cut=CUT, data=data, optimizer=Adam, device="cpu"
    )
    strategy = make(key)(
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
    }


def make(key: Run) -> Any:
    """Return what makes the strategy from the common options."""
    if key["method"] == "fsl-sage":
        own = {"upload_every": key["q"], "align_every": key["l"], "auxiliary": key["auxiliary"]}
        return lambda **options: FSLSAGE(**own, **options)
    if key["method"] == "cse-fsl":
        own = {"upload_every": key["q"], "auxiliary": key["auxiliary"]}
        return lambda **options: CSEFSL(**own, **options)
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


def cells(runs: list[Run], target: float) -> str:
    """Return rate, last accuracy, bytes per round and bytes to the target, as table cells."""
    last = spread([100 * statistics.mean(run["accuracy"][-3:]) for run in runs])
    reached = [found / 1e6 for run in runs if (found := bytes_to(run, target)) is not None]
    missing = "" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)} seeds)"
    to_target = spread(reached, 2) + missing if reached else "not reached"
    each = runs[0]["bytes"][-1] / len(runs[0]["bytes"]) / 1e6
    return f"{runs[0]['rate']:g} | {last} | {each:.3f} | {to_target}"


HEAD = "learning rate | accuracy, % | MB a round | MB to the target |\n|---|---|---|---|---|"


def table(runs: dict[str, list[Run]], options: argparse.Namespace) -> str:
    lines = [f"| method | {HEAD}"]
    lines += [f"| {NAMES[m]} | {cells(found, options.target)} |" for m, found in runs.items()]
    return "\n".join(lines)


def ablation(book: Book, options: argparse.Namespace) -> str:
    """Vary one thing at a time, at the tuned rate of the standard setting."""
    rate = book.tuned("fsl-sage", {})
    cases: list[tuple[str, dict[str, Any]]] = [("as above", {})]
    cases += [(f"q = {q}", {"q": q}) for q in (1, 2, 10)]
    cases += [(f"l = {n or 'never'}", {"l": n}) for n in (1, 2, 10, 0)]
    cases += [("auxiliary: first stage", {"auxiliary": "first-stage"})]
    cases += [(f"Dirichlet {a}", {"alpha": a}) for a in ("0.3", "inf")]
    lines = [f"| FSL-SAGE | {HEAD}"]
    for name, changed in cases:
        runs = [book.run("fsl-sage", rate, seed, **changed) for seed in options.seeds]
        lines.append(f"| {name} | {cells(runs, options.target)} |")
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
        axes.axhline(options.target, color="grey", linestyle=":")
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
