"""The picture of how near emulated gradients come to the true ones."""

import numpy as np
from jobs import Run
from matplotlib.axes import Axes
from measured import AFTER, BEFORE, COSINE, series_of
from methods import DECOUPLED, find_method
from pictures import style_of
from report import Finals, converged

LINES = {  # of each method: what, and how it is drawn
    COSINE: ("the round's uploads", "-"),
    BEFORE: ("buffers, before alignment", "v"),
    AFTER: ("buffers, after alignment", "^"),
}


def has_cosines(finals: Finals) -> bool:
    """Tell whether there is anything to draw."""
    return any(by_round(finals.get(method, []), COSINE) for method in DECOUPLED)


def draw_cosines(axes: Axes, finals: Finals) -> None:
    """Draw means over seeds."""
    for method in [name for name in DECOUPLED if name in finals]:
        color = style_of(method, finals)["color"]
        for metric, (what, style) in LINES.items():
            found = by_round(finals.get(method, []), metric)
            if found:
                label = f"{find_method(method).title}, {what}"
                axes.plot(*zip(*found.items(), strict=True), style, color=color, label=label)
    axes.set(xlabel="round", ylabel="cosine of emulated and true gradient")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def by_round(runs: list[Run], metric: str) -> dict[int, float]:
    """Return a metric's mean over the seeds, for each round that has it."""
    values: dict[int, list[float]] = {}
    for run in converged(runs):
        for round_, value in series_of(run, metric).items():
            values.setdefault(round_, []).append(value)
    return {round_: float(np.mean(found)) for round_, found in sorted(values.items())}
