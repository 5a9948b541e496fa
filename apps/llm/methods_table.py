"""The comparison of the methods as a table and as a picture."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from verdict import judge

Found = dict[str, dict[str, Any]]  # by method: its rate, and its runs by seed
Memory = dict[str, dict[str, dict[str, float]]]  # by model and method: MiB

RIVALS = ("fedavg", "psl")
COLORS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]


def write_table(path: Path, setting: str, found: Found, memory: Memory) -> str:
    """Write the table in Markdown, and return it."""
    head = ["method", "rate", "before", "after", *(f"less {name}" for name in RIVALS)]
    head += ["up, B/token", "down", "in all, MB", "once, MB"]
    head += [f"client, MiB ({model})" for model in memory] + ["server, s"]
    rows = [head, ["---"] * len(head)]
    rows += [row_of(method, found, memory) for method in found]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    notes = (
        f"{setting}.",
        "Mean ± standard deviation over seeds; differences seed by seed, with a 95 % interval.",
        "Memory: the most ever, and the most after the first exchange, of a process of its own.",
        "Bytes per token are of training; `once` are the first weights, which `in all` leaves out.",
        "*: at an end of the rates tried.",
    )
    text = "\n".join([*lines, "", *notes, ""])
    path.write_text(text)
    return text


def row_of(method: str, found: Found, memory: Memory) -> list[str]:
    """Return a method's cells."""
    own = found[method]
    runs: dict[int, dict[str, Any]] = own["runs"]
    rate = f"{own['rate']:g}{'*' if own['at-end'] else ''}"
    if not runs:
        return [method, rate, "diverged", *[""] * (len(RIVALS) + 6 + len(memory))]

    def mean(key: str, unit: float = 1.0) -> str:
        return spread([run[key] / unit for run in runs.values()])

    def last(key: str, unit: float = 1.0) -> str:
        return spread([run["curve"][-1][key] / unit for run in runs.values()])

    cells = [method, rate, mean("before"), mean("perplexity")]
    cells += [difference(runs, found.get(name, {}).get("runs", {})) for name in RIVALS]
    cells += [plain(runs, "up"), plain(runs, "down")]
    cells += [last("bytes", 1e6), mean("once", 1e6)]
    cells += [f"{one[method]['peak']:.0f}, {one[method]['later']:.0f}" for one in memory.values()]
    return [*cells, last("server-seconds")]


def difference(runs: dict[int, dict[str, Any]], rival: dict[int, dict[str, Any]]) -> str:
    """Return by how much the perplexity is above a rival's, and what may be said of it."""
    if runs == rival:
        return ""
    seeds = sorted(runs.keys() & rival.keys())
    return str(judge([runs[seed]["perplexity"] - rival[seed]["perplexity"] for seed in seeds]))


def plain(runs: dict[int, dict[str, Any]], key: str) -> str:
    """Return a mean as a whole number."""
    return f"{statistics.mean(run[key] for run in runs.values()):.0f}"


def spread(values: list[float]) -> str:
    """Return a mean with its standard deviation, where there is one."""
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.1f} ± {deviation:.1f}" if deviation >= 0.05 else f"{mean:.1f}"


def draw(path: Path, setting: str, found: Found, memory: Memory) -> None:
    """Draw perplexity against bytes, the client's memory, and the server's time."""
    figure, panels = plt.subplots(1, 2 + len(memory), figsize=(5 * (2 + len(memory)), 4.5))
    for number, (method, own) in enumerate(found.items()):
        runs = list(own["runs"].values())
        if not runs:
            continue
        style = {"color": COLORS[number % len(COLORS)], "label": method, "marker": "o"}
        draw_curve(panels[0], runs, "bytes", 1e6, style)
        draw_curve(panels[-1], runs, "server-seconds", 1.0, style)
        for axes, one in zip(panels[1:-1], memory.values(), strict=True):
            after = statistics.mean(run["perplexity"] for run in runs)
            axes.plot(one[method]["peak"], after, linestyle="", **style)
    panels[0].set(xscale="log", xlabel="MB sent, without the first weights")
    panels[-1].set(xscale="log", xlabel="server, s")
    for axes, model in zip(panels[1:-1], memory, strict=True):
        axes.set(xlabel=f"client's most memory, MiB ({model})")
    for axes in panels:
        axes.set(ylabel="held-out perplexity", yscale="log")
        for formats in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formats("{x:.0f}")  # not powers of ten: the axis has less than one
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.suptitle(f"{setting}; a point is a round", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curve(
    axes: Axes, runs: list[dict[str, Any]], key: str, unit: float, style: dict[str, Any]
) -> None:
    """Draw the mean perplexity after each round."""
    points = list(zip(*(run["curve"] for run in runs), strict=True))
    x = [statistics.mean(one[key] for one in point) / unit for point in points]
    y = [statistics.mean(one["perplexity"] for one in point) for point in points]
    axes.plot(x, y, **style)
