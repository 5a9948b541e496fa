"""The same halves in NVFlare's Collab simulator, for comparison."""

import contextvars
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.collab import CollabRecipe, collab
from nvflare.recipe import SimEnv
from torch.nn import functional

from flsplit.bench import training_app, workload
from flsplit.bench.figures import BenchError


class NVFlareClient:
    """A client: its segment, its optimizer, its batches."""

    _smashed: torch.Tensor

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._ready = False

    def _prepare(self) -> None:  # in the client's process, where its name is known
        torch.set_num_threads(1)
        torch.manual_seed(0)
        number = int(collab.site_name.rpartition("-")[2]) - 1
        self._segment = workload.network(workload.IMAGES).get_submodule(workload.CUT)
        self._optimizer = torch.optim.Adam(self._segment.parameters(), lr=workload.LR)
        self._images, self._labels = workload.partition(
            workload.IMAGES, number, self._clients
        ).tensors
        self._order = torch.Generator().manual_seed(number)
        self._ready = True

    @collab.publish  # type: ignore[untyped-decorator]
    def step(self, gradient: Any) -> Any:
        """Do the last step's backward pass and the next one's forward pass."""
        if not self._ready:
            self._prepare()
        if gradient is not None:
            self._optimizer.zero_grad(set_to_none=True)
            self._smashed.backward(torch.from_numpy(np.array(gradient)))  # type: ignore[no-untyped-call]
            self._optimizer.step()
        rows = torch.randperm(len(self._labels), generator=self._order)[: workload.BATCH_SIZE]
        self._smashed = self._segment(self._images[rows])
        return {"smashed": self._smashed.detach().numpy(), "labels": self._labels[rows].numpy()}


class NVFlareServer:
    """The server: one pass over all clients' smashed data in a step."""

    def __init__(self, steps: int, output: str) -> None:
        self._steps = steps
        self._output = output

    @collab.main  # type: ignore[untyped-decorator]
    def run(self) -> None:
        """Train, and write what the steps took."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        segment = workload.network(workload.IMAGES).get_submodule("server")
        optimizer = torch.optim.Adam(segment.parameters(), lr=workload.LR)
        clients = list(collab.clients)
        gradients: list[Any] = [None] * len(clients)
        times = []
        with ThreadPoolExecutor(len(clients)) as pool:
            for _ in range(training_app.WARM_UP + self._steps):
                asked = [
                    pool.submit(contextvars.copy_context().run, client.step, gradient)
                    for client, gradient in zip(clients, gradients, strict=True)
                ]
                answers = [one.result() for one in asked]
                leaves = [
                    torch.from_numpy(np.array(one["smashed"])).requires_grad_() for one in answers
                ]
                labels = torch.cat([torch.from_numpy(np.array(one["labels"])) for one in answers])
                optimizer.zero_grad(set_to_none=True)
                loss = functional.cross_entropy(segment(torch.cat(leaves)), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                # Those of a client's own mean loss, as flsplit sends them.
                gradients = [
                    leaf.grad.numpy() * len(leaves) for leaf in leaves if leaf.grad is not None
                ]
                times.append(time.perf_counter())
        Path(self._output).write_text(json.dumps(times))


def measure(clients: int, steps: int, folder: Path) -> list[float]:
    """Return the seconds per step, without the warm-up."""
    output = folder / "times.json"
    recipe = CollabRecipe(
        job_name="flsplit-bench",
        server=NVFlareServer(steps, str(output)),
        client=NVFlareClient(clients),
        min_clients=clients,
    )
    recipe.execute(SimEnv(num_clients=clients, workspace_root=str(folder / "workspace")))
    if not output.exists():
        raise BenchError(f"NVFlare's simulation has failed; its logs are in {folder}")
    times = json.loads(output.read_text())[training_app.WARM_UP - 1 :]
    return [after - before for before, after in itertools.pairwise(times)]
