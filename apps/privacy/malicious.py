"""What servers find that do more than look: FSHA, which drives its clients, and SDAR on a U-shape.

    python apps/privacy/malicious.py --data-dir /path/to/data

Prints a line of each attack and seed, and of what it is to be compared with.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from flwr.app import ArrayRecord
from leak import (
    CLIENTS,
    MOMENTUM,
    SECOND_CUT,
    Remembering,
    build_model,
    load,
    simulated_labels,
)
from torch import Tensor
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.client_parts import ClientPart, Clip, Int8, LabelNoise, Noise, NoPeek
from flsplit.cut import split
from flsplit.privacy import (
    Hijack,
    Record,
    attack_labels,
    read_recording,
    reconstruct,
)
from flsplit.run.step import Step
from flsplit.seeds import seeded
from flsplit.strategies import PSL

CUT = "conv2"
RATE = 1e-3
ATTACKS = ["fsha", "fsha-sgd", "fsha-hindered", "sdar"]
STEPS = 100  # of a round, in which the segment's gain is averaged


HINDRANCES: dict[str, dict[str, Any]] = {
    "undefended": {},
    "5 clients": {"clients": 5},
    "int8 both ways": {"defence": [Int8(), Int8("cut-gradient")]},
    "NoPeek 10": {"defence": [NoPeek(10.0)]},
    "clip 10, noise 0.5": {"defence": [Clip(10.0), Noise(0.5)]},
    "clip 10, noise 2": {"defence": [Clip(10.0), Noise(2.0)]},
}
"""What is between hijacker and client, beside the same client undefended."""


class Judged(Hijack):
    """Records how much of the clients' inputs comes out; labels say which inputs they are."""

    private: Tensor

    def step(self, step: Step) -> None:
        """Attack, and judge what was seen."""
        guess = self.public.mean(0)
        errors, guesses = 0.0, 0.0
        for batch in step.batches:
            truth = self.private[batch.labels]
            found = self.reconstruct(batch.tensor).clamp(0, 1)
            errors += float(functional.mse_loss(found, truth))
            guesses += float(functional.mse_loss(guess.expand_as(truth), truth))
        step.record({"explained": 1 - errors / guesses})
        super().step(step)


def hijacking(
    private: Tensor,
    public: Tensor,
    *,
    rounds: int,
    seed: int,
    optimizer: Callable[..., Any] = Adam,
    client_lr: float = RATE,
    steps: int = STEPS,
    warm_up: int = 1000,
    defence: Sequence[ClientPart] = (),
    clients: int = 1,
) -> list[float]:
    """Return the share of private images' variance that the hijacker finds, round by round."""
    parts = [TensorDataset(private[i], i) for i in torch.arange(len(private)).chunk(clients)]
    with seeded(seed + 1000):  # the attacker doesn't use that it gave clients their weights
        pilot = split(build_model(), CUT, private[:2]).client
    with seeded(seed):
        model = build_model()
    strategy = Judged(
        model=model, cut=CUT, public=public, pilot=pilot, client_lr=client_lr, batch_size=32,
        warm_up=warm_up, local_steps=steps, drop_last=True, seed=seed, device="cpu",
        fraction_evaluate=0.0, client_parts=defence,
    )  # fmt: skip
    strategy.private = private
    app = client_app(
        model=build_model, cut=CUT, optimizer=optimizer, device="cpu",
        data=lambda context: parts[int(context.node_config["partition-id"])],
    )  # fmt: skip
    grid = LocalGrid(app, clients, progress=False)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)
    return [entry.metrics["explained"] for entry in result.history]


def known_weights(private: Tensor, public: Tensor, seed: int) -> float:
    """Return what is found if clients stay as they began: a server knows, and sends no gradient."""
    with seeded(seed):
        segment = split(build_model(), CUT, private[:2]).client.eval()
    with torch.no_grad():
        known, seen = segment(public), segment(private)
    return reconstruct((known, public), (seen, private), epochs=8, seed=seed).explained


def simulating(
    parts: list[TensorDataset],
    known: tuple[Tensor, Tensor],
    *,
    seed: int,
    defence: list[ClientPart],
    rounds: int = 4,
    steps: int = 25,
    attack_steps: int = 600,
) -> dict[str, float]:
    """Return the shares of client 0's labels that clustering and SDAR find after a U-shaped run."""
    cut, loss = f"{CUT},{SECOND_CUT}", Remembering()
    with seeded(seed):
        model = build_model()
    app = client_app(
        model=build_model, cut=cut, loss=loss, optimizer=partial(SGD, **MOMENTUM), device="cpu",
        data=lambda context: parts[int(context.node_config["partition-id"])],
    )  # fmt: skip
    with TemporaryDirectory(prefix="leak-") as folder:
        record = Record(Path(folder) / "run", steps=steps, every=rounds)
        strategy = PSL(
            model=model, cut=cut, server_optimizer=partial(SGD, **MOMENTUM), server_lr=0.05,
            client_lr=0.05, batch_size=16, local_steps=steps, drop_last=True, seed=seed,
            device="cpu", callbacks=[record], client_parts=defence, fraction_evaluate=0.0,
        )  # fmt: skip
        grid = LocalGrid(app, CLIENTS, progress=False)
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)
        recording = read_recording(record.folder)
    last = [one for one in recording.of("0") if one.round == rounds and one.smashed is not None]
    truth = torch.cat([loss.of(one, steps) for one in last])
    found = {"guess": float(torch.bincount(truth).max()) / len(truth)}
    recording.steps[:] = last
    found["clusters"] = attack_labels(recording, lambda one: loss.of(one, steps))["label-clusters"]
    for name, adversarial in {"sdar": 0.05, "without its critic": 0.0}.items():
        found[name] = simulated_labels(
            strategy.server.module, last, truth, known, cut, seed=seed,
            attack_steps=attack_steps, adversarial=adversarial,
        )  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the attacks and print what they find; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="where torchvision's MNIST lies")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=30, help=f"of {STEPS} steps, of FSHA")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    images, labels, _, _ = load(options.data_dir)
    for seed in options.seeds:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        own, known = order[:2000], order[-2000:]
        private, public = images[own] / 255, images[known] / 255
        attacks = options.attacks or ATTACKS
        if "fsha" in attacks or "fsha-sgd" in attacks:
            found = known_weights(private[:400], public[:800], seed)
            print(f"seed {seed}: known weights, no gradient: explained {found:.3f}", flush=True)
        kinds = {"fsha": (Adam, RATE), "fsha-sgd": (partial(SGD, **MOMENTUM), 0.002)}
        for name, (optimizer, lr) in kinds.items():
            if name in attacks:
                course = hijacking(
                    private, public, rounds=options.rounds, seed=seed, optimizer=optimizer,
                    client_lr=lr,
                )  # fmt: skip
                shown = " ".join(f"{one:.2f}" for one in course)
                print(f"seed {seed}: {name}: explained by round: {shown}", flush=True)
        for name, hindered in HINDRANCES.items():
            if "fsha-hindered" in attacks:
                course = hijacking(private, public, rounds=options.rounds, seed=seed, **hindered)
                shown = " ".join(f"{one:.2f}" for one in course)
                print(f"seed {seed}: fsha, {name}: explained by round: {shown}", flush=True)
        if "sdar" in attacks:
            parts = [TensorDataset(images[i] / 255, labels[i]) for i in own.chunk(CLIENTS)]
            few = known[:800]
            for title, defence in {
                "plain": [], "noise on what goes up": [LabelNoise(1.0, False, "output-gradient")],
            }.items():  # fmt: skip
                numbers = simulating(
                    parts, (images[few] / 255, labels[few]), seed=seed, defence=list(defence)
                )
                shown = ", ".join(f"{name} {one:.3f}" for name, one in numbers.items())
                print(f"seed {seed}: U-shape, {title}: labels found: {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
