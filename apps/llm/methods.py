"""Compare the methods on language: perplexity, bytes, and the server's time, from real runs.

    python apps/llm/methods.py --seeds 0 1 2 --out runs/llm

Each method gets the learning rate with which its training loss was least in the last round of seed
0: no held-out text is looked at for that. Finished runs are kept in the folder, so that what was
stopped goes on. `fedavg` fine-tunes the whole model at every client, and averages what is trained.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

APP = Path(__file__).resolve().parent
sys.path.insert(0, str(APP))

from llm.auxiliary import next_token  # noqa: E402
from llm.base import perplexity  # noqa: E402
from llm.client_app import app  # noqa: E402
from llm.data import client_data  # noqa: E402
from llm.models import add_adapters, load_base  # noqa: E402
from llm.server_app import prepared_model, strategy_of, whole_models  # noqa: E402

from flsplit import LocalGrid  # noqa: E402

METHODS = {
    "fedavg": "",
    "psl": "",
    "splitfed-v1": "",
    "splitfed-v2": "",
    "sequential-sl": "",
    "fsl-sage": "upload-every = 5, align-every = 1, align-epochs = 40, buffer-size = 64",
    "cse-fsl": "upload-every = 5",
}
EVALUATION = "fraction-evaluate = 0.0"  # the end is tested here, alike for all
RATES = (0.001, 0.003)
CLIENTS, ROUNDS, STEPS, BATCH = 4, 3, 10, 8


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--out", type=Path, default=Path("runs/llm"))
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for method in given.methods:
            for rate in RATES if seed == given.seeds[0] else [best_rate(given, method)]:
                finished(given.out, method, seed, rate)
    print_table(given)


def best_rate(given: argparse.Namespace, method: str) -> float:
    """Return the rate with the least training loss."""
    seed = given.seeds[0]
    return min(RATES, key=lambda rate: finished(given.out, method, seed, rate)["loss"])


def finished(out: Path, method: str, seed: int, rate: float) -> dict[str, float]:
    """Return what a run came to; it is run if it hasn't been."""
    path = out / f"{method}-{seed}-{rate:g}.json"
    if not path.exists():
        path.write_text(json.dumps(run(out, method, seed, rate)))
        print(path.name, path.read_text(), file=sys.stderr, flush=True)
    found: dict[str, float] = json.loads(path.read_text())
    return found


def run(out: Path, method: str, seed: int, rate: float) -> dict[str, float]:
    """Train with a method, and test it on the held-out text."""
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = defaults | {
        "strategy": method, "seed": seed, "learning-rate": rate, "local-steps": STEPS,
        "batch-size": BATCH, "num-server-rounds": ROUNDS, "generate-tokens": 0,
        "strategy-args": f"{{{', '.join(filter(None, [METHODS[method], EVALUATION]))}}}",
    }  # fmt: skip
    started, model = time.perf_counter(), prepared(config, out)
    texts = [client_data(config, client, CLIENTS) for client in range(CLIENTS)]
    held_out = [batch for _, loader, _ in texts for batch in loader]
    before = perplexity(model, held_out)
    if method == "fedavg":
        found = fedavg(model, config, [train for train, _, _ in texts])
        weights = {"": model.state_dict()}
    else:
        grid = LocalGrid(app, CLIENTS, run_config=config, progress=False)
        result = strategy_of(config, model).start(grid, model.state_dict(), num_rounds=ROUNDS)
        weights = whole_models(result)
        sent = [sum(entry.traffic.logical.values()) for entry in result.history]
        found = {
            "loss": result.history[-1].loss,
            "bytes": sum(sent[1:]) / (ROUNDS - 1) * ROUNDS,
            "once": sent[0] - sent[1],
            "server-seconds": sum(entry.server_seconds for entry in result.history),
        } | dict(result.history[-1].metrics)
    return found | {
        "before": before,
        "perplexity": tested(model, weights, [held_out_of for _, held_out_of, _ in texts]),
        "seconds": time.perf_counter() - started,
    }


def prepared(config: dict[str, Any], out: Path) -> nn.Module:
    """Return the model that all methods begin with, made once for a seed."""
    path = out / f"base-{config['seed']}.safetensors"
    if not path.exists():
        save_file(prepared_model(config).state_dict(), path)
    model = add_adapters(load_base(config), config)
    model.load_state_dict(load_file(path))
    return model


def tested(model: nn.Module, weights: dict[str, dict[str, Tensor]], held_out: list[Any]) -> float:
    """Return the perplexity on all clients' text, of each client's own model where it has one."""
    logs, tokens = 0.0, 0
    for client, loader in enumerate(held_out):
        model.load_state_dict(weights.get(f"client-{client}") or weights[""])
        batches = list(loader)
        number = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        logs += number * math.log(perplexity(model, batches))
        tokens += number
    return math.exp(logs / tokens)


def fedavg(model: nn.Module, config: dict[str, Any], loaders: list[Any]) -> dict[str, float]:
    """Fine-tune the whole model at every client in turn, and average what is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    server = {name: p.detach().clone() for name, p in trained.items()}
    optimizers = [torch.optim.AdamW(trained.values(), lr=config["learning-rate"]) for _ in loaders]
    batches = [batches_of(loader, 100 * config["seed"] + i) for i, loader in enumerate(loaders)]
    sizes = [len(loader.dataset) for loader in loaders]
    for _ in range(ROUNDS):
        mean, losses = {name: torch.zeros_like(p) for name, p in server.items()}, []
        for size, optimizer, own in zip(sizes, optimizers, batches, strict=True):
            model.load_state_dict(server, strict=False)
            for _ in range(STEPS):
                batch = next(own)
                loss = next_token(model(input_ids=batch["input_ids"]), batch["labels"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            for name, parameter in trained.items():
                mean[name] += parameter.detach() * (size / sum(sizes))
        server = mean
    model.load_state_dict(server, strict=False)
    each_way = sum(p.numel() * p.element_size() for p in server.values())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "loss": statistics.mean(losses),
        "bytes": 2 * each_way * len(loaders) * ROUNDS,
        "once": (whole - each_way) * len(loaders),
        "server-seconds": 0.0,
    }


def batches_of(loader: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield a client's batches, in a new order in every epoch."""
    drawn = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(loader.dataset), generator=drawn).tolist()
        for at in range(0, len(order), BATCH):
            yield loader.collate_fn([loader.dataset[row] for row in order[at : at + BATCH]])


def print_table(given: argparse.Namespace) -> None:
    """Print means over the seeds, with their standard deviations."""
    print("| method | rate | perplexity before | after | MB | once, MB | server, s |")
    print("|---|---|---|---|---|---|---|")
    for method in given.methods:
        rate = best_rate(given, method)
        runs = [finished(given.out, method, seed, rate) for seed in given.seeds]

        def mean(key: str, unit: float = 1.0, runs: list[dict[str, float]] = runs) -> str:
            values = [one[key] / unit for one in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f}{spread}"

        columns = [mean("before"), mean("perplexity"), mean("bytes", 1e6), mean("once", 1e6)]
        print(f"| {method} | {rate:g} | {' | '.join([*columns, mean('server-seconds')])} |")


if __name__ == "__main__":
    main()
