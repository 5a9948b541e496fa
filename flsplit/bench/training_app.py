"""The app that measures training: a split ClientApp, and one server step on all clients' rows."""

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, UserConfig
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp
from torch.optim import Optimizer

from flsplit.app import client_app as split_client_app
from flsplit.bench import workload
from flsplit.message.types import STEP
from flsplit.run import ParallelStrategy, Step

WARM_UP = 5  # steps that are not counted
MEMORY_EVERY = 100  # steps

# The keys of the run config and their defaults.
CONFIG: UserConfig = {
    "workload": workload.IMAGES,
    "steps": 1,
    "clients": 1,
    "output": "",
    "memory-dir": "",
    "torch-threads": 1,
}


def client_app() -> ClientApp:
    """Return the ClientApp."""
    return split_client_app(
        model=workload.build_model,
        cut=workload.CUT,
        data=workload.load_partition,
        optimizer=torch.optim.Adam,
        mods=[write_memory],
    )


def server_app() -> ServerApp:
    """Return the ServerApp; it writes what the steps took to the file ``output``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config: Any = context.run_config
        torch.set_num_threads(1)
        watch = train(grid, config)
        measured = {
            "seconds": watch.seconds(),
            "memory": watch.memory,
            "ended": time.time(),
            "peak": most_resident_bytes(),
        }
        Path(config["output"]).write_text(json.dumps(measured))

    return app


class PooledSteps(ParallelStrategy):
    """One pass and one optimizer step on all clients' rows: what is measured."""

    def step(self, step: Step) -> None:
        """Do it."""
        found = step.gradients()
        step.update(found)
        step.reply(found.cut_gradients)


class Stopwatch:
    """Notes when the server's optimizer steps, which it does once in a step of the method.

    With ``memory``, this process's memory is noted on the way, as steps done and bytes.
    """

    def __init__(self, *, memory: bool = False) -> None:
        self._with_memory = memory
        self._times: list[float] = []
        self.memory: list[tuple[int, int]] = []

    def adam(self, parameters: Any, lr: float) -> Optimizer:
        """Return an optimizer whose steps are noted."""
        optimizer = torch.optim.Adam(parameters, lr=lr)
        optimizer.register_step_pre_hook(self.note)
        return optimizer

    def note(self, *_hooked: object) -> None:
        """Note the time."""
        if self._with_memory and len(self._times) % MEMORY_EVERY == 0:
            self.memory.append((len(self._times), resident_bytes()))
        self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from step to step, without the warm-up."""
        times = self._times[WARM_UP - 1 :]
        return [after - before for before, after in itertools.pairwise(times)]


def train(grid: Grid, config: Mapping[str, Any]) -> Stopwatch:
    """Train as the run config says, and return when the steps were done."""
    watch = Stopwatch(memory=bool(config["memory-dir"]))
    torch.manual_seed(0)
    model = workload.network(config["workload"])
    strategy = PooledSteps(
        model=model,
        cut=workload.CUT,
        server_lr=workload.LR,
        server_optimizer=watch.adam,
        batch_size=workload.BATCH_SIZE,
        local_steps=config["steps"] + WARM_UP,
        drop_last=True,
        fraction_evaluate=0.0,
        min_available_nodes=config["clients"],
        min_train_nodes=config["clients"],
        device="cpu",
        carrier="session",
    )
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1)
    return watch


def write_memory(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let a host write its memory to a file every hundred steps, where the run config says so."""
    reply = call_next(message, context)
    folder = context.run_config["memory-dir"]
    if folder and message.metadata.message_type == STEP:
        step: Any = message.content.config_records["step"]["step"]
        if step % MEMORY_EVERY == 0:
            with (Path(str(folder)) / f"host-{os.getpid()}").open("a") as file:
                file.write(f"{step} {resident_bytes()}\n")
    return reply


def resident_bytes() -> int:
    """Return the memory that this process takes; where that can't be told, the most it took."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return most_resident_bytes()


def most_resident_bytes() -> int:
    """Return the most memory that this process took."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
