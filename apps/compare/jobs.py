"""What is to be run, and what has been: a file of finished runs."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import SIMULATED
from method import Rates
from methods import METHODS
from simulated import digest
from training import Setting

Run = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of one method, short for tuning or of full length."""

    method: str
    rates: Rates
    alpha: float
    seed: int
    tuning: bool

    def key(self) -> Run:
        """Return what tells the run from others of the same setting, as it is in the file."""
        return vars(self) | {"alpha": str(self.alpha)}


class Book:
    """The finished runs of a setting, kept in a file of JSON lines.

    Parameters
    ----------
    path : Path
        The file; runs of other settings in it are left alone.
    setting : Setting
        What the runs have in common.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.setting = path, setting
        self._fleet = digest(setting.fleet) if setting.fleet else ""
        self.runs: list[Run] = []
        if path.exists():
            self.runs = [json.loads(line) for line in _whole_lines(path)]

    def find(self, job: Job) -> Run | None:
        """Return a finished run, or None.

        Without a fleet any will do, and the time that it would take on one is left out.
        """
        key = self._key(job)
        for run in self.runs:
            if all(run.get(name) == value for name, value in key.items()):
                return run if self._fleet else {k: v for k, v in run.items() if k != SIMULATED}
        return None

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs that have not been run."""
        return [job for job in jobs if self.find(job) is None]

    def add(self, job: Job, found: Run) -> Run:
        """Keep what came of a job."""
        run = self._key(job) | found
        self.runs.append(run)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        return run

    def tuned(self, method: str, alpha: float, seed: int) -> Rates | None:
        """Return the best of the six points, the first of equals; None if one is missing."""
        runs = [self.find(job) for job in tuning_jobs(method, alpha, seed)]
        if None in runs:
            return None
        best: Run = max(runs, key=_validation_accuracy)  # type: ignore[arg-type]
        return best["rates"]

    def finals(self, method: str, alpha: float, seeds: list[int]) -> list[Run]:
        """Return the finished runs with the tuned rates."""
        rates = self.tuned(method, alpha, seeds[0])
        if rates is None:
            return []
        found = [self.find(Job(method, rates, alpha, seed, tuning=False)) for seed in seeds]
        return [run for run in found if run]

    def _key(self, job: Job) -> Run:
        places = ("data_dir", "fleet")
        common = {name: value for name, value in vars(self.setting).items() if name not in places}
        fleet = {"fleet": self._fleet} if self._fleet and not job.tuning else {}
        return job.key() | common | fleet


def tuning_jobs(method: str, alpha: float, seed: int) -> list[Job]:
    """Return the runs that a method's learning rates are chosen by."""
    return [Job(method, rates, alpha, seed, tuning=True) for rates in METHODS[method].grid]


def _validation_accuracy(run: Run) -> float:
    return statistics.mean(run["accuracy"][-2:])


def _whole_lines(path: Path) -> list[str]:
    """Return the lines; drop a last one that was not written to its end."""
    text = path.read_text()
    whole, _, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "")
    return whole.splitlines()
