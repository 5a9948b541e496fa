"""One run of one method, over LocalGrid."""

import copy
import hashlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dealing import Parts, parts_of
from everyone import Everyone
from experiment import Experiment, call
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from measured import SIMULATED, by_client, count_server_cpu, measured
from methods import Method, as_options, find_method
from simulated import fedavg_seconds
from sources import digest, find_experiment
from torch import nn
from tuning import Rates

from flsplit import LocalGrid, client_app
from flsplit.client.spec import pick_device
from flsplit.errors import FlsplitError
from flsplit.losses import is_plain_cross_entropy
from flsplit.nested import to_device
from flsplit.seeds import generator, seeded
from flsplit.wireless import Training

REHEARSAL, SCREENING, DECIDING, FINAL = "rehearsal", "screening", "deciding", "final"
TEST_BATCH = 512


@dataclass(frozen=True)
class Setting:
    """What all methods have in common; runs of full length are timed on the fleet, if any."""

    dataset: str
    data_dir: str
    clients: int
    rounds: int
    local_steps: int
    batch_size: int
    train_size: int = 0
    test_size: int = 0
    shares: str = "examples"
    device: str = "cpu"
    fleet: str = ""
    checkpoints: str = ""

    def rounds_of(self, kind: str) -> int:
        """Return how many rounds a run has: a quarter to screen rates, half to decide."""
        part = {SCREENING: self.rounds // 4, DECIDING: self.rounds // 2, FINAL: self.rounds}
        return max(part.get(kind, 1), 1)

    def experiment(self) -> Experiment:
        """Return model, cut, data and metrics."""
        return find_experiment(self.dataset, self.data_dir)

    def parts(self, partition: str, seed: int) -> Parts:
        """Return the clients' data."""
        return parts_of(
            self.dataset, self.data_dir, self.clients, partition, seed, self.train_size,
            self.test_size, self.batch_size,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Return what runs must have in common to be compared; where files lie is no part of it."""
        places = ("data_dir", "fleet", "device", "checkpoints")
        kept = {name: value for name, value in vars(self).items() if name not in places}
        found = digest(self.dataset)
        kept["dataset"] = Path(self.dataset).name
        return kept | ({"dataset-digest": found} if found else {})


@dataclass(frozen=True)
class Task:
    """A run to be done: everything that it needs."""

    setting: Setting
    method: Method
    rates: Rates
    seed: int
    rounds: int
    local_steps: int
    parts: Parts
    judged: Any  # the test or validation examples
    fleet: str = ""
    checkpoints: Path | None = None


def train(
    setting: Setting, method: str, rates: Rates, partition: str, seed: int, kind: str
) -> dict[str, Any]:
    """Train with one method and return what came of it, round by round.

    Tuning judges on validation data. A rehearsal is one step, which shows what doesn't fit.
    """
    parts = setting.parts(partition, seed)
    steps = 1 if kind == REHEARSAL else setting.local_steps
    found, rounds = find_method(method), setting.rounds_of(kind)
    task = Task(setting, found, rates, seed, rounds, steps, parts, parts.validation)
    if kind in (FINAL, REHEARSAL):
        task = replace(task, fleet=setting.fleet)
    if kind == FINAL:
        key = repr((method, rates, partition, seed, setting.identity()))
        folder = Path(setting.checkpoints) / hashlib.sha256(key.encode()).hexdigest()[:16]
        checkpoints = folder if setting.checkpoints else None
        task = replace(task, judged=parts.test, checkpoints=checkpoints)
    with seeded(seed):
        model = setting.experiment().model()
    started = time.process_time()
    result = _train_split(task, model) if found.strategy else _train_whole(task, model)
    return result | {"cpu-seconds": time.process_time() - started}


def _train_split(task: Task, model: nn.Module) -> dict[str, Any]:
    experiment, setting, method = task.setting.experiment(), task.setting, task.method

    def data(context: Context) -> tuple[Any, Any]:
        return task.parts.train[int(context.node_config["partition-id"])], task.judged

    loss = None if is_plain_cross_entropy(experiment.loss) else experiment.loss
    app = client_app(
        model=experiment.model, cut=experiment.cut, data=data, optimizer=experiment.optimizer,
        device=setting.device, auxiliary=method.auxiliary, unpack=experiment.unpack, loss=loss,
        share=experiment.share,
    )  # fmt: skip
    example, _ = experiment.examples(task.parts.train[0]).batch(range(2))
    # Where all clients have the same model, one of them evaluates it.
    one: dict[str, Any] = {"fraction_evaluate": 1e-9} if method.shares_clients else {}
    models = 1 if method.shares_clients else setting.clients
    folder, clients_dir = task.checkpoints, None
    if folder:
        clients_dir, server_dir = folder / "clients", folder / "server"
        one |= {"checkpoint_dir": str(server_dir), "resume": server_dir.is_dir()}
    strategy = method.make(
        task.rates, model=model, cut=experiment.cut, example=example, share=experiment.share,
        server_optimizer=experiment.optimizer, loss=experiment.loss,
        batch_size=setting.batch_size, local_steps=task.local_steps, drop_last=True,
        seed=task.seed, device=setting.device, fleet=task.fleet, shares=setting.shares,
        evaluate_batch_size=TEST_BATCH,
        metrics={**experiment.metrics, "each": Everyone(task.parts.shares, models)}, **one,
    )  # fmt: skip
    spent = count_server_cpu(strategy)
    result = strategy.start(
        grid=LocalGrid(app, setting.clients, progress=False, state_dir=clients_dir),
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=task.rounds,
    )
    if folder:
        shutil.rmtree(folder)
    if lost := [one for entry in result.history for one in entry.left_out]:
        raise FlsplitError(f"client {lost[0].client} was left out: {lost[0].reason}")
    names = list(experiment.metrics)
    reduction = getattr(strategy, "loss_reduction", strategy.options.reduction)  # GAPSL's own
    auxiliary = getattr(strategy, "initial", {})  # a decoupled method's
    return measured(result.history, spent, names) | {
        "auxiliary-bytes": sum(tensor.nbytes for tensor in auxiliary.values()),
        "weights": f"{strategy.options.shares}, {reduction}",
    }


def _train_whole(task: Task, model: nn.Module) -> dict[str, Any]:
    """Train the unsplit model with Flower's FedAvg: the same mini-batches in the same order."""
    experiment, setting, app, kept = task.setting.experiment(), task.setting, ClientApp(), {}
    failed: list[Exception] = []  # Flower's FedAvg goes on without a client that fails
    rate = as_options(task.rates)["client_lr"]
    device = pick_device(setting.device)

    @app.train()
    def train_handler(message: Message, context: Context) -> Message:
        try:
            return train_locally(message, context)
        except Exception as error:
            failed.append(error)
            raise

    def train_locally(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        if index not in kept:
            own = copy.deepcopy(model).to(device)
            kept[index] = own, experiment.optimizer(own.parameters(), lr=rate)
        own, optimizer = kept[index]
        own.load_state_dict(message.content["arrays"].to_torch_state_dict())
        own.train()
        first = (int(message.content["config"]["server-round"]) - 1) * task.local_steps
        for position in range(first, first + task.local_steps):
            inputs, labels = to_device(batch_at(task, index, position), device)
            optimizer.zero_grad()
            loss = experiment.loss(call(own, inputs), labels)
            if not torch.isfinite(loss):
                raise ArithmeticError(f"the loss of client {index} is {float(loss)}")
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(task.parts.train[index])})
        content = RecordDict({"arrays": ArrayRecord(own.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    @torch.no_grad()
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if not server_round:
            return None
        own = copy.deepcopy(model).to(device).eval()
        own.load_state_dict(arrays.to_torch_state_dict())
        scores = {**copy.deepcopy(dict(experiment.metrics)), "each": Everyone(task.parts.shares, 1)}
        examples = experiment.examples(task.judged, "test")
        for start in range(0, len(examples), TEST_BATCH):
            batch = examples.batch(range(start, min(start + TEST_BATCH, len(examples))))
            inputs, labels = to_device(batch, device)
            logits = call(own, inputs)
            for score in scores.values():
                score.to(device).update(logits, labels)
        return MetricRecord(_numbers({name: one.compute() for name, one in scores.items()}))

    result = FedAvg(fraction_evaluate=0.0).start(
        grid=LocalGrid(app, setting.clients, progress=False),
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=task.rounds,
        train_config=ConfigRecord(),
        evaluate_fn=evaluate,
    )
    if failed:
        raise failed[0]
    rounds = range(1, task.rounds + 1)
    evaluations = [dict(result.evaluate_metrics_serverapp[r]) for r in rounds]
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) * setting.clients
    return by_client(evaluations, list(experiment.metrics)) | {
        "bytes": [2 * size * r for r in rounds],
        "up": size * task.rounds,
        "down": size * task.rounds,
        "gradients-down": 0,
        "rows": 0,
        "server-seconds": [0.0] * task.rounds,
        "metrics": {},
        "weights": "examples",
        **_simulated(task, model),
    }


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return scores as `flsplit` names them: one number each."""
    found: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            found |= _numbers({f"{name}/{key}": one for key, one in value.items()})
        elif value.ndim:
            found |= _numbers({f"{name}/{index}": one for index, one in enumerate(value)})
        else:
            found[name] = float(value)
    return found


def _simulated(task: Task, model: nn.Module) -> dict[str, Any]:
    """Return the seconds at the end of each round on the fleet; all rounds are alike."""
    if not task.fleet:
        return {}
    training = Training(batch_size=task.setting.batch_size, steps=task.local_steps)
    inputs, _ = task.setting.experiment().examples(task.parts.train[0]).batch([0])
    seconds = fedavg_seconds(task.fleet, model, tuple(inputs.shape[1:]), training)
    return {SIMULATED: [seconds * r for r in range(1, task.rounds + 1)]}


def batch_at(task: Task, client: int, position: int) -> tuple[Any, Any]:
    """Return the mini-batch that a split client has at this position."""
    data, size = task.parts.train[client], task.setting.batch_size
    epoch, index = divmod(position, len(data) // size)
    order = torch.randperm(len(data), generator=generator(task.seed, "data", str(client), epoch))
    chosen = order[index * size : (index + 1) * size].tolist()
    return task.setting.experiment().examples(data).batch(chosen)
