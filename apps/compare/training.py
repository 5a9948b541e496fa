"""One run of one method, over LocalGrid."""

import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from measured import SIMULATED, count_server_cpu, measured
from method import Rates
from methods import METHODS
from simulated import fedavg_seconds
from task import CUT, Parts, build_model, partition
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.seeds import generator, seeded
from flsplit.wireless import Training

MOMENTUM = partial(SGD, momentum=0.9)


@dataclass(frozen=True)
class Setting:
    """What all methods have in common; runs of full length are timed on the fleet, if any."""

    dataset: str
    data_dir: str
    clients: int
    rounds: int
    local_steps: int
    batch_size: int
    train_size: int
    test_size: int
    fleet: str = ""

    def rounds_of(self, *, tuning: bool) -> int:
        """Return how many rounds a run has: for tuning a fifth."""
        return max(self.rounds // 5, 1) if tuning else self.rounds

    def parts(self, alpha: float, seed: int) -> Parts:
        """Return the clients' data."""
        return partition(
            self.dataset, self.data_dir, self.clients, alpha, seed, self.train_size,
            self.test_size, self.batch_size,
        )  # fmt: skip


def train(
    setting: Setting, method: str, rates: Rates, alpha: float, seed: int, *, tuning: bool
) -> dict[str, Any]:
    """Train with one method and return what came of it, round by round.

    Tuning takes fewer rounds and judges on validation data.
    """
    rounds = setting.rounds_of(tuning=tuning)
    parts = setting.parts(alpha, seed)
    judged = parts.validation if tuning else parts.test
    with seeded(seed):
        model = build_model(setting.dataset)
    started = time.process_time()
    run = _train_whole if METHODS[method].make is None else _train_split
    if tuning:
        setting = replace(setting, fleet="")
    found = run(setting, method, rates, seed, rounds, parts.train, judged, model)
    return found | {"cpu-seconds": time.process_time() - started}


def _train_split(
    setting: Setting, method: str, rates: Rates, seed: int, rounds: int,
    trained: list[TensorDataset], judged: list[TensorDataset], model: torch.nn.Module,
) -> dict[str, Any]:  # fmt: skip
    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        index = int(context.node_config["partition-id"])
        return trained[index], judged[index]

    app = client_app(
        model=lambda: build_model(setting.dataset), cut=CUT, data=data, optimizer=MOMENTUM,
        device="cpu", auxiliary=METHODS[method].auxiliary,
    )  # fmt: skip
    make = METHODS[method].make
    assert make is not None
    strategy = make(
        model=model, cut=CUT, server_optimizer=MOMENTUM, batch_size=setting.batch_size,
        local_steps=setting.local_steps, drop_last=True, seed=seed, device="cpu",
        fleet=setting.fleet, **rates,
    )  # fmt: skip
    spent = count_server_cpu(strategy)
    result = strategy.start(
        grid=LocalGrid(app, setting.clients, progress=False),
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=rounds,
    )
    return measured(result.history, spent, setting.clients)


def _train_whole(
    setting: Setting, method: str, rates: Rates, seed: int, rounds: int,
    trained: list[TensorDataset], judged: list[TensorDataset], model: torch.nn.Module,
) -> dict[str, Any]:  # fmt: skip
    """Train the unsplit model with Flower's FedAvg: the same mini-batches in the same order."""
    app, kept = ClientApp(), {}

    def mine(context: Context) -> tuple[int, torch.nn.Module, torch.optim.Optimizer]:
        index = int(context.node_config["partition-id"])
        if index not in kept:
            own = copy.deepcopy(model)
            kept[index] = own, MOMENTUM(own.parameters(), lr=rates["client_lr"])
        return index, *kept[index]

    @app.train()
    def train_handler(message: Message, context: Context) -> Message:
        index, own, optimizer = mine(context)
        own.load_state_dict(message.content["arrays"].to_torch_state_dict())
        own.train()
        first = (int(message.content["config"]["server-round"]) - 1) * setting.local_steps
        for position in range(first, first + setting.local_steps):
            inputs, labels = batch_at(trained[index], str(index), position, setting, seed)
            optimizer.zero_grad()
            functional.cross_entropy(own(inputs), labels).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(trained[index])})
        content = RecordDict({"arrays": ArrayRecord(own.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    @torch.no_grad()
    def evaluate_handler(message: Message, context: Context) -> Message:
        index, own, _ = mine(context)
        own.load_state_dict(message.content["arrays"].to_torch_state_dict())
        own.eval()
        inputs, labels = judged[index].tensors
        correct = float((own(inputs).argmax(1) == labels).float().mean())
        metrics = MetricRecord({"accuracy": correct, "num-examples": len(labels)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    result = FedAvg().start(
        grid=LocalGrid(app, setting.clients, progress=False),
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord(),
    )
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) * setting.clients
    evaluations = result.evaluate_metrics_clientapp
    return {
        "accuracy": [float(evaluations[r]["accuracy"]) for r in range(1, rounds + 1)],
        "bytes": [2 * size * r for r in range(1, rounds + 1)],
        "up": size * rounds,
        "down": size * rounds,
        "gradients-down": 0,
        "rows": 0,
        "server-seconds": [0.0] * rounds,
        "metrics": {},
        **_simulated(setting, model, trained[0], rounds),
    }


def _simulated(
    setting: Setting, model: torch.nn.Module, data: TensorDataset, rounds: int
) -> dict[str, Any]:
    """Return the seconds at the end of each round on the fleet; all rounds are alike."""
    if not setting.fleet:
        return {}
    training = Training(batch_size=setting.batch_size, steps=setting.local_steps)
    inputs = tuple(data.tensors[0].shape[1:])
    seconds = fedavg_seconds(setting.fleet, model, inputs, training)
    return {SIMULATED: [seconds * r for r in range(1, rounds + 1)]}


def batch_at(
    data: TensorDataset, name: str, position: int, setting: Setting, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mini-batch that a split client has at this position."""
    epoch, index = divmod(position, len(data) // setting.batch_size)
    order = torch.randperm(len(data), generator=generator(seed, "data", name, epoch))
    chosen = order[index * setting.batch_size : (index + 1) * setting.batch_size]
    inputs, labels = data.tensors
    return inputs[chosen], labels[chosen]
