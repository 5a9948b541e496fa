"""Methods of somebody else's package run in the quickstart by name, with no change to the app."""

import json
import subprocess
import sys

import pytest

from flsplit import History
from tests.e2e.local_quickstart import run_locally
from tests.flower_processes import REPOSITORY, simulation

# Written as docs/new-method.md says, without a look into strategies/.
METHODS = '''"""Three methods."""

import statistics

from flsplit.client_parts import Clip, Noise
from flsplit.run import ParallelStrategy
from flsplit.wireless.phases import parallel_steps, server_passes


class Cycle(ParallelStrategy):
    """The server trains on mixed rows first, and gives gradients then."""

    def __init__(self, *, server_epochs=2, **options):
        self.server_epochs = server_epochs
        super().__init__(**options)

    def step(self, step):
        for _ in range(self.server_epochs):
            for rows in step.shuffled_rows(16):
                step.update(step.gradients(rows))
        step.reply(step.gradients(per_client=True).cut_gradients)

    @classmethod
    def phases(cls, work, *, server_epochs=2, **arguments):
        rows = (server_epochs + 1) * work.rows
        server = server_passes(work, forward_rows=rows, backward_rows=rows)
        return parallel_steps(work, server=server)


class Broadcast(ParallelStrategy):
    """All clients step with one mean, row by row, where they have a row."""

    def step(self, step):
        found = step.gradients()
        step.update(found)
        longest = max(step.batches, key=len)
        mean = 0 * found.cut_gradients[longest.client]
        for client, gradient in found.cut_gradients.items():
            mean[: len(gradient)] += step.shares[client] * gradient
        step.reply(
            {b.client: mean[: len(b)] for b in step.batches},
            shared_rows={b.client: len(b) for b in step.batches},
        )


class Careful(ParallelStrategy):
    """Clients clip and add noise; the server leaves out whose gradient is far from the usual."""

    client_parts = (Clip(5.0), Noise(0.01))

    def step(self, step):
        found = step.gradients(per_client=True)
        norms = {client: float(g.norm()) for client, g in found.cut_gradients.items()}
        middle = statistics.median(norms.values())
        kept = [client for client, norm in norms.items() if norm <= 1.2 * middle]
        total = sum(step.shares[client] for client in kept)
        weights = [step.shares[c] / total if c in kept else 0.0 for c in step.clients]
        step.update(found.clients.combine(weights))
        step.reply({client: found.cut_gradients[client] for client in kept})
        step.record({"kept": len(kept)})
'''
NAMES = {
    "stranger-cycle": "Cycle",
    "stranger-broadcast": "Broadcast",
    "stranger-careful": "Careful",
}
NUM_CLIENTS = 3
CONFIG = {"num-server-rounds": 2, "batch-size": 64}  # the clients' last batches are ragged


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Put an installed package with the three methods on the path; return the folder."""
    folder = tmp_path / "site"
    info = folder / "stranger-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "stranger.py").write_text(METHODS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    lines = [f"{name} = stranger:{cls}" for name, cls in NAMES.items()]
    (info / "entry_points.txt").write_text("\n".join(["[flsplit.strategies]", *lines, ""]))
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_s_method_runs_in_the_quickstart_by_name(package, quickstart, tmp_path, name):
    output = tmp_path / "output"
    config = CONFIG | {"strategy": name}
    run_config = {**config, "output-dir": str(output)}
    with simulation(tmp_path, NUM_CLIENTS, {"PYTHONPATH": str(package)}) as flower:
        run = flower.run_app(quickstart, run_config=run_config)
    assert run.completed, run.log

    (file,) = output.rglob("history.jsonl")
    expected = [run_locally(NUM_CLIENTS, config).history.numbers() for _ in range(2)]
    assert expected[0] == expected[1]  # one seed, one result, noise and all
    assert History.load(file).numbers() == expected[0]
    if name == "stranger-careful":
        assert expected[0][0]["metrics"]["kept"] < NUM_CLIENTS


@pytest.mark.e2e
def test_a_stranger_s_method_is_planned_by_its_own_phases(package):
    def planned(name, arguments="{}"):
        command = [
            sys.executable, "-c", "from flsplit.cli import app; app()", "plan",
            str(REPOSITORY / "docs/fleet.toml"), "--model", "resnet18", "--input", "3x64x64",
            "--strategy", name, "--strategy-args", arguments, "--json",
        ]  # fmt: skip
        path = f"{package}:{REPOSITORY}"
        done = subprocess.run(
            command,
            env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return json.loads(done.stdout)["stages_s"]

    once, thrice = (
        planned("stranger-cycle", "{server-epochs = 1}"),
        planned("stranger-cycle", "{server-epochs = 5}"),
    )
    # (E + 1) passes over the rows, whatever else the plan chooses alike
    assert thrice["server forward"] > 2 * once["server forward"] > 0
