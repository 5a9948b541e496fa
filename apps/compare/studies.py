"""What came of varying one thing at a time: a table and a drawing of each such study."""

import matplotlib as mpl
from against import BYTES
from decoupled_methods import ABLATIONS, STUDIES
from matplotlib.axes import Axes
from pictures import draw_curve
from report import Finals, converged, row_of

Studies = dict[str, Finals]  # by title, with the values' names in the place of methods


def main_part(finals: Finals) -> Finals:
    """Return the methods that are no variation of another, or all if there are no such."""
    return {name: runs for name, runs in finals.items() if name not in ABLATIONS} or finals


def studies_in(finals: Finals) -> Studies:
    """Return the studies of which two or more values have been run."""
    found = {
        title: {name: finals[method] for name, method in values.items() if method in finals}
        for title, values in STUDIES.items()
    }
    return {title: values for title, values in found.items() if len(values) > 1}


def study_rows(title: str, values: Finals, target: float) -> list[dict[str, str]]:
    """Return a row for each value, in the study's order."""
    rows = []
    for name, runs in values.items():
        row = row_of(STUDIES[title][name], runs, target)
        del row["method"]  # it is the study's, and the value says the rest
        rows.append({title: name} | row)
    return rows


def draw_study(axes: Axes, title: str, values: Finals) -> None:
    """Draw accuracy against bytes; the further a value is down the list, the lighter."""
    colors = mpl.colormaps["viridis"].resampled(len(values) + 1)
    for place, (name, runs) in enumerate(values.items()):
        if converged(runs):
            draw_curve(axes, runs, name, {"color": colors(place)}, BYTES)
    axes.set_title(title, loc="left")
    BYTES.label_axes(axes)
