"""Varies FSL-SAGE's settings one at a time: q, l, the auxiliary model, the clients' data.

    python apps/compare/decoupled_ablation.py --dataset digits

Options, and the file of finished runs, are those of ``decoupled.py``. Learning rates are those
that were best for the standard setting, which is the first row of each table.
"""

import argparse
import statistics
from dataclasses import dataclass, field
from typing import Any

from decoupled import NAMES, Book, Run, parse, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

AUXILIARY = "auxiliary model"


@dataclass(frozen=True)
class Case:
    """One row: a method, and what of the standard setting is changed."""

    name: str
    method: str = "fsl-sage"
    changed: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    options = parse(__doc__.splitlines()[0])
    book = Book(options)
    texts = []
    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, (what, cases) in zip(
        figure.subplots(2, 2, sharey=True).flat, studies(options).items(), strict=True
    ):
        rows = {case.name: runs_of(book, case, options) for case in cases}
        texts.append(table(what, rows, options))
        if what == AUXILIARY:
            texts.append(memory_table(rows))
        draw(axes, what, rows, options)
    print("\n\n".join(texts))
    figure.savefig(options.out / f"{options.dataset}-ablation.png", dpi=90)
    (options.out / f"{options.dataset}-ablation.md").write_text("\n\n".join(texts) + "\n")


def studies(options: argparse.Namespace) -> dict[str, list[Case]]:
    """Return the rows of each table."""
    q, every, alpha = options.upload_every, options.align_every, options.alpha
    both = ("fsl-sage", "cse-fsl")
    return {
        "q": [
            Case(f"{NAMES[method]}, q = {n}", method, {"q": n})
            for method in both
            for n in sorted({q, 1, 2, 10})
        ],
        "l": [
            Case(f"l = {n or 'never'}", changed={"l": n}) for n in (*sorted({every, 1, 2, 10}), 0)
        ],
        AUXILIARY: [
            Case(name, changed={"auxiliary": kind})
            for kind, name in (
                ("linear", "linear"),
                ("pooled", "pooling, linear"),
                ("first-stage", "first stage"),
                ("whole", "like the server segment"),
            )
        ],
        "Dirichlet": [
            Case(f"{NAMES[method]}, {other}", method, {"alpha": other})
            for other in (str(alpha), "0.3", "inf")
            for method in (*both, "splitfed-v1", "splitfed-v2")
        ],
    }


def runs_of(book: Book, case: Case, options: argparse.Namespace) -> list[Run]:
    rate = book.tuned(case.method, {})
    return [book.run(case.method, rate, seed, **case.changed) for seed in options.seeds]


def memory_table(rows: dict[str, list[Run]]) -> str:
    """Return what the auxiliary models and the clients take; the same in all runs."""
    lines = [f"| {AUXILIARY} | its size, kB | a client holds, kB | the whole model, kB |"]
    lines.append("|---|---|---|---|")
    for name, [run, *_] in rows.items():
        last = run["metrics"][-1]
        held, whole = last["client-memory-bytes"], last["whole-model-memory-bytes"]
        sizes = f"{run['auxiliary-bytes'] / 1e3:.1f} | {held / 1e3:.0f} | {whole / 1e3:.0f}"
        lines.append(f"| {name} | {sizes} |")
    return "\n".join(lines)


def draw(axes: Axes, what: str, rows: dict[str, list[Run]], options: argparse.Namespace) -> None:
    for name, runs in rows.items():
        points = zip(*(run["accuracy"] for run in runs), strict=True)
        accuracy = [statistics.mean(point) for point in points]
        sent = [nbytes / 1e6 for nbytes in runs[0]["bytes"]]
        axes.plot(sent, accuracy, label=name)
    for target in options.targets:
        axes.axhline(target, color="grey", linestyle=":")
    axes.set(title=what, xlabel="MB sent for training (logical)", ylabel="test accuracy")
    axes.set(xscale="log", ylim=(0.6, 1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
