"""The tables: what came of each method, in numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jobs import Run
from measured import LAST, SIMULATED
from methods import find_method
from tuning import Choice
from verdict import MATTERS, Verdict, judge

TEXTS = {"learning rates", "where", "measured", "verdict", "shares, losses"}  # columns of text
Finals = dict[str, list[Run]]  # each method's runs, one per seed


@dataclass(frozen=True)
class Shown:
    """What a partition's part of a page is made of."""

    title: str
    name: str
    summary: str
    finals: Finals
    rows: list[dict[str, str]]
    clients: list[dict[str, str]]
    tuning: list[dict[str, str]]
    target: float


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


def differences(finals: Finals, method: str, other: str) -> list[float]:
    """Return by how many points a method is above another, for each seed that both finished."""
    ours, theirs = (
        {run["seed"]: final_accuracy(run) for run in converged(finals.get(name, []))}
        for name in (method, other)
    )
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def verdict_between(finals: Finals, method: str, other: str, matters: float = MATTERS) -> Verdict:
    """Return what may be said of two methods' accuracies."""
    return judge(differences(finals, method, other), matters)


def table(
    finals: Finals,
    target: float,
    against: str = "psl",
    matters: float = MATTERS,
    paper: Mapping[str, float] | None = None,
) -> list[dict[str, str]]:
    """Return a row per method, the most accurate first; keys are the columns' names.

    ``paper`` are accuracies that stand beside ours.
    """
    timed, rows = has_seconds(finals), []
    for method in by_accuracy(finals):
        row = row_of(method, finals[method], target, timed=timed)
        if against in finals:
            verdict = verdict_between(finals, method, against, matters)
            place = list(row).index("own kind, %") + 1
            said = "-" if method == against else str(verdict)
            column = f"against {find_method(against).title}, points"
            row = dict([*list(row.items())[:place], (column, said), *list(row.items())[place:]])
        if paper:
            row |= {"the paper, %": f"{paper[method]:g}" if method in paper else "-"}
        rows.append(row)
    return rows


def has_seconds(finals: Finals) -> bool:
    """Tell whether runs were timed on a fleet."""
    return any(SIMULATED in run for runs in finals.values() for run in runs)


def row_of(method: str, runs: list[Run], target: float, *, timed: bool = False) -> dict[str, str]:
    """Return a method's row, with the time on a fleet if that was simulated."""
    good = converged(runs)
    reached = [(run, r) for run in good if (r := rounds_to(run, target))]
    steps = bool(find_method(method).strategy)  # the unsplit model needs no server step
    rounds = [r for _, r in reached]
    megabytes = [run["bytes"][r - 1] / 1e6 for run, r in reached]
    seconds = [sum(run["server-seconds"][:r]) for run, r in reached]
    simulated = [run[SIMULATED][r - 1] for run, r in reached if SIMULATED in run]
    on_fleet = {f"simulated s to {target:g} %": _reached(runs, simulated, "{:.1f}")}
    scores = {name for run in good for name in run["scores"]}
    return {
        "method": find_method(method).title,
        "accuracy, %": _accuracy(runs),
        "worst client, %": _percent(good, lambda run: min(run["clients"])),
        "own kind, %": _percent(good, lambda run: float(np.nanmean(run["own"]))),
        **{name: _spread_of(good, name) for name in sorted(scores)},
        f"rounds to {target:g} %": _reached(runs, rounds, "{:.1f}"),
        f"MB to {target:g} %": _reached(runs, megabytes, "{:.1f}"),
        f"server CPU s to {target:g} %": _reached(runs, seconds, "{:.2f}") if steps else "-",
        **(on_fleet if timed else {}),
        "MB up": _mean_of(good, lambda run: run["up"] / 1e6, "{:.1f}"),
        "MB down": _mean_of(good, lambda run: run["down"] / 1e6, "{:.1f}"),
        "rows back-propagated": _mean_of(good, lambda run: run["rows"], "{:,.0f}")
        if steps
        else "-",
        "shares, losses": good[0]["weights"] if good else "-",
        "learning rates": rates_text(runs[0]["rates"]),
    }


def client_rows(finals: Finals) -> list[dict[str, str]]:
    """Return each client's accuracy by method: on all test examples / on its own kind of them."""
    rows = []
    for method in by_accuracy(finals):
        if good := converged(finals[method]):
            everybody, own = (
                100 * np.mean([run[kind] for run in good], axis=0) for kind in ("clients", "own")
            )
            pairs = enumerate(zip(everybody, own, strict=True))
            row = {"method": find_method(method).title}
            rows.append(row | {f"client {i}, %": f"{a:.0f} / {b:.0f}" for i, (a, b) in pairs})
    return rows


def tuning_rows(
    choices: Mapping[str, Choice], runs: Mapping[str, Sequence[Run]]
) -> list[dict[str, str]]:
    """Return how each method's rates were found, how sure that is, and what it cost."""
    return [
        {
            "method": find_method(method).title,
            "points": str(len(choice.points)),
            "short runs": str(len(runs[method])),
            "CPU s": f"{sum(run['cpu-seconds'] for run in runs[method]):.0f}",
            "validation, %": spread(choice.scores) if choice.scores else "diverged",
            "above the second best": spread(choice.lead, "{:.1f}") if choice.lead else "-",
            "learning rates": rates_text(choice.rates, choice.ends),
        }
        for method, choice in choices.items()
    ]


def rates_text(rates: Mapping[str, float], ends: Sequence[str] = ()) -> str:
    """Return rates as a text; those that are at an end of what was tried are marked."""
    return ", ".join(
        f"{name.removesuffix('_lr')} {value:g}{'*' if name in ends else ''}"
        for name, value in rates.items()
    )


def markdown(rows: list[dict[str, str]]) -> str:
    """Return rows as a markdown table."""
    names = list(rows[0])
    lines = [names, ["---" if name in TEXTS | {names[0]} else "---:" for name in names]]
    lines += [list(row.values()) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mean(runs: Sequence[Run], what: Callable[[Run], float]) -> float:
    """Return the mean of something over runs, minus infinity if there are none."""
    return float(np.mean([what(run) for run in runs])) if runs else -math.inf


def spread(values: Sequence[float], shape: str = "{:.1f}") -> str:
    """Return mean ± sample standard deviation."""
    deviation = " ± " + shape.format(np.std(values, ddof=1)) if len(values) > 1 else ""
    return shape.format(np.mean(values)) + deviation


def _accuracy(runs: list[Run]) -> str:
    good = converged(runs)
    lost = len(runs) - len(good)
    if not good:
        return "diverged"
    note = f" ({lost} of {len(runs)} diverged)" if lost else ""
    return spread([final_accuracy(run) for run in good]) + note


def _percent(runs: list[Run], what: Callable[[Run], float]) -> str:
    return spread([100 * what(run) for run in runs]) if runs else "-"


def _spread_of(runs: list[Run], name: str) -> str:
    values = [run["scores"][name] for run in runs if name in run["scores"]]
    return spread(values, "{:.3f}") if values else "-"


def _mean_of(runs: list[Run], what: Callable[[Run], float], shape: str) -> str:
    return shape.format(mean(runs, what)) if runs else "-"


def _reached(runs: list[Run], values: Sequence[float], shape: str) -> str:
    """Return mean and spread over the runs that reached the target, and how many if not all."""
    if not values:
        return "not reached"
    part = "" if len(values) == len(runs) else f" ({len(values)} of {len(runs)})"
    return spread(values, shape) + part
