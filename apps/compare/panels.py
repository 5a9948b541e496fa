"""The pictures there are of a partition's runs, and how they become files."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import matplotlib as mpl
from against import BYTES, ROUNDS, SECONDS
from cosines import draw_cosines, has_cosines
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import draw_accuracies, draw_curves
from report import Finals, has_seconds
from studies import draw_study, studies_in

ACCURACIES = "Accuracy at the end. Small dots are seeds, diamonds their means."
CURVES = {
    "rounds": (ROUNDS, "Accuracy after each round."),
    "bytes": (BYTES, "The same against what was sent, on a logarithmic scale."),
    "seconds": (SECONDS, "The same against the time that it would take on the fleet."),
}
COSINES = (
    "How near the gradients of auxiliary models come to the true ones (1 is the same direction). "
    "Uploads are fresh in each round; buffers are what was aligned on. Means over seeds."
)


class Panel(NamedTuple):
    """One drawing, which goes into a picture by itself or beside others."""

    name: str
    caption: str
    draw: Callable[[Axes], None]


def main_panels(finals: Finals) -> list[Panel]:
    """Return those of the methods beside each other."""
    panels = [Panel("accuracies", ACCURACIES, partial(draw_accuracies, finals=finals))]
    for name, (against, caption) in CURVES.items():
        if against is not SECONDS or has_seconds(finals):
            panels.append(
                Panel(name, caption, partial(draw_curves, finals=finals, against=against))
            )
    return panels


def cosine_panels(finals: Finals) -> list[Panel]:
    """Return that of the cosines, if any were measured."""
    drawn = Panel("cosines", COSINES, partial(draw_cosines, finals=finals))
    return [drawn] if has_cosines(finals) else []


def study_panels(finals: Finals) -> list[Panel]:
    """Return one for each study."""
    return [
        Panel(
            title,
            f"{title}. Accuracy against what was sent.",
            partial(draw_study, title=title, values=own),
        )
        for title, own in studies_in(finals).items()
    ]


def write_svg(panel: Panel, file: BinaryIO) -> None:
    """Write one as SVG, large enough to be read on a telephone."""
    # The salt keeps ids from changing from run to run.
    with mpl.rc_context({"font.size": 11, "svg.hashsalt": panel.name}):
        figure = Figure(figsize=(5, 5.2), layout="constrained")
        axes = figure.subplots()
        panel.draw(axes)
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            columns = 3 if max(map(len, labels)) < 20 else 1
            figure.legend(loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})


def write_together(finals: Finals, title: str, path: Path) -> None:
    """Write one picture with the methods beside each other, and one legend for all."""
    panels = main_panels(finals)
    figure = Figure(figsize=(4.3 * len(panels), 4.8), layout="constrained")
    places = figure.subplots(1, len(panels), width_ratios=(1, *[1.1] * (len(panels) - 1)))
    for panel, axes in zip(panels, places, strict=True):
        panel.draw(axes)
    places[0].set_title(title, loc="left")
    figure.legend(*places[1].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=80)


def write_grid(panels: list[Panel], path: Path) -> None:
    """Write panels beside and below each other, each with its legend."""
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 3.8 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for panel, axes in zip(panels, places, strict=False):
        panel.draw(axes)
        axes.legend(fontsize=8)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=80)
