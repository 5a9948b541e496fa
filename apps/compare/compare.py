"""Compares methods on the same data, model, cut, batches and seeds.

    python apps/compare/compare.py --dataset digits
    python apps/compare/compare.py --dataset mnist --data-dir /path/to/data --alpha 0.1 inf

Each method's learning rates are tuned first: six points, one seed, a fifth of the rounds, judged
on validation data. Then it is run with every seed. Runs are kept in the output folder as JSON
lines; one that is there is not run again, so a comparison that was stopped goes on.
"""

import argparse
import json
import logging
import math
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, Rates
from report import Run, alpha_name, draw, table
from training import Setting, train

PRESETS = {"digits": (1400, 397), "mnist": (20_000, 5_000)}  # training and test examples


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    sizes = PRESETS[options.dataset]
    train_size, test_size = options.train_size or sizes[0], options.test_size or sizes[1]
    setting = Setting(
        options.dataset, options.data_dir, options.clients, options.rounds, options.local_steps,
        options.batch_size, train_size, test_size,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    book = Book(options.out / "runs.jsonl", setting, len(options.alpha) * len(options.methods)
                * (6 + len(options.seeds)))  # fmt: skip
    for alpha in options.alpha:
        for method in options.methods:
            rates = book.tuned(method, alpha, options.seeds[0])
            for seed in options.seeds:
                book.run(method, rates, alpha, seed, tuning=False)
        write_page(options, book)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=sorted(PRESETS), default="digits")
    parser.add_argument("--data-dir", default="", help="where torchvision's MNIST lies")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.1], help="inf is IID")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local-steps", type=int, default=20, help="mini-batches per round")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--train-size", type=int, default=0, help="0: 20000 of MNIST, all digits")
    parser.add_argument("--test-size", type=int, default=0, help="0: 5000 of MNIST, all digits")
    parser.add_argument("--target", type=float, default=85.0, help="accuracy to reach, %%")
    parser.add_argument("--out", type=Path, default=Path("compare-results"))
    return parser.parse_args()


class Book:
    """The finished runs, in a file; knows which are missing."""

    def __init__(self, path: Path, setting: Setting, planned: int) -> None:
        self.path, self.setting, self.planned = path, setting, planned
        self.runs: list[Run] = []
        self.started, self.done_now = time.perf_counter(), 0.0
        if path.exists():
            self.runs = [json.loads(line) for line in path.read_text().splitlines()]
        self.common = {k: v for k, v in vars(setting).items() if k != "data_dir"}

    def run(self, method: str, rates: Rates, alpha: float, seed: int, *, tuning: bool) -> Run:
        """Return a run, from the file if it is there."""
        key: dict[str, Any] = {
            "method": method, "rates": rates, "alpha": str(alpha), "seed": seed, "tuning": tuning,
            **self.common,
        }  # fmt: skip
        for run in self.runs:
            if all(run.get(name) == value for name, value in key.items()):
                return run
        try:
            found = train(self.setting, method, rates, alpha, seed, tuning=tuning)
        except ArithmeticError as error:  # training diverged: that is a result
            found = {"accuracy": [0.0], "failed": str(error), "seconds": 0.0}
            if not tuning:
                raise
        run = key | found
        self.runs.append(run)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        self._tell(run)
        return run

    def tuned(self, method: str, alpha: float, seed: int) -> Rates:
        """Return the rates of the best of six short runs on validation data."""
        runs = [self.run(method, rates, alpha, seed, tuning=True) for rates in METHODS[method].grid]
        best = max(runs, key=lambda run: statistics.mean(run["accuracy"][-2:]))
        rates: Rates = best["rates"]
        return rates

    def _tell(self, run: Run) -> None:
        rounds = self.setting.rounds
        self.done_now += max(rounds // 5, 1) if run["tuning"] else rounds
        spent = time.perf_counter() - self.started
        what = "tuning" if run["tuning"] else f"seed {run['seed']}"
        rates = " ".join(f"{k}={v:g}" for k, v in run["rates"].items())
        print(
            f"{len(self.runs)} of about {self.planned} runs, {spent / 60:.1f} min: {run['method']} "
            f"alpha {run['alpha']} {what} {rates}: {100 * run['accuracy'][-1]:.1f} % "
            f"({run['seconds']:.1f} s)",
            flush=True,
        )

    def finals(self, alpha: float, methods: list[str], seeds: list[int]) -> dict[str, list[Run]]:
        """Return each method's runs with the tuned rates."""
        return {
            method: [
                self.run(method, self.tuned(method, alpha, seeds[0]), alpha, seed, tuning=False)
                for seed in seeds
            ]
            for method in methods
        }


def write_page(options: argparse.Namespace, book: Book) -> None:
    """Write results.md and the pictures for the alphas that are complete."""
    arguments = list(sys.argv[1:])
    for name in ("--data-dir", "--out"):
        if name in arguments:
            arguments[arguments.index(name) + 1] = f"/path/to/{name.strip('-').split('-')[0]}"
    setting = book.setting
    lines = [
        "# Results\n",
        f"`python apps/compare/compare.py {shlex.join(arguments)}`\n",
        f"{setting.dataset}, {setting.clients} clients, {setting.rounds} rounds of "
        f"{setting.local_steps} mini-batches of {setting.batch_size} per client, "
        f"{len(options.seeds)} seeds. Accuracy: mean over the clients' models and the last rounds "
        "± standard deviation over seeds.\n",
    ]
    for alpha in options.alpha:
        methods = [m for m in options.methods if _complete(book, m, alpha, options.seeds)]
        if not methods:
            continue
        finals = book.finals(alpha, methods, options.seeds)
        picture = options.out / f"{setting.dataset}-{'iid' if math.isinf(alpha) else alpha}.png"
        draw(finals, picture, f"{setting.dataset}, {alpha_name(alpha)}")
        lines += [f"## {alpha_name(alpha)}\n", table(finals, options.target)]
        lines += [f"![accuracy against rounds and bytes]({picture.name})\n"]
    (options.out / "results.md").write_text("\n".join(lines))
    print(f"wrote {options.out / 'results.md'}", flush=True)


def _complete(book: Book, method: str, alpha: float, seeds: list[int]) -> bool:
    found = {
        run["seed"]
        for run in book.runs
        if run["method"] == method and run["alpha"] == str(alpha) and not run["tuning"]
    }
    return found >= set(seeds)


if __name__ == "__main__":
    main()
