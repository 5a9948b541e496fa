"""Measures what a server step costs with PSL, EPSL and GAPSL, on random smashed data.

    python apps/compare/server_cost.py --model vgg16 --clients 10 --batch-size 32

Times are CPU seconds of one thread, the least of ``--repeats`` steps each; methods take turns, so
that whatever else the machine does hits all of them.
"""

import argparse
import time
from functools import partial
from types import SimpleNamespace

import torch
from task import CUT, small_network
from torch import nn
from torch.nn import functional

from flsplit.account import RoundEntry
from flsplit.cut import split
from flsplit.message.request import Backward
from flsplit.run import ClientBatch, SplitStrategy, Step
from flsplit.run.step import StepSettings
from flsplit.server.segment import ServerSegment
from flsplit.strategies import EPSL, GAPSL, PSL
from flsplit.vision import load_torchvision

METHODS: dict[str, tuple[type[SplitStrategy], dict[str, object]]] = {
    "PSL": (PSL, {}),
    "EPSL phi=0.5": (EPSL, {"phi": 0.5}),
    "EPSL phi=1": (EPSL, {"phi": 1.0}),
    "GAPSL": (GAPSL, {}),
    "GAPSL low memory": (GAPSL, {"low_memory": True}),
}


class TimedSegment(ServerSegment):
    """Remembers when the first forward pass of a step ended."""

    first_forward: float | None = None

    def forward(self, smashed: torch.Tensor, **options: bool) -> torch.Tensor:
        """Return the logits."""
        logits = super().forward(smashed, **options)
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
            rows, told, whole, later = one_step(segment, batches, *METHODS[method])
            total[method].append(whole)
            after[method].append(later)
            sent[method] = (rows, downlink(told))
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
        whole, cut, image = small_network(1, 2, 7), CUT, torch.zeros(1, 1, 28, 28)
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
    segment: TimedSegment, batches: list[ClientBatch], method: type[SplitStrategy],
    arguments: dict[str, object],
) -> tuple[int, dict[str, Backward], float, float]:  # fmt: skip
    """Return a step's rows, what it tells, its seconds, and those after the first forward pass."""
    # Of the whole strategy only its step is measured: any model that can be cut will do for it.
    small = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    strategy = method(model=small, cut="0", **arguments)
    strategy.begin_run()
    round_ = SimpleNamespace(
        plan=SimpleNamespace(server_round=1, num_rounds=1, lr=1e-4, seed=0),
        entry=RoundEntry(1), clients=SimpleNamespace(clock=None),
        record_loss=lambda *_: None, record_metrics=lambda _: None,
    )  # fmt: skip
    settings = StepSettings("equal", "mean", pools=True)
    segment.first_forward = None
    started = time.process_time()
    step = Step(method.__name__, segment, settings, round_, 0, 1, batches)
    strategy.step(step)
    ended = time.process_time()
    assert segment.first_forward is not None
    told = step.end(replies_expected=True)
    return round_.entry.rows, told, ended - started, ended - segment.first_forward


def downlink(told: dict[str, Backward]) -> int:
    """Return the logical bytes of the step's cut-layer gradients."""
    unicast = broadcast = 0
    for backward in told.values():
        unicast += backward.gradient.nbytes - backward.shared_bytes
        broadcast = max(broadcast, backward.broadcast_bytes)
    return unicast + broadcast


if __name__ == "__main__":
    main()
