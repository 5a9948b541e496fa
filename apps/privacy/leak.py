"""One run, and what its server can find out."""

import logging
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from rows import ROWS
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.client_parts import describe_parts
from flsplit.cut import split
from flsplit.errors import ConfigError
from flsplit.privacy import (
    Record,
    RecordedStep,
    Smashing,
    attack_labels,
    dcor_unbiased,
    distance_correlation,
    epsilon,
    invert,
    mutual_information,
    nearest_membership,
    read_recording,
    reconstruct,
    simulate,
)
from flsplit.seeds import seeded
from flsplit.vision import load_torchvision

CUTS = ("conv1", "conv2")
SECOND_CUT = "head.2"  # of the U-shaped split: clients have the last dense layer
CLIENTS = 5
MOMENTUM = {"momentum": 0.9}
DELTA = 1e-5


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes
    ----------
    examples : int
        Training examples of each client.
    steps, rounds : int
        Steps of a round, and rounds.
    batch_size : int
        Rows of a client's mini-batch.
    known : int
        Images that the attacker has of its own.
    epochs : int
        Over which its decoder is trained.
    tests : int
        Test images for accuracy.
    """

    examples: int = 400
    steps: int = 25
    rounds: int = 4
    batch_size: int = 16
    known: int = 800
    epochs: int = 8
    tests: int = 1000


QUICK_SIZE = Size(rounds=3, known=500, epochs=4, tests=500)


@lru_cache
def load(data_dir: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return MNIST: images of bytes and labels, for training and for tests."""
    found: list[Tensor] = []
    for train in (True, False):
        kind = load_torchvision().datasets.MNIST
        try:
            part = kind(root=data_dir, train=train, download=False)
        except RuntimeError as error:
            raise SystemExit(f"--data-dir={data_dir!r} has no MNIST: {error}") from error
        found += [part.data.unsqueeze(1), part.targets]
    return found[0], found[1], found[2], found[3]


def build_model() -> nn.Module:
    """Return a small network; clients compute up to ``conv1`` or up to ``conv2``."""
    layers = {
        "conv1": [nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.GroupNorm(4, 8), nn.ReLU()],
        "conv2": [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU()],
        "head": [nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)],
    }
    return nn.Sequential(OrderedDict((k, nn.Sequential(*one)) for k, one in layers.items()))


def run(name: str, cut: str, seed: int, size: Size, data_dir: str) -> dict[str, Any]:
    """Train one row of the table, attack it, and return the numbers."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    images, labels, test_images, test_labels = load(data_dir)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    own, known = order[: CLIENTS * size.examples], order[-size.known :]
    parts = [TensorDataset(images[i] / 255, labels[i]) for i in own.chunk(CLIENTS)]
    tests = [
        TensorDataset(test_images[i] / 255, test_labels[i])
        for i in torch.arange(size.tests).chunk(CLIENTS)
    ]
    if ROWS[name].keeps_labels:
        cut = f"{cut},{SECOND_CUT}"
    loss = Remembering()
    with TemporaryDirectory(prefix="leak-") as folder:
        record = Record(Path(folder) / "run", steps=size.steps, every=size.rounds)
        found, strategy = _train(name, cut, seed, size, parts, tests, record, loss)
        defence = describe_parts(strategy.options.client_parts)
        found |= _attack(
            record, defence, cut, seed, size, parts[0].tensors[0], images[known] / 255, loss
        )
        if loss.labels:
            last = _last_steps(record, size)
            truth = torch.cat([loss.of(one, size.steps) for one in last])
            found["label-simulated"] = simulated_labels(
                strategy.server.module, last, truth, (images[known] / 255, labels[known]),
                cut, seed=seed,
            )  # fmt: skip
    return found


class Remembering:
    """A loss that remembers the labels of training, which judge what is inferred of them."""

    def __init__(self) -> None:
        self.labels: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        if logits.requires_grad:
            self.labels.append(labels)
        return functional.cross_entropy(logits, labels)

    def of(self, step: RecordedStep, steps: int) -> Tensor:
        """Return the labels of a step: clients take theirs one after the other."""
        exchange = (step.round - 1) * steps + step.step
        return self.labels[exchange * CLIENTS + int(step.client)]


def _train(
    name: str,
    cut: str,
    seed: int,
    size: Size,
    parts: list[TensorDataset],
    tests: list[TensorDataset],
    record: Record,
    loss: Remembering,
) -> tuple[dict[str, Any], Any]:
    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        index = int(context.node_config["partition-id"])
        return parts[index], tests[index]

    with seeded(seed):
        model = build_model()
    row, optimizer = ROWS[name], partial(SGD, **MOMENTUM)
    defence = list(row.parts())
    app = client_app(
        model=build_model, cut=cut, data=data, optimizer=optimizer, device="cpu",
        loss=loss if row.keeps_labels else None,
    )  # fmt: skip
    strategy = row.make(
        model=model, cut=cut, server_optimizer=optimizer, batch_size=size.batch_size,
        local_steps=size.steps, drop_last=True, seed=seed, device="cpu", callbacks=[record],
        client_parts=defence, share_client_segments=True, evaluate_batch_size=size.tests,
        **row.options,
    )  # fmt: skip
    result = strategy.start(
        grid=LocalGrid(app, CLIENTS, progress=False),
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=size.rounds,
    )
    ways = {
        "up": ("activations-up", "output-gradients-up"),
        "down": ("gradients-down-unicast", "gradients-down-broadcast", "outputs-down"),
    }
    found = {"accuracy": result.history[-1].evaluation["accuracy"]} | {
        way: sum(one.traffic.logical[name] for one in result.history for name in names)
        for way, names in ways.items()
    }
    try:
        found["epsilon"] = epsilon(
            defence, releases=size.steps * size.rounds, delta=DELTA, batch_size=size.batch_size
        )
    except ConfigError:  # no noise, or no accountant
        found["epsilon"] = None
    return found, strategy


def _attack(
    record: Record,
    defence: str,
    cut: str,
    seed: int,
    size: Size,
    private: Tensor,
    known: Tensor,
    loss: Remembering,
) -> dict[str, Any]:
    recording = read_recording(record.folder)
    segment = split(build_model(), cut, private[:2]).client
    segment.load_state_dict(recording.segments["0"])
    smash = Smashing(segment, defence, "0", seed=seed)
    hidden, seen = smash(private), smash(known)
    made = reconstruct((seen, known), (hidden, private), epochs=size.epochs, seed=seed)
    found = {
        "mse": made.mse,
        "explained": made.explained,
        "ssim": made.ssim,
        "cross-entropy": made.cross_entropy,
        "floor": made.floor,
        "dcor": float(distance_correlation(private, hidden)),
        "dcor-unbiased": dcor_unbiased(private, hidden),
        "mutual-information": mutual_information(private, hidden),
    }
    steps = [one.smashed for one in recording.of("0") if one.smashed is not None]
    found["membership"] = nearest_membership(hidden, seen[: len(hidden)], torch.cat(steps))
    last = _last_steps(record, size)
    try:
        truth = (lambda step: loss.of(step, size.steps)) if loss.labels else None
        found |= attack_labels(replace(recording, steps=last), truth)
    except ConfigError:  # no gradients go down
        found["label-clusters"] = None
    if seed == 0:
        found["pictures"] = _bytes(made.pictures[:8])
        found["originals"] = _bytes(private[:8])
        if not defence and cut == CUTS[0]:  # an attacker without data, and without weights
            blind = invert(
                hidden[:8],
                lambda: split(build_model(), cut, private[:2]).client,
                tuple(private.shape[1:]),
                rounds=8,
                input_steps=25,
                segment_steps=25,
            )
            found["inverted"] = _bytes(blind)
            found["inverted-mse"] = float((blind - private[:8]).square().mean())
    return found


def _last_steps(record: Record, size: Size) -> list[RecordedStep]:
    steps = read_recording(record.folder).of("0")
    return [one for one in steps if one.round == size.rounds]


def simulated_labels(
    server: nn.Module,
    steps: list[RecordedStep],
    truth: Tensor,
    known: tuple[Tensor, Tensor],
    cut: str,
    *,
    seed: int,
    attack_steps: int = 600,
    adversarial: float = 0.05,
) -> float:
    """Return the share of the labels of recorded steps that a simulated client finds (SDAR)."""
    smashed = torch.cat([one.smashed for one in steps if one.smashed is not None])
    layers = CUTS.index(cut.partition(",")[0]) + 1
    made = simulate(
        server, smashed, known, client=lambda: nn.Sequential(*build_model()[:layers]),
        tail=lambda: nn.Linear(64, 10), steps=attack_steps, adversarial=adversarial, seed=seed,
    )  # fmt: skip
    return float((made.labels(smashed) == truth).float().mean())


def _bytes(pictures: Tensor) -> list[list[list[int]]]:
    """Return grey pictures as numbers from 0 to 255."""
    whole: list[list[list[int]]] = (pictures[:, 0].clamp(0, 1) * 255).round().int().tolist()
    return whole
