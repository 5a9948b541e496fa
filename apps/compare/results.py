"""Writes what came out: a markdown page with pictures, and an HTML page that is one file."""

import argparse
import math

from findings import findings, summary
from jobs import Book
from memory import memory_rows
from page import write_page
from panels import cosine_panels, study_panels, write_grid, write_together
from report import Finals, alpha_name, markdown, table
from studies import main_part, studies_in, study_rows

COLUMNS = (
    "Accuracy: mean over the clients' models and the last three rounds ± standard deviation over "
    "seeds. Bytes are logical, of training. Server CPU seconds are those of its steps and "
    "alignments; simulated seconds are those of the whole training on the fleet. "
    "(2 of 3): only these runs reached it. A learning rate with * is at an end of those that "
    "were tried."
)


def write_results(options: argparse.Namespace, book: Book) -> None:
    """Write tables, pictures and the page for the alphas that have finished runs."""
    finals = {alpha: finished(options, book, alpha) for alpha in options.alpha}
    finals = {alpha: own for alpha, own in finals.items() if own}
    if not finals:
        return
    _write_markdown(options, finals)
    write_page(options, finals, options.out / "index.html")
    print(f"wrote {options.out / 'results.md'} and {options.out / 'index.html'}", flush=True)


def finished(options: argparse.Namespace, book: Book, alpha: float) -> Finals:
    """Return the methods that have a run for every seed."""
    runs = {method: book.finals(method, alpha, options.seeds) for method in options.methods}
    return {method: own for method, own in runs.items() if len(own) == len(options.seeds)}


def _write_markdown(options: argparse.Namespace, finals: dict[float, Finals]) -> None:
    lines = ["# Results\n", f"    {options.command}\n", f"{setting_text(options)} {COLUMNS}\n"]
    for alpha, own in finals.items():
        lines += _of_alpha(options, alpha, own)
    found = findings(finals, options.target)
    if found:
        lines += ["## Expected and measured\n", markdown([vars(one) for one in found])]
    (options.out / "results.md").write_text("\n".join(lines))


def _of_alpha(options: argparse.Namespace, alpha: float, finals: Finals) -> list[str]:
    """Write an alpha's pictures and return its lines."""
    main, name = main_part(finals), picture_name(options.dataset, alpha)
    write_together(finals, alpha, options.out / f"{name}.png")
    lines = [f"## {alpha_name(alpha)}\n", summary(main) + "\n"]
    lines += [markdown(table(main, options.target)), f"![accuracy]({name}.png)\n"]
    if held := memory_rows(finals):
        lines += ["### What a client holds\n", markdown(held)]
    for kind, panels in ("cosines", cosine_panels(finals)), ("studies", study_panels(finals)):
        if panels:
            write_grid(panels, options.out / f"{name}-{kind}.png")
            lines.append(f"![{kind}]({name}-{kind}.png)\n")
    for title, values in studies_in(finals).items():
        lines += [f"### {title}\n", markdown(study_rows(title, values, options.target))]
    return lines


def setting_text(options: argparse.Namespace) -> str:
    """Return what the methods have in common, in a sentence."""
    return (
        f"{options.dataset}, {options.clients} clients, {options.rounds} rounds of "
        f"{options.local_steps} mini-batches of {options.batch_size} per client, "
        f"seeds {', '.join(map(str, options.seeds))}."
    )


def picture_name(dataset: str, alpha: float) -> str:
    """Return what the file names of an alpha's pictures begin with."""
    return f"{dataset}-{'iid' if math.isinf(alpha) else f'dirichlet-{alpha:g}'}"
