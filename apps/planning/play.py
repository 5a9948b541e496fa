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
from pathlib import Path
from statistics import mean

from flwr.app import Context, RecordDict

from flsplit import History
from flsplit.processes import Federation, simulation
from flsplit.run.registry import plan_method
from flsplit.wireless import (
    Problem,
    Training,
    load_fleet,
    profile_model,
    round_seconds,
)
from flsplit.wireless.fleet_plan import inline_table
from flsplit.wireless.rates import link_rates

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
TRAINING = Training(batch_size=32, steps=4)
METHODS = {
    "psl": "{}",
    "epsl": "{phi = 0.5}",
    "fsl-sage": (
        "{upload-every = 2, align-every = 1, align = 'before_round', align-epochs = 10, "
        "buffer-size = 64}"
    ),
}


def predicted(problem: Problem, cut: str) -> float:
    """Return how long a round should take (s)."""
    phases = problem.phases(problem.profile.place(cut))
    return round_seconds(phases, problem.fleet, link_rates(problem.fleet))


def played(problem: Problem, options: argparse.Namespace, flower: Federation) -> History:
    """Run the quickstart as planned, and return its history."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"drop-last": True, "fraction-evaluate": 0.0}
        config: Mapping[str, str | int | float | bool] = {
            "strategy": problem.method.name,
            "strategy-args": inline_table(problem.arguments | common),
            "num-server-rounds": options.rounds,
            "alpha": 100.0,  # so that everybody has batches of the same size
            "carrier": "session",
            "fleet": str(options.fleet.resolve()),
            "realtime": True,
            "output-dir": folder,
        }
        run = flower.run_app(QUICKSTART, config, timeout=1800)
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
    model = build_model(context)
    profile = profile_model(model, (1, 8, 8))
    print("method     predicted    clock   played (s)   played by predicted   computed (s)")
    with (
        tempfile.TemporaryDirectory() as folder,
        simulation(Path(folder), fleet.num_devices) as flower,
    ):
        for name, strategy_args in METHODS.items():
            method, training = plan_method(name, strategy_args, model, profile, TRAINING)
            problem = Problem(fleet, profile, method, training)
            rounds = played(problem, options, flower)[1:]  # the first sends segments out
            expected = predicted(problem, CUT)
            clock = mean(entry.simulated_seconds or 0.0 for entry in rounds)
            passed = mean(entry.seconds for entry in rounds)
            computed = mean(entry.client_seconds + entry.server_seconds for entry in rounds)
            print(
                f"{name:9}{expected:11.3f}{clock:9.3f}{passed:9.3f}{passed / expected:18.3f}"
                f"{computed:19.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
