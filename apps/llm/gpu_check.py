"""Check that split training on a GPU learns what unsplit training learns, and how fast.

    python apps/llm/gpu_check.py                       # a GPU, some minutes
    python apps/llm/gpu_check.py --model gpt2-small --steps 3 --device cpu

One client of PSL is to have the losses of unsplit training, in float32 and in bf16: the kernels are
those that add in the same order every time. Where the two differ by more than the tolerance, the
script ends with an error.
"""

import argparse
import logging
import os
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

APP = Path(__file__).resolve().parent
sys.path.insert(0, str(APP))

from llm.auxiliary import next_token  # noqa: E402
from llm.client_app import client_app_for  # noqa: E402
from llm.data import client_data  # noqa: E402
from llm.models import RANDOM, add_adapters, load_base  # noqa: E402
from llm.server_app import strategy_of  # noqa: E402

from flsplit import History, LocalGrid, client_app  # noqa: E402
from flsplit.run import SplitStrategy  # noqa: E402
from flsplit.seeds import derive_seed  # noqa: E402
from flsplit.strategies import PSL  # noqa: E402
from flsplit.vision import load_torchvision  # noqa: E402

TOLERANCE = {"float32": 1e-6, "bf16": 1e-3}  # of a loss, relative


@dataclass
class Workload:
    """A model with data, to be trained in one piece and split."""

    title: str
    precision: str
    build: Callable[[], nn.Module]
    batches: Sequence[tuple[dict[str, Tensor] | Tensor, Tensor]]  # one for each step
    loss: Callable[[Any, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    grid: Callable[[], LocalGrid]
    strategy: Callable[[nn.Module, int], SplitStrategy]  # with so many steps a round


def workloads(name: str, steps: int, device: str) -> list[Callable[[], Workload]]:
    """Return what makes each of them."""
    return [
        partial(residual_network, steps, device),
        partial(language_model, name, "float32", steps, device),
        partial(language_model, name, "bf16", steps, device),
    ]


def language_model(name: str, precision: str, steps: int, device: str) -> Workload:
    """Return a causal model with adapters, as the app trains it."""
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = defaults | {
        "model": name, "precision": precision, "strategy": "psl", "rank": 8, "torch-threads": 0,
        "strategy-args": f"{{fraction-evaluate = 0.0, device = '{device}', drop-last = true}}",
    }  # fmt: skip
    if name in RANDOM:  # what draws, draws other numbers in one piece
        RANDOM[name].update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})

    def build() -> nn.Module:
        torch.manual_seed(0)
        return add_adapters(load_base(config), config)

    loader = client_data(config, 0, 1)[0]
    batches = [
        ({"input_ids": batch["input_ids"]}, batch["labels"])
        for batch in (
            loader.collate_fn([loader.dataset[row] for row in rows])
            for rows in drawn_rows(len(loader.dataset), int(config["batch-size"]), steps)
        )
    ]
    return Workload(
        f"{name}, adapters", precision, build, batches, next_token,
        partial(torch.optim.AdamW, lr=float(config["learning-rate"])),
        lambda: LocalGrid(client_app_for(config, device), 1, run_config=config, progress=False),
        lambda model, steps: strategy_of(config | {"local-steps": steps}, model),
    )  # fmt: skip


def residual_network(steps: int, device: str) -> Workload:
    """Return ResNet-18 on images of 64 x 64 pixels."""
    drawn = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(32 * steps, 3, 64, 64, generator=drawn),
        torch.randint(10, (32 * steps,), generator=drawn),
    )

    def build() -> nn.Module:
        torch.manual_seed(0)
        return load_torchvision().models.resnet18(num_classes=10)

    app = client_app(model=build, cut="layer1", data=lambda context: data, device=device)
    rows = drawn_rows(len(data), 32, steps)
    return Workload(
        "resnet18", "float32", build, [data[list(one)] for one in rows],
        nn.functional.cross_entropy, partial(torch.optim.SGD, lr=0.01),
        lambda: LocalGrid(app, 1, progress=False),
        lambda model, steps: PSL(
            model=model, cut="layer1", server_lr=0.01, batch_size=32, local_steps=steps,
            fraction_evaluate=0.0, device=device,
        ),
    )  # fmt: skip


def drawn_rows(number: int, batch_size: int, steps: int) -> list[list[int]]:
    """Return the rows of the first steps' batches, in flsplit's own order."""
    rows: list[list[int]] = []
    epoch = 0
    while len(rows) < steps:
        drawn = torch.Generator().manual_seed(derive_seed(0, "data", "0", epoch))
        order = torch.randperm(number, generator=drawn).tolist()
        whole = number // batch_size * batch_size
        rows += [order[at : at + batch_size] for at in range(0, whole, batch_size)]
        epoch += 1
    return rows[:steps]


def unsplit(work: Workload, device: str) -> tuple[list[float], float]:
    """Train in one piece; return the losses, and the seconds of a step, without the first."""
    model = work.build().to(device).train()
    optimizer = work.optimizer([p for p in model.parameters() if p.requires_grad])
    losses, started = [], 0.0
    for step, (inputs, labels) in enumerate(work.batches):
        if step == 1:
            started = now(device)
        if isinstance(inputs, Tensor):
            output = model(inputs.to(device))
        else:
            output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        loss = work.loss(output, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, (now(device) - started) / max(len(losses) - 1, 1)


def split(work: Workload) -> tuple[list[float], float]:
    """Train with one client of PSL, a step in each round; return the losses, and a round's seconds.

    In a round the client segment goes down and comes back.
    """
    entries = history(work, rounds=len(work.batches), steps=1)
    seconds = sorted(entry.seconds for entry in entries[1:])
    return [float(entry.loss) for entry in entries], seconds[len(seconds) // 2]


def seconds_of_step(work: Workload, of_round: float) -> float:
    """Return the seconds of a step in a round of many."""
    steps = len(work.batches)
    last = history(work, rounds=2, steps=steps)[-1]
    return float((last.seconds - of_round) / (steps - 1))


def history(work: Workload, *, rounds: int, steps: int) -> History:
    """Return the ledger of a run with one client."""
    model = work.build()
    strategy = work.strategy(model, steps)
    return strategy.start(work.grid(), model.state_dict(), num_rounds=rounds).history


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    """Check, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-355m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    device, steps = given.device, given.steps
    where = device if device == "cpu" else torch.cuda.get_device_name()
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    print(f"torch {torch.__version__}, {where}, {steps} steps\n")
    print("| | precision | unsplit, ms/step | split | a round of a step | losses differ by | MiB |")
    print("|---|---|---|---|---|---|---|")
    failed = False
    for make in workloads(given.model, steps, device):
        work, peak = make(), ""
        expected, alone = unsplit(work, device)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        found, of_round = split(work)
        if device != "cpu":
            peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
        most = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
        failed |= not most <= TOLERANCE[work.precision]
        print(
            f"| {work.title} | {work.precision} | {1e3 * alone:.1f} "
            f"| {1e3 * seconds_of_step(work, of_round):.1f} | {1e3 * of_round:.1f} "
            f"| {most:.1e} | {peak} |",
            flush=True,
        )
    print("\nsplit training differs from unsplit" if failed else "\nall the same, as it should be")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
