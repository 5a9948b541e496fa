"""What is to be run, and what has been: a file of finished runs."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import Experiment
from measured import SIMULATED
from methods import find_method
from simulated import digest
from training import DECIDING, FINAL, SCREENING, Setting
from tuning import Choice, Grid, Rates, choose, grid_for

from flsplit.errors import ConfigError

Run = dict[str, Any]
TUNING_SEEDS = {SCREENING: (1000,), DECIDING: (1001, 1002)}


@dataclass(frozen=True)
class Job:
    """One run of one method: short for tuning, or of full length."""

    method: str
    rates: Rates
    partition: str
    seed: int
    kind: str

    def key(self) -> Run:
        """Return what tells the run from others of the same setting, as it is in the file."""
        return dict(vars(self))


class Book:
    """The finished runs of a setting, kept in a file of JSON lines.

    Parameters
    ----------
    folder : Path
        Where they lie, in ``runs.jsonl``, beside the setting that all of them have.
    setting : Setting
        What the runs have in common.
    grid : mapping of str to list of float
        Learning rates to begin with, in the place of the methods' own.
    rates : mapping of str to list of float
        Rates to take without any tuning.

    Raises
    ------
    ConfigError
        If the folder's runs are of another setting; what differs is named.
    """

    def __init__(
        self,
        folder: Path,
        setting: Setting,
        grid: Mapping[str, Sequence[float]] | None = None,
        rates: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.path, self.setting = folder / "runs.jsonl", setting
        self.grid, self.rates = dict(grid or {}), dict(rates or {})
        self._fleet = digest(setting.fleet) if setting.fleet else ""
        self._keep_setting(folder / "setting.json")
        self.runs: list[Run] = []
        if self.path.exists():
            self.runs = [json.loads(line) for line in _whole_lines(self.path)]

    def _keep_setting(self, path: Path) -> None:
        now = self.setting.identity() | {"grid": self.grid, "rates": self.rates}
        if not path.exists():
            if self.path.exists():
                raise ConfigError(f"--out: {self.path} is of another version: name another folder")
            path.write_text(json.dumps(now, indent=1) + "\n")
            return
        before = json.loads(path.read_text())
        differ = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if differ:
            raise ConfigError(
                f"--out: the runs in {path.parent} are of another setting: {'; '.join(differ)}. "
                "Repeat their command, or name another folder"
            )

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

    def grid_of(self, method: str, experiment: Experiment) -> Grid:
        """Return the points that a method's tuning begins with."""
        return grid_for(find_method(method).grid, {**experiment.grid, **self.grid})

    def tuned(self, method: str, partition: str) -> Choice | list[Job]:
        """Return the rates that were chosen; or the runs that come next."""

        def scores(kind: str, rates: Rates) -> list[float] | None:
            found = [self.find(job) for job in tuning_jobs(method, rates, partition, kind)]
            if None in found:
                return None
            good = [run for run in found if run and "failed" not in run]
            return [100 * _level(run) for run in good] if len(good) == len(found) else []

        if self.rates:
            point = {
                name: one[0] for name, one in grid_for(find_method(method).grid, self.rates).items()
            }
            return Choice(point, [point], [], [], ())
        grid = self.grid_of(method, self.setting.experiment())
        came = choose(grid, lambda one: scores(SCREENING, one), lambda one: scores(DECIDING, one))
        if isinstance(came, Choice):
            return came
        kind, points = came
        return self.missing(
            job for point in points for job in tuning_jobs(method, point, partition, kind)
        )

    def finals(self, method: str, partition: str, seeds: Sequence[int]) -> list[Run]:
        """Return the finished runs with the tuned rates."""
        choice = self.tuned(method, partition)
        if not isinstance(choice, Choice):
            return []
        jobs = [Job(method, choice.rates, partition, seed, FINAL) for seed in seeds]
        return [run for job in jobs if (run := self.find(job))]

    def tuning_runs(self, method: str, partition: str) -> list[Run]:
        """Return all short runs of a method."""
        where = {"method": method, "partition": partition}
        return [
            run for run in self.runs
            if where.items() <= run.items() and run["kind"] in TUNING_SEEDS
        ]  # fmt: skip

    def _key(self, job: Job) -> Run:
        fleet = {"fleet": self._fleet} if self._fleet and job.kind == FINAL else {}
        return job.key() | fleet


def tuning_jobs(method: str, rates: Rates, partition: str, kind: str) -> list[Job]:
    """Return the runs by which a stage of tuning judges a point."""
    return [Job(method, rates, partition, seed, kind) for seed in TUNING_SEEDS[kind]]


def _level(run: Run) -> float:
    """Return a short run's accuracy: that of its last two rounds."""
    return statistics.mean(run["accuracy"][-2:])


def _whole_lines(path: Path) -> list[str]:
    """Return the lines; drop a last one that was not written to its end."""
    text = path.read_text()
    whole, _, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "")
    return whole.splitlines()
