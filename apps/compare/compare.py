"""Compares methods on the same data, model, cut, batches and seeds.

    python apps/compare/compare.py --dataset digits
    python apps/compare/compare.py --dataset mnist --data-dir /path/to/data --alpha 0.1 inf
    python apps/compare/compare.py --dataset mine.py --partition iid dirichlet:alpha=0.3

Every method first takes one step, which shows what doesn't fit. Then its learning rates are tuned
on validation data (tuning.py), and it is run with every seed. Finished runs are kept in the
output folder and are not run again, so a comparison that was stopped goes on. What comes out of
it (tables, pictures, a page) is written anew each time.
"""

import argparse
import shlex
import signal
import sys
import time
from collections import defaultdict
from difflib import get_close_matches
from pathlib import Path

from jobs import TUNING_SEEDS, Book, Job, Run
from methods import expand, find_method, groups
from partitions import OWN, of_alpha
from presets import PRESETS
from results import write_results
from simulated import check_fleet
from sources import DATASETS, find_experiment
from training import FINAL, REHEARSAL, Setting
from tuning import Choice, parse_grid
from verdict import LEAST_SEEDS, MATTERS
from workers import Workers

from flsplit.errors import ConfigError, FlsplitError

QUICK_ROUNDS = 10
EXPECTED_RUNS = (8, 6)  # of a method's tuning, screening and deciding: for the time that is left
FOLDERS = {"--data-dir": "/path/to/data", "--out": "results"}  # what a page shows of them


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and write the results; return the exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        book = Book(options.out, setting_of(options), options.grid, options.rates)
        with Workers(book.setting, options.workers) as workers:
            run_missing(options, book, workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one ended", flush=True)
        return 130
    except FlsplitError as error:
        print(f"compare: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def run_missing(options: argparse.Namespace, book: Book, workers: Workers) -> None:
    """Run what is missing, one partition after the other, and write the results after each."""
    progress = Progress(options, book, workers)
    if progress.left():
        rehearse(options, book.setting, workers)
    for partition in options.partition:
        done = progress.done
        while jobs := tuning_left(options, book, partition):
            progress.run(jobs)
        progress.run(book.missing(final_jobs(options, book, partition)))
        if progress.done > done or partition == options.partition[-1]:
            write_results(options, book)


def rehearse(options: argparse.Namespace, setting: Setting, workers: Workers) -> None:
    """Deal the data out for all seeds, and let every method take a step.

    Raises
    ------
    ConfigError
        If something doesn't fit; all methods that fail are named.
    """
    for partition in options.partition:
        for seed in [*sum(TUNING_SEEDS.values(), ()), *options.seeds]:
            setting.parts(partition, seed)
    grids = {method: find_method(method).grid for method in options.methods}
    jobs = [
        Job(method, {name: values[0] for name, values in grid.items()}, options.partition[0],
            options.seeds[0], REHEARSAL)
        for method, grid in grids.items()
    ]  # fmt: skip
    failed = {job.method: found["error"] for job, found in workers.run(jobs) if "error" in found}
    if failed:
        methods = defaultdict(list)  # what fails for all of them is said once
        for method, error in failed.items():
            methods[error].append(method)
        told = "; ".join(f"{', '.join(names)}: {error}" for error, names in methods.items())
        raise ConfigError(f"what can't be run, before anything is: {told}")


def tuning_left(options: argparse.Namespace, book: Book, partition: str) -> list[Job]:
    """Return the short runs that come next, of all methods that are not tuned yet."""
    came = [book.tuned(method, partition) for method in options.methods]
    return [job for jobs in came if not isinstance(jobs, Choice) for job in jobs]


def final_jobs(options: argparse.Namespace, book: Book, partition: str) -> list[Job]:
    """Return the full runs on a partition, where tuning is finished."""
    choices = {method: book.tuned(method, partition) for method in options.methods}
    return [
        Job(method, choice.rates, partition, seed, FINAL)
        for method, choice in choices.items() if isinstance(choice, Choice)
        for seed in options.seeds
    ]  # fmt: skip


class Progress:
    """Runs jobs and tells how far it is.

    Time left is estimated from the rounds trained so far, whatever their method, and from how many
    runs tuning usually takes.
    """

    def __init__(self, options: argparse.Namespace, book: Book, workers: Workers) -> None:
        self.options, self.book, self.workers = options, book, workers
        self.started, self.done = time.perf_counter(), 0

    def run(self, jobs: list[Job]) -> None:
        """Run jobs."""
        for job, found in self.workers.run(jobs):
            if "error" in found:
                raise FlsplitError(f"{job.method}: {found['error']}")
            self._tell(job, self.book.add(job, found))

    def left(self) -> int:
        """Return about how many rounds are still to be trained."""
        left = 0
        for partition in self.options.partition:
            left += len(self.book.missing(final_jobs(self.options, self.book, partition))) * (
                self.options.rounds
            )
            for method in self.options.methods:
                if not isinstance(self.book.tuned(method, partition), Choice):
                    left += self._expected(method, partition)
        return left

    def _expected(self, method: str, partition: str) -> int:
        rounds = self.book.setting.rounds_of
        runs = [run["kind"] for run in self.book.tuning_runs(method, partition)]
        tuning = sum(
            max(count - runs.count(kind), 1) * rounds(kind)
            for kind, count in zip(TUNING_SEEDS, EXPECTED_RUNS, strict=True)
        )
        return tuning + len(self.options.seeds) * self.options.rounds

    def _tell(self, job: Job, run: Run) -> None:
        self.done += self.book.setting.rounds_of(job.kind)
        spent = time.perf_counter() - self.started
        what = f"seed {job.seed}" if job.kind == FINAL else job.kind
        rates = " ".join(f"{name}={value:g}" for name, value in job.rates.items())
        came = "diverged" if "failed" in run else f"{100 * run['accuracy'][-1]:.1f} %"
        print(
            f"{spent / 60:5.1f} min, about {spent / self.done * self.left() / 60:.0f} min left: "
            f"{job.method}, {job.partition}, {what}, {rates}: {came}",
            flush=True,
        )


def setting_of(options: argparse.Namespace) -> Setting:
    """Return what all runs have in common."""
    names = Setting.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in names}
    checkpoints = str((options.out / "checkpoints").absolute()) if options.checkpoints else ""
    return Setting(**given | {"checkpoints": checkpoints})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options; ``command`` is what repeats them, with folders left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", help=f"a paper's setting: {', '.join(PRESETS)}")
    parser.add_argument(
        "--dataset", default="digits",
        help=f"{', '.join(DATASETS)}; a Python file with a function experiment(); an app's folder",
    )  # fmt: skip
    parser.add_argument("--data-dir", default="", help="where torchvision's data set lies")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument(
        "--partition", nargs="+", metavar="NAME[:KEY=VALUE,…]",
        help="partitioners of flwr-datasets, for instance iid or dirichlet:alpha=0.1",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=float, nargs="+", default=[0.1], help="short for dirichlet; inf is iid"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD",
        help=f"names of methods.py or of strategies, with options: gapsl{{eta=-1}}; or groups: "
        f"{', '.join(groups())}",
    )  # fmt: skip
    parser.add_argument("--against", help="the method that others are compared with (psl)")
    parser.add_argument(
        "--matters", type=float, default=MATTERS, help="smallest difference that matters, points"
    )
    parser.add_argument("--rounds", type=int, help="20 where --quick is not given")
    parser.add_argument(
        "--local-steps", type=int, default=20,
        help="mini-batches per round; 0: as many as go through all data once",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--train-size", "--subset", type=int, default=0, help="0: as the data set has it"
    )
    parser.add_argument("--test-size", type=int, default=0, help="0: as the data set has it")
    parser.add_argument("--target", type=float, help="accuracy to reach, %%")
    parser.add_argument(
        "--shares", choices=("examples", "equal"), default="examples",
        help="how much clients count, the same for all methods",
    )  # fmt: skip
    for name, what in (
        ("--grid", "learning rates that tuning begins with, for instance client_lr=0.01,0.1"),
        ("--rates", "no tuning: learning rates, for instance client_lr=0.01 server_lr=0.1"),
    ):
        parser.add_argument(name, nargs="+", metavar="RATE=VALUE", default=[], help=what)
    parser.add_argument("--fleet", default="", help="simulate the time on it: a TOML file")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto")
    parser.add_argument("--workers", type=int, default=2, help="processes, 0 for none")
    parser.add_argument(
        "--checkpoints", action="store_true", help="go on within runs, too, after an interruption"
    )
    parser.add_argument("--out", type=Path, default=Path("compare-results"))
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, fewer methods"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    preset = parser.parse_known_args(given)[0].preset
    if preset is not None:
        if preset not in PRESETS:
            near = get_close_matches(preset, PRESETS, n=1, cutoff=0.0)[0]
            parser.error(
                f"--preset: there is no {preset!r}; did you mean {near!r}? "
                f"(there are {', '.join(PRESETS)})"
            )
        parser.set_defaults(**PRESETS[preset])
    options = parser.parse_args(given)
    try:
        complete(options)
    except FlsplitError as error:
        parser.error(str(error))
    options.command = command(given)
    return options


def complete(options: argparse.Namespace) -> None:
    """Fill in what follows from other options.

    Raises
    ------
    ConfigError
        If an option can't be used; the nearest that can is named.
    """
    if options.fleet:
        check_fleet(options.fleet, options.clients)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else 20)
    options.methods = expand(options.methods or ["quick" if options.quick else "all"])
    for name in ("seeds", "alpha", "partition"):
        values = getattr(options, name) or []
        if len(set(values)) < len(values):
            raise ConfigError(f"--{name} names {max(values, key=values.count)} twice")
    if used := set(options.seeds) & set(sum(TUNING_SEEDS.values(), ())):
        raise ConfigError(f"--seeds: {min(used)} is a seed of the tuning, take another")
    for name in ("grid", "rates"):
        setattr(options, name, parse_grid(f"--{name}", getattr(options, name)))
    if options.rates and not {"client_lr", "server_lr"} <= options.rates.keys():
        raise ConfigError(
            f"--rates are {', '.join(options.rates)}, expected client_lr and server_lr"
        )
    if len(options.seeds) < LEAST_SEEDS:
        print(f"compare: {len(options.seeds)} seeds are too few for a verdict, which takes "
              f"{LEAST_SEEDS}", file=sys.stderr)  # fmt: skip
    experiment = find_experiment(options.dataset, options.data_dir)
    if experiment.data is not None and options.partition:
        raise ConfigError(f"--partition: {options.dataset} deals its data out itself: leave it out")
    dealt = [OWN] if experiment.data is not None else list(map(of_alpha, options.alpha))
    options.partition = options.partition or dealt
    options.target = options.target or experiment.target
    if not options.local_steps:
        size = options.train_size or experiment.train_size or len(experiment.train)
        options.local_steps = max(int(0.9 * size) // options.clients // options.batch_size, 1)
    known = options.against in options.methods
    if options.against and not known:
        near = get_close_matches(options.against, options.methods, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--against: {options.against!r} is not among the methods; did you mean {near!r}?"
        )
    options.against = options.against or ("psl" if "psl" in options.methods else options.methods[0])


def command(arguments: list[str]) -> str:
    """Return the command line, without the names of folders on this machine."""
    shown = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, _, value = argument.partition("=")
        if before in FOLDERS:
            shown.append(FOLDERS[before])
        elif name in FOLDERS and value:
            shown += [name, FOLDERS[name]]
        elif before == "--dataset" and "/" in argument:
            shown.append(Path(argument).name)
        else:
            shown.append(argument)
    return f"python apps/compare/compare.py {shlex.join(shown)}".rstrip()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as with Ctrl-C
    sys.exit(main())
