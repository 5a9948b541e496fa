"""Measures what a server step costs with PSL, EPSL and GAPSL, on random smashed data.

    python apps/compare/server_cost.py --model vgg16 --clients 10 --batch-size 32

Times are CPU seconds of one thread, the least of ``--repeats`` steps each; methods take turns, so
that whatever else the machine does hits all of them.
"""

import argparse
import time
from functools import partial

import numpy as np
import torch
from task import CUT, build_model
from torch import nn
from torch.nn import functional

from flsplit.cut import split
from flsplit.server.passes import (
    PerClientFactored,
    PerClientProducts,
    Pooled,
    Replay,
    ServerPass,
)
from flsplit.server.rules import GradientRule
from flsplit.server.segment import ServerSegment
from flsplit.server.step import ClientBatch, StepContext, StepResult, client_shares
from flsplit.strategies.rules import LeaderAlignment
from flsplit.vision import load_torchvision

METHODS: dict[str, tuple[ServerPass, list[GradientRule]]] = {
    "PSL": (Pooled(), []),
    "EPSL phi=0.5": (Replay(0.5), []),
    "EPSL phi=1": (Replay(1.0), []),
    "GAPSL": (PerClientFactored(), [LeaderAlignment()]),
    "GAPSL low memory": (PerClientProducts(), [LeaderAlignment()]),
}


class TimedSegment(ServerSegment):
    """Remembers when the first forward pass of a step ended."""

    first_forward: float | None = None

    def forward(self, smashed: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits = super().forward(smashed)
        if self.first_forward is None:
            self.first_forward = time.process_time()
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("vgg16", "vgg16-cifar", "small"), default="vgg16")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, shape = server_segment(options.model)
    segment = TimedSegment(
        module.train(), loss=functional.cross_entropy, optimizer=partial(torch.optim.SGD),
        lr=1e-4, device=torch.device("cpu"),
    )  # fmt: skip
    batches = [
        ClientBatch(str(i), torch.randn(options.batch_size, *shape).relu(),
                    torch.randint(10, (options.batch_size,)), 100)
        for i in range(options.clients)
    ]  # fmt: skip
    size = sum(p.numel() for p in segment.parameters)
    print(f"{options.model}, server segment of {size:,} parameters, smashed data {tuple(shape)}")
    total, after = {m: [] for m in options.methods}, {m: [] for m in options.methods}
    sent = {}
    for _ in range(options.repeats):
        for method in options.methods:
            result, whole, later = one_step(segment, batches, *METHODS[method])
            total[method].append(whole)
            after[method].append(later)
            sent[method] = (result.rows, downlink(result))
            del result
    base, base_after = min(total["PSL"]), min(after["PSL"])
    print(
        "| method | step, s | of PSL's | after the first forward, s | of PSL's | rows | down, MB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method in options.methods:
        one, later, (rows, down) = min(total[method]), min(after[method]), sent[method]
        print(
            f"| {method} | {one:.3f} | {one / base:.2f} | {later:.3f} | {later / base_after:.2f} "
            f"| {rows} | {down / 1e6:.2f} |",
            flush=True,
        )


def server_segment(model: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a server segment and the shape of a row of its smashed data."""
    if model == "small":
        whole, cut, image = build_model("mnist"), CUT, torch.zeros(1, 1, 28, 28)
    else:  # after the first four convolutions, as in GAPSL's experiments; images as CIFAR-10's
        whole, cut = load_torchvision().models.vgg16(num_classes=10), "features.8"
        image = torch.zeros(1, 3, 32, 32)
        if model == "vgg16-cifar":  # with the small head that is usual for small images
            whole.avgpool = nn.AdaptiveAvgPool2d(1)
            whole.classifier = nn.Sequential(
                nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(512, 10)
            )
    parts = split(whole, cut)
    return parts.server, tuple(parts.client(image).shape[1:])


def one_step(
    segment: TimedSegment, batches: list[ClientBatch], server_pass: ServerPass,
    rules: list[GradientRule],
) -> tuple[StepResult, float, float]:  # fmt: skip
    """Return a step's result, its seconds, and those after the first forward pass."""
    shares = client_shares(batches, "equal")
    context = StepContext(tuple(shares), shares, 1, 1, 0, 0.5, np.random.default_rng(0))
    segment.first_forward = None
    started = time.process_time()
    result = server_pass(segment, batches, shares)
    for rule in rules:
        result = rule(context, result)
    segment.step(result.server_gradients, result.server_lr_factor)
    ended = time.process_time()
    assert segment.first_forward is not None
    return result, ended - started, ended - segment.first_forward


def downlink(result: StepResult) -> int:
    """Return the logical bytes of the step's cut-layer gradients."""
    unicast = broadcast = 0
    for client, gradient in result.cut_gradients.items():
        shared = gradient[: result.shared_rows.get(client, 0)].nbytes
        unicast += gradient.nbytes - shared
        broadcast = max(broadcast, shared)
    return unicast + broadcast


if __name__ == "__main__":
    main()
