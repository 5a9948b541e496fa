"""Drawings: accuracies with every seed, and curves of accuracy."""

from typing import Any

import numpy as np
from against import Against
from jobs import Run
from matplotlib.axes import Axes
from methods import find_method
from report import Finals, by_accuracy, converged, final_accuracy

# Methods whose clients share a segment are blue and green, those whose clients keep one red.
SHARED = ("#08519c", "#4292c6", "#006d2c", "#66c2a4", "#54278f", "#9e9ac8", "#41b6c4", "#253494")
OWN = (
    "#000000", "#b2182b", "#e08214", "#fdb863", "#8c510a", "#d6604d", "#c51b7d", "#bf812d",
    "#f1b6da", "#7f7f7f",
)  # fmt: skip
LINES = ("-", "--", "-.", ":")


def draw_accuracies(axes: Axes, finals: Finals) -> None:
    """Draw each seed as a small dot and the mean as a large one, the best on top."""
    methods = [method for method in by_accuracy(finals) if converged(finals[method])]
    for place, method in enumerate(reversed(methods)):
        values = [final_accuracy(run) for run in converged(finals[method])]
        color = style_of(method, finals)["color"]
        axes.plot(values, [place] * len(values), "o", color=color, markersize=4, alpha=0.5)
        axes.plot(np.mean(values), place, "D", color=color, markersize=8)
    axes.set_yticks(
        range(len(methods)), [find_method(method).title for method in reversed(methods)]
    )
    axes.set(xlabel="test accuracy, %: seeds and mean")
    axes.grid(alpha=0.3)


def draw_curves(axes: Axes, finals: Finals, against: Against) -> None:
    """Draw each method's accuracy against something."""
    for method in by_accuracy(finals):
        if converged(finals[method]):
            label = find_method(method).title
            draw_curve(axes, finals[method], label, style_of(method, finals), against)
    against.label_axes(axes)


def draw_curve(
    axes: Axes, runs: list[Run], label: str, style: dict[str, Any], against: Against
) -> None:
    """Draw the mean over seeds, and a band of ± one standard deviation."""
    good = converged(runs)
    accuracy = 100 * np.array([run["accuracy"] for run in good])
    middle = accuracy.mean(0)
    deviation = accuracy.std(0, ddof=1) if len(good) > 1 else np.zeros_like(middle)
    x = against.mean(good)
    axes.plot(x, middle, label=label, **style)
    band = {"color": style["color"], "alpha": 0.06, "lw": 0}
    axes.fill_between(x, middle - deviation, middle + deviation, **band)


def style_of(method: str, finals: Finals) -> dict[str, str]:
    """Return a method's color and kind of line, the same in all pictures of a page."""
    shares = find_method(method).shares_clients
    alike = [name for name in finals if find_method(name).shares_clients == shares]
    index, colors = alike.index(method), SHARED if shares else OWN
    return {"color": colors[index % len(colors)], "linestyle": LINES[index % len(LINES)]}
