"""Measures what a client of FSL-SAGE or CSE-FSL holds, beside what training the whole model takes.

    python apps/compare/decoupled_memory.py

One step of a ResNet-18 for images of 32 x 32 pixels, cut after its second stage, with Adam on
both sides, on random images. The figures are those of the ledger.
"""

import argparse
import logging
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.optim import Adam
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.strategies import CSEFSL, FSLSAGE
from flsplit.vision import load_torchvision

CUT = "layer2"
MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    print("| method | auxiliary model | its size, MiB | a client holds, MiB | of the whole model |")
    print("|---|---|---|---|---|")
    for strategy in (FSLSAGE, CSEFSL):
        for auxiliary in ("linear", "first-stage"):
            print(row(strategy, auxiliary, options.batch_size), flush=True)


def row(strategy: Any, auxiliary: str, batch_size: int) -> str:
    """Train for a step and return what the ledger says."""
    data = TensorDataset(torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,)))
    app = client_app(model=build_model, cut=CUT, data=lambda _: data, optimizer=Adam, device="cpu")
    model = build_model()
    method = strategy(
        model=model, cut=CUT, server_optimizer=Adam, auxiliary=auxiliary, batch_size=batch_size,
        fraction_evaluate=0.0, device="cpu",
    )  # fmt: skip
    initial = ArrayRecord(model.state_dict())
    result = method.start(LocalGrid(app, num_clients=1, progress=False), initial, num_rounds=1)
    entry = result.history[0]
    size = entry.traffic.logical["auxiliary-down"]
    held = entry.metrics["client-memory-bytes"]
    whole = entry.metrics["whole-model-memory-bytes"]
    return (
        f"| {strategy.__name__} | {auxiliary} | {size / MB:.2f} | {held / MB:.0f} "
        f"| {100 * held / whole:.0f} % of {whole / MB:.0f} MiB |"
    )


def build_model() -> nn.Module:
    return load_torchvision().models.resnet18(num_classes=10)


if __name__ == "__main__":
    main()
