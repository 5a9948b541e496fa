"""Compare the methods on language: perplexity against bytes, memory and the server's time.

    python apps/llm/compare_llm.py --seeds 0 1 2 --out runs/llm

Every method is tuned alike: of the same grid it gets the learning rate with which the clients'
training text has the least loss at the end of seed 0's run, and where that is an end of the grid,
the grid goes on there. No held-out text is looked at for that. Finished runs are kept in the
folder, so that what was stopped goes on; the table and the picture are written there, too.
`fedavg` fine-tunes the whole model at every client, and averages what is trained.
"""

import argparse
import json
import logging
import math
import multiprocessing
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

APP = Path(__file__).resolve().parent
sys.path[:0] = [str(APP), str(APP.parent / "compare")]

from device_memory import measure_split, measure_whole  # noqa: E402
from llm.auxiliary import next_token  # noqa: E402
from llm.base import perplexity  # noqa: E402
from llm.client_app import app  # noqa: E402
from llm.data import client_data  # noqa: E402
from llm.models import add_adapters, load_base  # noqa: E402
from llm.sequences import DATA  # noqa: E402
from llm.server_app import prepared_model, strategy_of, whole_models  # noqa: E402
from methods_table import draw, write_table  # noqa: E402
from tuning import beyond  # noqa: E402

from flsplit import LocalGrid  # noqa: E402

UPLOADS = "upload-every = 5"
BF16 = '{name = "half", dtype = "bfloat16", place = "%s"}'
INT8 = '{name = "int8", place = "%s"}'


def both_ways(part: str) -> str:
    """Return the option that compresses smashed data, and the gradients that come back."""
    return f"client-parts = [{part % 'smashed'}, {part % 'cut-gradient'}]"


METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "psl": {},
    "psl-bf16": {"strategy": "psl", "strategy-args": both_ways(BF16)},
    "psl-int8": {"strategy": "psl", "strategy-args": both_ways(INT8)},
    "u-shape": {"strategy": "psl", "label-private": True},
    "splitfed-v1": {},
    "splitfed-v2": {},
    "sequential-sl": {},
    "fsl-sage": {
        "strategy-args": f"{UPLOADS}, align-every = 2, align-epochs = 40, buffer-size = 64"
    },
    "cse-fsl": {"strategy-args": UPLOADS},
}
RATES = (0.001, 0.003, 0.01)
WIDENINGS = 2
"""So often a method's grid is widened; a rate that is at its end all the same is marked."""
CLIENTS, ROUNDS, STEPS, BATCH = 4, 5, 10, 8
TRAIN_ROWS = 128  # of each client's training text, whose loss chooses the rate
MEMORY_MODELS = ("gpt2-40m",)  # in a small one what is measured is mostly torch

Result = dict[str, Any]


class Comparison:
    """The runs of all methods, in files of their own.

    Parameters
    ----------
    given : argparse.Namespace
        What the command line says.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._first = given.seeds[0]

    def path(self, method: str, seed: int, rate: float) -> Path:
        """Return where a run's result is, or will be."""
        given = self._given
        kind = f"{given.data}-{given.rounds}x{given.steps}"
        return Path(given.out) / f"{kind}-{method}-{seed}-{rate:g}.json"

    def result(self, method: str, seed: int, rate: float) -> Result | None:
        """Return what a run came to; None if it hasn't been."""
        return read(self.path(method, seed, rate))

    def missing(self, method: str) -> list[tuple[int, float]]:
        """Return what is to be run next: seeds and rates."""
        rates, best, _ = self.tuned(method)
        if best is None:
            tried = [(self._first, rate) for rate in rates]
        else:
            tried = [(seed, best) for seed in self._given.seeds]
        return [(seed, rate) for seed, rate in tried if self.result(method, seed, rate) is None]

    def tuned(self, method: str) -> tuple[list[float], float | None, bool]:
        """Return the rates that are, or have to be, tried; the best of them if all were.

        And whether that is at an end of them.
        """
        rates = sorted(self._given.rates)
        for widening in range(WIDENINGS + 1):
            found = {rate: self.result(method, self._first, rate) for rate in rates}
            if None in found.values():
                return rates, None, False
            best = min(rates, key=lambda rate: found[rate]["trained-loss"])  # type: ignore[index]
            further = beyond({"lr": best}, [{"lr": rate} for rate in rates])
            if not further or widening == WIDENINGS:
                break
            rates = sorted([*rates, further["lr"]])
        return rates, best, bool(further)

    def complete(self, workers: int) -> None:
        """Run what is missing, the slowest first, several at a time."""
        spawn = multiprocessing.get_context("spawn")
        configs = [config_of("psl", seed, 0.0, self._given) for seed in self._given.seeds]
        with ProcessPoolExecutor(workers, spawn, quietly) as pool:
            list(pool.map(prepared, configs, [self._given.out] * len(configs)))
            while jobs := [
                (method, *one)
                for method in sorted(self._given.methods, key=lambda name: name != "fsl-sage")
                for one in self.missing(method)
            ]:
                running = {
                    pool.submit(
                        run, self._given.out, config_of(*job, self._given), job[0] == "fedavg"
                    ): job
                    for job in jobs
                }
                for done in as_completed(running):
                    write(self.path(*running[done]), found := done.result())
                    numbers = {key: one for key, one in found.items() if key != "curve"}
                    print(*running[done], json.dumps(numbers), file=sys.stderr, flush=True)

    def memory(self, workers: int) -> dict[str, dict[str, dict[str, float]]]:
        """Return what a client of each method takes, in MiB, by model and method."""
        given, spawn = self._given, multiprocessing.get_context("spawn")
        found = {}
        with ProcessPoolExecutor(workers, spawn, quietly) as pool:
            for model in given.memory_models:
                measured = pool.map(partial(memory_of, given, model), given.methods)
                found[model] = dict(zip(given.methods, measured, strict=True))
        return found

    def finals(self) -> dict[str, dict[str, Any]]:
        """Return each method's rate, whether it is at an end, and its runs by seed."""
        found = {}
        for method in self._given.methods:
            _, best, at_end = self.tuned(method)
            assert best is not None
            runs = {seed: self.result(method, seed, best) for seed in self._given.seeds}
            found[method] = {
                "rate": best,
                "at-end": at_end,
                "runs": {seed: one for seed, one in runs.items() if one and "failed" not in one},
            }
        return found


def main() -> None:
    """Run what is missing, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--data", choices=DATA, default="packed")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--memory-models", nargs="*", default=[*MEMORY_MODELS])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/llm"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    quietly()
    started, comparison = time.perf_counter(), Comparison(given)
    comparison.complete(given.workers)
    found = comparison.finals()
    memory = comparison.memory(given.workers)
    setting = (
        f"{CLIENTS} clients, {given.rounds} rounds of {given.steps} steps on {BATCH} sequences "
        f"({given.data}), seeds {' '.join(map(str, given.seeds))}"
    )
    print(write_table(given.out / f"{given.data}.md", setting, found, memory))
    draw(given.out / f"{given.data}.png", setting, found, memory)
    print(f"{time.perf_counter() - started:.0f} s, written to {given.out}", file=sys.stderr)


def quietly() -> None:
    """Let this process compute on one core, and say what is wrong only."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def read(path: Path) -> Result | None:
    """Return what a file holds, if it is there."""
    if not path.exists():
        return None
    found: Result = json.loads(path.read_text())
    return found


def write(path: Path, found: Result) -> None:
    """Write a file that is whole, or not there."""
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").replace(path)


def config_of(method: str, seed: int, rate: float, given: argparse.Namespace) -> dict[str, Any]:
    """Return the run config of a method."""
    own = {"strategy": method, "strategy-args": ""} | METHODS[method]
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return defaults | own | {
        "seed": seed, "learning-rate": rate, "local-steps": given.steps, "batch-size": BATCH,
        "num-server-rounds": given.rounds, "generate-tokens": 0, "data": given.data,
        "strategy-args": f"{{{own['strategy-args']}}}",
    }  # fmt: skip


def run(out: Path, config: dict[str, Any], whole: bool) -> Result:
    """Train by the run config, and test on the held-out text.

    Parameters
    ----------
    out : Path
        Where the base is.
    config : dict
        The run config.
    whole : bool
        Whether every client has the whole model, as in FedAvg.

    Returns
    -------
    dict
        ``trained-loss`` on training text; ``before`` and ``perplexity`` on the held-out text;
        ``curve`` of perplexity, ``bytes`` and ``server-seconds`` after each round; bytes ``up`` and
        ``down`` per token that was trained on; ``once``, the bytes of the weights at the start.
        A run that diverges has an infinite ``trained-loss`` and why it ``failed``.
    """
    started, model = time.perf_counter(), prepared(config, out)
    texts = [client_data(config, client, CLIENTS) for client in range(CLIENTS)]
    train, held_out = [one for one, _, _ in texts], [one for _, one, _ in texts]
    before = tested(model, {"": model.state_dict()}, held_out)
    try:
        if whole:
            found = fedavg(model, config, train, held_out)
            weights = {"": model.state_dict()}
        else:
            found, weights = in_split(model, config)
        after = tested(model, weights, held_out)
        loss = math.log(tested(model, weights, [beginning(one) for one in train]))
    except ArithmeticError as error:
        return {"trained-loss": math.inf, "failed": str(error)}
    return found | {
        "before": before,
        "perplexity": after,
        "trained-loss": loss,
        "seconds": time.perf_counter() - started,
    }


def in_split(model: nn.Module, config: dict[str, Any]) -> tuple[Result, dict[str, Any]]:
    """Train in split; return what it took, and the weights."""
    grid = LocalGrid(app, CLIENTS, run_config=config, progress=False)
    rounds = int(config["num-server-rounds"])
    result = strategy_of(config, model).start(grid, model.state_dict(), num_rounds=rounds)
    history = result.history
    # What clients have to be given once is what comes down in the first round only.
    handed = [entry.traffic.logical["client-segments-down"] for entry in history]
    once = max(0, handed[0] - handed[1]) if rounds > 1 else 0
    up = sum(entry.traffic.up_bytes for entry in history)
    down = sum(entry.traffic.down_bytes for entry in history) - once
    tokens = CLIENTS * rounds * config["local-steps"] * config["batch-size"] * config["seq-length"]
    curve, sent, seconds = [], -once, 0.0
    for entry in history:
        sent += entry.traffic.training_bytes
        seconds += entry.server_seconds
        point = {"perplexity": math.exp(entry.evaluation["loss"])}
        curve.append(point | {"bytes": sent, "server-seconds": seconds})
    left_out = sorted({one.client for entry in history for one in entry.left_out})
    if left_out:
        raise RuntimeError(f"{config['strategy']}: left out {left_out}")
    numbers = {"curve": curve, "up": up / tokens, "down": down / tokens, "once": once}
    return numbers | dict(history[-1].metrics), whole_models(result)


def prepared(config: dict[str, Any], out: Path) -> nn.Module:
    """Return the model that all methods begin with, made once for a seed."""
    path = out / f"base-{config['seed']}.safetensors"
    if not path.exists():
        save_file(prepared_model(config | {"label-private": False}).state_dict(), path)
    model = add_adapters(load_base(config), config)
    model.load_state_dict(load_file(path))
    return model


def tested(model: nn.Module, weights: dict[str, dict[str, Tensor]], loaders: list[Any]) -> float:
    """Return the perplexity on clients' texts, of each client's own model where it has one.

    Parameters
    ----------
    model : nn.Module
        Gets the weights.
    weights : dict
        The whole model's by the client, or one for all under an empty name.
    loaders : list of DataLoader
        The clients' sequences.
    """
    logs, tokens = 0.0, 0
    for client, loader in enumerate(loaders):
        model.load_state_dict(weights.get(f"client-{client}") or weights[""])
        rows = [loader.dataset[index] for index in range(len(loader.dataset))]
        batches = [loader.collate_fn(rows[at : at + 64]) for at in range(0, len(rows), 64)]
        number = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        logs += number * math.log(perplexity(model, batches))
        tokens += number
    return math.exp(logs / tokens)


def beginning(loader: Any) -> DataLoader[Any]:
    """Return a client's first sequences, enough to tell one rate from another."""
    rows = range(min(TRAIN_ROWS, len(loader.dataset)))
    return DataLoader(Subset(loader.dataset, rows), collate_fn=loader.collate_fn)


def fedavg(
    model: nn.Module, config: dict[str, Any], loaders: list[Any], held_out: list[Any]
) -> Result:
    """Fine-tune the whole model at every client in turn, and average what is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    server = {name: p.detach().clone() for name, p in trained.items()}
    optimizers = [torch.optim.AdamW(trained.values(), lr=config["learning-rate"]) for _ in loaders]
    size, seed = int(config["batch-size"]), 100 * config["seed"]
    batches = [batches_of(loader, seed + i, size) for i, loader in enumerate(loaders)]
    shares = [len(loader.dataset) for loader in loaders]
    each_way = sum(p.numel() * p.element_size() for p in server.values()) * len(loaders)
    curve, seconds = [], 0.0
    for round_ in range(1, config["num-server-rounds"] + 1):
        updates = []
        for optimizer, own in zip(optimizers, batches, strict=True):
            model.load_state_dict(server, strict=False)
            for _ in range(config["local-steps"]):
                batch = next(own)
                loss = next_token(model(input_ids=batch["input_ids"]), batch["labels"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            updates.append({name: p.detach().clone() for name, p in trained.items()})
        started = time.perf_counter()
        server = {
            name: sum(
                update[name] * (share / sum(shares))
                for share, update in zip(shares, updates, strict=True)
            )
            for name in trained
        }
        seconds += time.perf_counter() - started
        model.load_state_dict(server, strict=False)
        point = {"perplexity": tested(model, {"": model.state_dict()}, held_out)}
        curve.append(point | {"bytes": 2 * each_way * round_, "server-seconds": seconds})
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = len(loaders) * config["local-steps"] * size * config["seq-length"]  # of a round
    sent = each_way / tokens
    return {"curve": curve, "up": sent, "down": sent, "once": whole * len(loaders)}


def batches_of(loader: Any, seed: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield a client's batches, in a new order in every epoch."""
    drawn = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(loader.dataset), generator=drawn).tolist()
        for at in range(0, len(order), size):
            yield loader.collate_fn([loader.dataset[row] for row in order[at : at + size]])


def memory_of(given: argparse.Namespace, model: str, method: str) -> Result:
    """Return a client's most memory in MiB, measured once in a process of its own.

    The setting is the runs' with a few steps; an alignment happens at the server, so it is short.
    """
    path = given.out / f"memory-{model}-{method}.json"
    if (found := read(path)) is None:
        config = config_of(method, 0, 0.001, given) | {"model": model, "local-steps": 2}
        own = config["strategy-args"].replace("align-epochs = 40", "align-epochs = 1")
        separator = ", " if own != "{}" else ""
        config["strategy-args"] = f"{own[:-1]}{separator}fraction-evaluate = 0.0}}"
        found = measure_whole(config) if method == "fedavg" else measure_split(config, rounds=2)
        write(path, found)
    return {key: found[key] / 2**20 for key in ("peak", "later")}


if __name__ == "__main__":
    main()
