"""The table: what came of each method, in numbers."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jobs import Run
from measured import SIMULATED
from methods import METHODS

LAST = 3  # rounds that a run's accuracy is the mean of: a single one is noisy
TEXTS = {"learning rates", "where", "measured", "verdict"}  # columns, beside the first
Finals = dict[str, list[Run]]  # each method's runs, one per seed


def final_accuracy(run: Run) -> float:
    """Return a run's accuracy in percent."""
    return 100 * float(np.mean(run["accuracy"][-LAST:]))


def rounds_to(run: Run, target: float) -> int | None:
    """Return the first round with at least ``target`` percent, None if there is none."""
    return next((i for i, a in enumerate(run["accuracy"], 1) if 100 * a >= target), None)


def bytes_to(run: Run, target: float) -> int | None:
    """Return the bytes of the rounds up to the first with at least ``target`` percent."""
    rounds = rounds_to(run, target)
    return run["bytes"][rounds - 1] if rounds else None


def converged(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that did not diverge."""
    return [run for run in runs if "failed" not in run]


def by_accuracy(finals: Finals) -> list[str]:
    """Return the methods, the most accurate first, and last those that always diverged."""
    return sorted(finals, key=lambda method: -mean(converged(finals[method]), final_accuracy))


def table(finals: Finals, target: float) -> list[dict[str, str]]:
    """Return a row per method, the most accurate first; keys are the columns' names."""
    timed = has_seconds(finals)
    return [row_of(method, finals[method], target, timed=timed) for method in by_accuracy(finals)]


def has_seconds(finals: Finals) -> bool:
    """Tell whether runs were timed on a fleet."""
    return any(SIMULATED in run for runs in finals.values() for run in runs)


def row_of(method: str, runs: list[Run], target: float, *, timed: bool = False) -> dict[str, str]:
    """Return a method's row, with the time on a fleet if that was simulated."""
    good = converged(runs)
    reached = [(run, r) for run in good if (r := rounds_to(run, target))]
    steps = METHODS[method].make is not None  # the unsplit model needs no server step
    rounds = [r for _, r in reached]
    megabytes = [run["bytes"][r - 1] / 1e6 for run, r in reached]
    seconds = [sum(run["server-seconds"][:r]) for run, r in reached]
    simulated = [run[SIMULATED][r - 1] for run, r in reached if SIMULATED in run]
    on_fleet = {f"simulated s to {target:g} %": _reached(runs, simulated, "{:.1f}")}
    return {
        "method": METHODS[method].title,
        "accuracy, %": _accuracy(runs),
        f"rounds to {target:g} %": _reached(runs, rounds, "{:.1f}"),
        f"MB to {target:g} %": _reached(runs, megabytes, "{:.1f}"),
        f"server CPU s to {target:g} %": _reached(runs, seconds, "{:.2f}") if steps else "-",
        **(on_fleet if timed else {}),
        "MB up": _mean_of(good, lambda run: run["up"] / 1e6, "{:.1f}"),
        "MB down": _mean_of(good, lambda run: run["down"] / 1e6, "{:.1f}"),
        "rows back-propagated": _mean_of(good, lambda run: run["rows"], "{:,.0f}")
        if steps
        else "-",
        "learning rates": _rates(method, runs[0]),
    }


def markdown(rows: list[dict[str, str]]) -> str:
    """Return rows as a markdown table."""
    names = list(rows[0])
    lines = [names, ["---" if name in TEXTS | {names[0]} else "---:" for name in names]]
    lines += [list(row.values()) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def alpha_name(alpha: float) -> str:
    """Return how an alpha is called on the page."""
    return "IID" if math.isinf(alpha) else f"Dirichlet({alpha:g})"


def mean(runs: Sequence[Run], what: Callable[[Run], float]) -> float:
    """Return the mean of something over runs, minus infinity if there are none."""
    return float(np.mean([what(run) for run in runs])) if runs else -math.inf


def spread(values: Sequence[float], shape: str = "{:.1f}") -> str:
    """Return mean ± sample standard deviation."""
    deviation = " ± " + shape.format(np.std(values, ddof=1)) if len(values) > 1 else ""
    return shape.format(np.mean(values)) + deviation


def _rates(method: str, run: Run) -> str:
    """Return the tuned rates; one at an end of three or more that were tried is marked."""
    parts = []
    for name, value in run["rates"].items():
        tried = sorted({point[name] for point in METHODS[method].grid})
        edge = len(tried) > 2 and value in (tried[0], tried[-1])
        parts.append(f"{name.removesuffix('_lr')} {value:g}{'*' if edge else ''}")
    return ", ".join(parts)


def _accuracy(runs: list[Run]) -> str:
    good = converged(runs)
    lost = len(runs) - len(good)
    if not good:
        return "diverged"
    note = f" ({lost} of {len(runs)} diverged)" if lost else ""
    return spread([final_accuracy(run) for run in good]) + note


def _mean_of(runs: list[Run], what: Callable[[Run], float], shape: str) -> str:
    return shape.format(mean(runs, what)) if runs else "-"


def _reached(runs: list[Run], values: Sequence[float], shape: str) -> str:
    """Return mean and spread over the runs that reached the target, and how many if not all."""
    if not values:
        return "not reached"
    part = "" if len(values) == len(runs) else f" ({len(values)} of {len(runs)})"
    return spread(values, shape) + part
