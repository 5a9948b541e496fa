"""Writes what came out: a markdown page with pictures, and an HTML page that is one file."""

import argparse
import re
from pathlib import Path

from experiment import Experiment
from findings import findings, summary
from jobs import Book
from memory import memory_rows
from page import write_page
from panels import cosine_panels, study_panels, write_grid, write_together
from partitions import title_of
from presets import PAPERS
from report import Finals, Shown, client_rows, markdown, table, tuning_rows
from studies import studies_in, study_rows
from tuning import Choice

COLUMNS = (
    "Accuracy: mean over the clients' models, each on all test examples, and over the last three "
    "rounds ± standard deviation over seeds. Worst client: the least of these models. Own kind: "
    "mean over clients on test examples weighted as the classes of their training examples. "
    "Against: mean difference, seed by seed, with its 95 % t-interval. Bytes are logical, of "
    "training. Server CPU seconds are those of its steps and alignments; simulated seconds are "
    "those of the whole training on the fleet. (2 of 3): only these runs reached it. Shares, "
    "losses: what clients' shares follow, and how their losses add up at the server."
)
TUNED = (
    "How the learning rates were found: points tried, short runs and their CPU seconds, validation "
    "accuracy of the choice ± standard deviation over the seeds that decided, and how far it was "
    "above the second best. A rate with * is at an end of what was tried."
)


def write_results(options: argparse.Namespace, book: Book) -> None:
    """Write tables, pictures and the page for the partitions that have finished runs."""
    finals = {partition: finished(options, book, partition) for partition in options.partition}
    finals = {partition: own for partition, own in finals.items() if own}
    if not finals:
        return
    experiment = book.setting.experiment()
    shown = [_shown(options, book, partition, own) for partition, own in finals.items()]
    found = findings(finals, options.target, options.matters)
    _write_markdown(options, experiment, shown, [vars(one) for one in found])
    write_page(options, experiment, shown, found, options.out / "index.html")
    print(f"wrote {options.out / 'results.md'} and {options.out / 'index.html'}", flush=True)


def finished(options: argparse.Namespace, book: Book, partition: str) -> Finals:
    """Return the methods that have a run for every seed."""
    runs = {method: book.finals(method, partition, options.seeds) for method in options.methods}
    return {method: own for method, own in runs.items() if len(own) == len(options.seeds)}


def _shown(options: argparse.Namespace, book: Book, partition: str, finals: Finals) -> Shown:
    paper = PAPERS.get(options.preset, {}).get(partition)
    tuned = {method: book.tuned(method, partition) for method in finals if not book.rates}
    choices = {method: one for method, one in tuned.items() if isinstance(one, Choice)}
    runs = {method: book.tuning_runs(method, partition) for method in choices}
    words = re.sub(r"[^a-z0-9.]+", "-", partition.replace("alpha=", "").lower())
    dataset = re.sub(r"[^a-z0-9.]+", "-", Path(options.dataset).stem.lower())
    return Shown(
        title_of(partition),
        f"{dataset}-{words}",
        summary(finals, options.against, options.matters),
        finals,
        table(finals, options.target, options.against, options.matters, paper),
        client_rows(finals),
        tuning_rows(choices, runs),
        options.target,
    )


def _write_markdown(
    options: argparse.Namespace,
    experiment: Experiment,
    shown: list[Shown],
    found: list[dict[str, str]],
) -> None:
    lines = ["# Results\n", f"    {options.command}\n", f"{setting_text(options)} {COLUMNS}\n"]
    lines += [f"{experiment.notes}\n"] if experiment.notes else []
    for one in shown:
        lines += _part(one, options.out)
    if found:
        lines += ["## Expected and measured\n", markdown(found)]
    (options.out / "results.md").write_text("\n".join(lines))


def _part(shown: Shown, folder: Path) -> list[str]:
    """Write a partition's pictures and return its lines."""
    write_together(shown.finals, shown.title, folder / f"{shown.name}.png")
    lines = [f"## {shown.title}\n", shown.summary + "\n", markdown(shown.rows)]
    lines.append(f"![accuracy]({shown.name}.png)\n")
    if shown.clients:
        lines += ["### Each client: all test examples / its own kind\n", markdown(shown.clients)]
    if shown.tuning:
        lines += ["### Tuning\n", TUNED + "\n", markdown(shown.tuning)]
    if held := memory_rows(shown.finals):
        lines += ["### What a client holds\n", markdown(held)]
    panels = {"cosines": cosine_panels(shown.finals), "studies": study_panels(shown.finals)}
    for kind, own in panels.items():
        if own:
            write_grid(own, folder / f"{shown.name}-{kind}.png")
            lines.append(f"![{kind}]({shown.name}-{kind}.png)\n")
    for title, values in studies_in(shown.finals).items():
        lines += [f"### {title}\n", markdown(study_rows(title, values, shown.target))]
    return lines


def setting_text(options: argparse.Namespace) -> str:
    """Return what the methods have in common, in a sentence."""
    return (
        f"{Path(options.dataset).stem}, {options.clients} clients, {options.rounds} rounds of "
        f"{options.local_steps} mini-batches of {options.batch_size} per client, "
        f"seeds {', '.join(map(str, options.seeds))}."
    )
