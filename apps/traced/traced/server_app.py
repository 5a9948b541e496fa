"""The server: FSL-SAGE that notes when it works, and when uploads arrive."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flsplit.message.steps import FinishReply
from flsplit.run import Round, Step
from flsplit.strategies import FSLSAGE
from traced.task import CUT, build_model
from traced.trace import Arrivals, Trace

app = ServerApp()


class TracedFSLSAGE(FSLSAGE):
    """FSL-SAGE with a trace of its rounds, alignments and server steps."""

    def __init__(self, trace: Trace, **options: Any) -> None:
        self._trace = trace
        super().__init__(**options)

    def train_round(self, round_: Round) -> dict[str, FinishReply]:
        """Train a round, and note when."""
        self._round, began = round_.plan.server_round, time.monotonic()
        finished = super().train_round(round_)
        self._trace.add("round", self._round, began)
        return finished

    def before_local_steps(self, round_: Round, names: list[str]) -> None:
        """Align, and note when."""
        began = time.monotonic()
        super().before_local_steps(round_, names)
        self._trace.add("alignment", self._round, began)

    def step(self, step: Step) -> None:
        """Do the server's step, which ends when the upload is in the buffer, and note when."""
        began = time.monotonic()
        super().step(step)
        [client] = step.clients
        self._trace.add("server", self._round, began, client=client, step=step.index)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and write down what came of it."""
    config: Mapping[str, Any] = context.run_config
    folder = Path(config["trace-dir"])
    torch.set_num_threads(int(config["torch-threads"]))
    torch.manual_seed(0)
    model = build_model(context)
    strategy = TracedFSLSAGE(
        Trace(folder / "server.jsonl"),
        model=model,
        cut=CUT,
        server_optimizer=torch.optim.Adam,
        server_lr=0.001,
        local_steps=int(config["local-steps"]),
        upload_every=int(config["upload-every"]),
        align_every=int(config["align-every"]),
        align="before_round",  # where nothing can overlap with it
        align_epochs=int(config["align-epochs"]),
        buffer_size=int(config["buffer-size"]),
        overlap=bool(config["overlap"]),
        drop_last=True,
        fraction_evaluate=0.0,
        min_available_nodes=2,
        carrier=str(config["carrier"]),
        device="cpu",
    )
    arrivals = Arrivals()
    result = strategy.start(
        grid, ArrayRecord(model.state_dict()), num_rounds=int(config["num-server-rounds"])
    )
    result.history.save(folder / "history.jsonl")
    (folder / "arrivals.json").write_text(json.dumps(arrivals.seen))
