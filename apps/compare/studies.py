"""What came of varying one thing at a time: a table and a drawing of each such study."""

import matplotlib as mpl
from against import BYTES
from matplotlib.axes import Axes
from pictures import draw_curve
from report import Finals, converged, row_of

Studies = dict[str, Finals]  # by title, with the values' names in the place of methods

AUXILIARY = "FSL-SAGE: the auxiliary model"
STUDIES = {  # what is varied, and each value's method
    **{
        f"{title}: q": {
            f"q={q}": name if q == 5 else f"{name}{{upload_every={q}}}" for q in (1, 2, 5, 10)
        }
        for title, name in (("FSL-SAGE", "fsl-sage"), ("CSE-FSL", "cse-fsl"))
    },
    "FSL-SAGE: l": {
        **{
            f"l={n}": "fsl-sage" if n == 5 else f"fsl-sage{{align_every={n}}}"
            for n in (1, 2, 5, 10)
        },
        "never": "fsl-sage{align_every=0}",
        "l=5, before the round": 'fsl-sage{align="before_round"}',
    },
    AUXILIARY: {
        "pooled": "fsl-sage-pooled",
        "first stage": 'fsl-sage{auxiliary="first-stage"}',
        "linear": "fsl-sage",
    },
}


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
