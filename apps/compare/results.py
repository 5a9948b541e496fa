"""Writes what came out: a markdown page with pictures, and an HTML page that is one file."""

import argparse
import math

from findings import findings, summary
from jobs import Book
from page import write_page
from pictures import draw_together
from report import Finals, alpha_name, markdown, table

COLUMNS = (
    "Accuracy: mean over the clients' models and the last three rounds ± standard deviation over "
    "seeds. Bytes are logical, of training. Server CPU seconds are those of its steps. "
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
        picture = options.out / picture_name(options.dataset, alpha)
        draw_together(own, alpha, picture)
        lines += [f"## {alpha_name(alpha)}\n", summary(own) + "\n"]
        lines += [markdown(table(own, options.target)), f"![accuracy]({picture.name})\n"]
    found = findings(finals)
    if found:
        lines += ["## Expected and measured\n", markdown([vars(one) for one in found])]
    (options.out / "results.md").write_text("\n".join(lines))


def setting_text(options: argparse.Namespace) -> str:
    """Return what the methods have in common, in a sentence."""
    return (
        f"{options.dataset}, {options.clients} clients, {options.rounds} rounds of "
        f"{options.local_steps} mini-batches of {options.batch_size} per client, "
        f"seeds {', '.join(map(str, options.seeds))}."
    )


def picture_name(dataset: str, alpha: float) -> str:
    """Return the file name of an alpha's picture."""
    return f"{dataset}-{'iid' if math.isinf(alpha) else f'dirichlet-{alpha:g}'}.png"
