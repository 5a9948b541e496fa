"""Tables and pictures from the finished runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Run = dict[str, Any]
LAST = 3  # rounds that a run's accuracy is the mean of: a single one is noisy


def final_accuracy(run: Run) -> float:
    """Return a run's accuracy in percent."""
    return 100 * float(np.mean(run["accuracy"][-LAST:]))


def rounds_to(run: Run, target: float) -> int | None:
    """Return the first round with at least ``target`` percent, None if there is none."""
    return next((i for i, a in enumerate(run["accuracy"], 1) if 100 * a >= target), None)


def table(runs: dict[str, list[Run]], target: float) -> str:
    """Return a markdown table, a line per method, the most accurate first."""
    head = (
        "method", "learning rates", "accuracy, %", f"rounds to {target:g} %",
        f"MB to {target:g} %", f"server s to {target:g} %", "MB up", "MB down",
        "rows back-propagated",
    )  # fmt: skip
    lines = [head, ("---", "---", *["---:"] * 7)]
    for method, own in sorted(runs.items(), key=lambda item: -_mean(item[1], final_accuracy)):
        reached = [(run, r) for run in own if (r := rounds_to(run, target))]
        rates = ", ".join(f"{k.replace('_lr', '')} {v:g}" for k, v in own[0]["rates"].items())
        split = method != "fedavg"
        lines.append(
            (
                method,
                rates,
                _spread([final_accuracy(run) for run in own]),
                _reached([r for _, r in reached], len(own), "{:.1f}"),
                _reached([run["bytes"][r - 1] / 1e6 for run, r in reached], len(own), "{:.0f}"),
                _reached([sum(run["server-seconds"][:r]) for run, r in reached], len(own), "{:.1f}")
                if split
                else "-",
                f"{_mean(own, lambda run: run['up']) / 1e6:.1f}",
                f"{_mean(own, lambda run: run['down']) / 1e6:.1f}",
                f"{_mean(own, lambda run: run['rows']):,.0f}" if split else "-",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(runs: dict[str, list[Run]], path: Path, title: str) -> None:
    """Draw accuracy against rounds and against logical bytes: means, and bands of ± one std."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    styles = ("-", "--", ":")
    for index, (method, own) in enumerate(runs.items()):
        accuracy = 100 * np.array([run["accuracy"] for run in own])
        mean, std = accuracy.mean(0), accuracy.std(0)
        rounds = np.arange(1, len(mean) + 1)
        sent = np.mean([run["bytes"] for run in own], axis=0) / 1e6
        for axes, x in ((by_round, rounds), (by_bytes, sent)):
            style = {"color": f"C{index % 10}", "linestyle": styles[index // 10]}
            axes.plot(x, mean, label=method, **style)
            axes.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.12, lw=0)
    by_round.set(xlabel="round", ylabel="test accuracy, %", title=title)
    by_bytes.set(xlabel="MB sent for training (logical, log scale)", xscale="log")
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
    by_bytes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def alpha_name(alpha: float) -> str:
    """Return how an alpha is called on the page."""
    return "IID" if math.isinf(alpha) else f"Dirichlet({alpha:g})"


def _mean(runs: list[Run], what: Any) -> float:
    return float(np.mean([what(run) for run in runs]))


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _reached(values: Sequence[float], runs: int, shape: str) -> str:
    if not values:
        return "not reached"
    part = "" if len(values) == runs else f" ({len(values)} of {runs} runs)"
    return shape.format(float(np.mean(values))) + part
