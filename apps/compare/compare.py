"""Compares methods on the same data, model, cut, batches and seeds.

    python apps/compare/compare.py --dataset digits
    python apps/compare/compare.py --dataset mnist --data-dir /path/to/data --alpha 0.1 inf

Each method's learning rates are tuned first: six points, one seed, a fifth of the rounds, judged
on validation data. Then it is run with every seed. Finished runs are kept in the output folder and
are not run again, so a comparison that was stopped goes on. What comes out of it (tables,
pictures, a page) is written anew each time.
"""

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

from jobs import Book, Job, Run, tuning_jobs
from methods import GROUPS, METHODS, expand
from results import write_results
from simulated import check_fleet
from task import load
from training import Setting
from workers import Workers

from flsplit.errors import FlsplitError

PRESETS = {  # training and test examples, accuracy to reach
    "digits": (1400, 397, 85.0),
    "mnist": (20_000, 5_000, 85.0),
    "cifar10": (20_000, 5_000, 40.0),
}
QUICK_ROUNDS = 10
FOLDERS = {"--data-dir": "/path/to/data", "--out": "results"}  # what a page shows of them


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and write the results; return the exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    book = Book(options.out / "runs.jsonl", setting_of(options))
    try:
        with Workers(book.setting, options.workers) as workers:
            run_missing(options, book, workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one ended", flush=True)
        return 130
    return 0


def run_missing(options: argparse.Namespace, book: Book, workers: Workers) -> None:
    """Run what is missing, one alpha after the other, and write the results after each."""
    progress = Progress(options, book, workers)
    if progress.left:
        load(options.dataset, options.data_dir)  # says at once if the data is not there
    for alpha in options.alpha:
        done = progress.done
        progress.run(all_tuning_jobs(options, alpha))
        progress.run(final_jobs(options, book, alpha))
        if progress.done > done or alpha == options.alpha[-1]:
            write_results(options, book)


def all_tuning_jobs(options: argparse.Namespace, alpha: float) -> list[Job]:
    """Return the short runs of an alpha."""
    seed = options.seeds[0]
    return [job for method in options.methods for job in tuning_jobs(method, alpha, seed)]


def final_jobs(options: argparse.Namespace, book: Book, alpha: float) -> list[Job]:
    """Return the full runs of an alpha, whose tuning must be finished."""
    jobs = []
    for method in options.methods:
        rates = book.tuned(method, alpha, options.seeds[0])
        assert rates is not None
        jobs += [Job(method, rates, alpha, seed, tuning=False) for seed in options.seeds]
    return jobs


class Progress:
    """Runs jobs and tells how far it is.

    Time left is estimated from the rounds trained so far, whatever their method.
    """

    def __init__(self, options: argparse.Namespace, book: Book, workers: Workers) -> None:
        self.book, self.workers = book, workers
        self.started, self.done, self.left = time.perf_counter(), 0, 0
        for alpha in options.alpha:
            for method in options.methods:
                jobs = tuning_jobs(method, alpha, options.seeds[0])
                finished = len(book.finals(method, alpha, options.seeds))
                self.left += sum(map(self._rounds, book.missing(jobs)))
                self.left += (len(options.seeds) - finished) * options.rounds

    def run(self, jobs: list[Job]) -> None:
        """Run those of the jobs that are missing."""
        for job, found in self.workers.run(self.book.missing(jobs)):
            self._tell(job, self.book.add(job, found))

    def _rounds(self, job: Job) -> int:
        return self.book.setting.rounds_of(tuning=job.tuning)

    def _tell(self, job: Job, run: Run) -> None:
        self.done += self._rounds(job)
        self.left -= self._rounds(job)
        spent = time.perf_counter() - self.started
        what = "tuning" if job.tuning else f"seed {job.seed}"
        rates = " ".join(f"{name}={value:g}" for name, value in job.rates.items())
        came = "diverged" if "failed" in run else f"{100 * run['accuracy'][-1]:.1f} %"
        print(
            f"{spent / 60:5.1f} min, about {spent / self.done * self.left / 60:.0f} min left: "
            f"{job.method}, alpha {job.alpha:g}, {what}, {rates}: {came}",
            flush=True,
        )


def setting_of(options: argparse.Namespace) -> Setting:
    """Return what all runs have in common."""
    train_size, test_size, _ = PRESETS[options.dataset]
    return Setting(
        options.dataset, options.data_dir, options.clients, options.rounds, options.local_steps,
        options.batch_size, options.train_size or train_size, options.test_size or test_size,
        options.fleet,
    )  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options; ``command`` is what repeats them, with folders left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=sorted(PRESETS), default="digits")
    parser.add_argument("--data-dir", default="", help="where torchvision's data set lies")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.1], help="inf is IID")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *GROUPS], metavar="METHOD",
        help="methods or groups of methods.py",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="20 where --quick is not given")
    parser.add_argument("--local-steps", type=int, default=20, help="mini-batches per round")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--train-size", type=int, default=0, help="0: 20000, or all digits")
    parser.add_argument("--test-size", type=int, default=0, help="0: 5000, or all digits")
    parser.add_argument("--target", type=float, help="accuracy to reach, %% (85; cifar10: 40)")
    parser.add_argument("--fleet", default="", help="simulate the time on it: a TOML file")
    parser.add_argument("--workers", type=int, default=2, help="processes; results are the same")
    parser.add_argument("--out", type=Path, default=Path("compare-results"))
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, fewer methods"
    )
    options = parser.parse_args(arguments)
    try:
        if options.fleet:
            check_fleet(options.fleet, options.clients)
    except FlsplitError as error:
        parser.error(str(error))
    options.methods = expand(options.methods or ["quick" if options.quick else "compared"])
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else 20)
    options.target = options.target or PRESETS[options.dataset][2]
    options.command = command(list(sys.argv[1:] if arguments is None else arguments))
    return options


def command(arguments: list[str]) -> str:
    """Return the command line, without the names of folders on this machine."""
    shown = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, _, value = argument.partition("=")
        if before in FOLDERS:
            shown.append(FOLDERS[before])
        elif name in FOLDERS and value:
            shown += [name, FOLDERS[name]]
        else:
            shown.append(argument)
    return f"python apps/compare/compare.py {shlex.join(shown)}".rstrip()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as with Ctrl-C
    sys.exit(main())
