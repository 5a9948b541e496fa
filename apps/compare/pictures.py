"""The pictures: accuracies with every seed, and accuracy against rounds and bytes."""

from pathlib import Path
from typing import BinaryIO

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from methods import METHODS
from report import Finals, alpha_name, by_accuracy, converged, final_accuracy

# Methods whose clients share a segment are blue and green, those whose clients keep one red.
SHARED = ("#08519c", "#4292c6", "#006d2c", "#66c2a4", "#54278f", "#9e9ac8", "#41b6c4", "#253494")
OWN = (
    "#000000", "#b2182b", "#e08214", "#fdb863", "#8c510a", "#d6604d", "#c51b7d", "#bf812d",
    "#f1b6da", "#7f7f7f",
)  # fmt: skip
LINES = ("-", "--", "-.", ":")
DRAWINGS = ("accuracies", "rounds", "bytes")


def draw_together(finals: Finals, alpha: float, path: Path) -> None:
    """Write one picture with everything about an alpha."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    places = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.1))
    for drawing, axes in zip(DRAWINGS, places, strict=True):
        draw_one(axes, drawing, finals)
    places[0].set_title(alpha_name(alpha), loc="left")
    figure.legend(*places[1].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=100)


def draw_alone(finals: Finals, drawing: str, file: BinaryIO) -> None:
    """Write one drawing as SVG, large enough to be read on a telephone."""
    # The salt keeps ids from changing from run to run.
    with mpl.rc_context({"font.size": 11, "svg.hashsalt": drawing}):
        figure = Figure(figsize=(5, 5.2), layout="constrained")
        draw_one(figure.subplots(), drawing, finals)
        if drawing != "accuracies":
            figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def draw_one(axes: Axes, drawing: str, finals: Finals) -> None:
    """Draw one of ``DRAWINGS``."""
    if drawing == "accuracies":
        _draw_accuracies(axes, finals)
    else:
        _draw_curves(axes, finals, by_bytes=drawing == "bytes")


def _draw_accuracies(axes: Axes, finals: Finals) -> None:
    """Draw each seed as a small dot and the mean as a large one, the best on top."""
    methods = [method for method in by_accuracy(finals) if converged(finals[method])]
    for place, method in enumerate(reversed(methods)):
        values = [final_accuracy(run) for run in converged(finals[method])]
        color = _style(method)["color"]
        axes.plot(values, [place] * len(values), "o", color=color, markersize=4, alpha=0.5)
        axes.plot(np.mean(values), place, "D", color=color, markersize=8)
    axes.set_yticks(range(len(methods)), [METHODS[method].title for method in reversed(methods)])
    axes.set(xlabel="test accuracy, %: seeds and mean")
    axes.grid(alpha=0.3)


def _draw_curves(axes: Axes, finals: Finals, *, by_bytes: bool) -> None:
    """Draw means over seeds, and bands of ± one standard deviation."""
    for method in by_accuracy(finals):
        runs = converged(finals[method])
        if not runs:
            continue
        accuracy = 100 * np.array([run["accuracy"] for run in runs])
        middle = accuracy.mean(0)
        deviation = accuracy.std(0, ddof=1) if len(runs) > 1 else np.zeros_like(middle)
        sent = np.mean([run["bytes"] for run in runs], axis=0) / 1e6
        x = sent if by_bytes else np.arange(1, len(middle) + 1)
        style = _style(method)
        axes.plot(x, middle, label=METHODS[method].title, **style)
        band = {"color": style["color"], "alpha": 0.06, "lw": 0}
        axes.fill_between(x, middle - deviation, middle + deviation, **band)
    if by_bytes:
        axes.set(xscale="log", xlabel="MB sent for training (logical)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set(xlabel="round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(ylabel="test accuracy, %")
    axes.grid(alpha=0.3)


def _style(method: str) -> dict[str, str]:
    shares = METHODS[method].shares_clients
    alike = [name for name, one in METHODS.items() if one.shares_clients == shares]
    index = alike.index(method)
    return {"color": (SHARED if shares else OWN)[index], "linestyle": LINES[index % len(LINES)]}
