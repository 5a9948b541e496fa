"""Checks predicted round times against a stopwatch, on a fleet whose delays are played.

    python apps/planning/play.py

Each method trains the quickstart's model on digits, with simulated clients over a session. Of
every round there are three times: what the formulas of `flsplit plan` predict, what the run's
clock makes of the messages that were really sent, and what really passed.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from flwr.app import Context, RecordDict

from flsplit import History
from flsplit.processes import Simulation, simulation
from flsplit.wireless import (
    Fleet,
    Method,
    ModelProfile,
    Problem,
    Training,
    load_fleet,
    profile_model,
    round_seconds,
)
from flsplit.wireless.rates import link_rates
from flsplit.wireless.rounds import EPSL, FSLSAGE, PSL

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
BATCH, STEPS = 32, 4
EVERY, EPOCHS, BUFFER = 2, 10, 64  # FSL-SAGE: uploads, alignment


@dataclass(frozen=True)
class Case:
    """A method and the arguments of its strategy, as in a run config."""

    name: str
    method: Method
    arguments: str = ""


def cases() -> list[Case]:
    """Return the methods."""
    sage = FSLSAGE(upload_interval=EVERY, align_interval=1, align_epochs=EPOCHS, buffer_rows=BUFFER)
    arguments = f"upload-every = {EVERY}, align-every = 1, align-epochs = {EPOCHS}, "
    arguments += f"buffer-size = {BUFFER}"
    return [
        Case("psl", PSL()),
        Case("epsl", EPSL(0.5), "phi = 0.5"),
        Case("fsl-sage", sage, arguments),
    ]


def predicted(case: Case, fleet: Fleet, profile: ModelProfile, cut: str) -> float:
    """Return how long a round should take (s)."""
    problem = Problem(fleet, profile, case.method, Training(batch_size=BATCH, steps=STEPS))
    return round_seconds(problem.phases(profile.place(cut)), fleet, link_rates(fleet))


def played(case: Case, options: argparse.Namespace, flower: Simulation, num: int) -> History:
    """Run the quickstart with a method, and return its history."""
    with tempfile.TemporaryDirectory() as folder:
        common = f"local-steps = {STEPS}, drop-last = true, fraction-evaluate = 0.0"
        config: Mapping[str, str | int | float | bool] = {
            "strategy": case.name,
            "strategy-args": f"{{{common}{', ' if case.arguments else ''}{case.arguments}}}",
            "batch-size": BATCH,
            "num-server-rounds": options.rounds,
            "alpha": 100.0,  # so that everybody has batches of the same size
            "carrier": "session",
            "fleet": str(options.fleet.resolve()),
            "realtime": True,
            "output-dir": folder,
        }
        run = flower.run_app(QUICKSTART, num, config, timeout=1800)
        if not run.completed:
            raise SystemExit(run.log)
        return History.load(Path(folder) / "history.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", type=Path, default=HERE / "fleet-slow.toml")
    parser.add_argument("--rounds", type=int, default=4, help="the first does not count")
    options = parser.parse_args()
    sys.path.insert(0, str(QUICKSTART))
    from quickstart.task import CUT, build_model

    fleet = load_fleet(options.fleet)
    context = Context(1, 1, {}, RecordDict(), {"dataset": "digits"})
    profile = profile_model(build_model(context), (1, 8, 8))
    print("method     predicted    clock   played (s)   played by predicted   computed (s)")
    with tempfile.TemporaryDirectory() as folder, simulation(Path(folder)) as flower:
        for case in cases():
            rounds = played(case, options, flower, fleet.num_devices)[1:]  # 1 sends segments out
            expected = predicted(case, fleet, profile, CUT)
            clock = mean(entry.simulated_seconds or 0.0 for entry in rounds)
            passed = mean(entry.seconds for entry in rounds)
            computed = mean(entry.client_seconds + entry.server_seconds for entry in rounds)
            print(
                f"{case.name:9}{expected:11.3f}{clock:9.3f}{passed:9.3f}{passed / expected:18.3f}"
                f"{computed:19.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
