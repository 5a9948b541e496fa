"""Pictures of histories: a metric against rounds, bytes and simulated time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flsplit.account.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_SECONDS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def draw_histories(
    histories: Mapping[str, History], path: str | Path, *, metric: str = "accuracy"
) -> Path:
    """Draw ``metric`` of federated evaluation against rounds and against logical bytes.

    Where runs were given a fleet, a third picture has simulated time.

    Parameters
    ----------
    histories : mapping of str to History
        Histories by the name that the legend shows.
    path : str or Path
        Where to write the picture; the suffix (``.png``, ``.svg``, ``.pdf``) chooses the format.
    metric : str
        A metric of the evaluation.

    Returns
    -------
    Path
        ``path``.
    """
    from matplotlib.figure import Figure  # takes half a second, and most processes draw nothing
    from matplotlib.ticker import MaxNLocator

    rounds = {name: [entry.round for entry in history] for name, history in histories.items()}
    sent = {name: history.bytes_so_far() for name, history in histories.items()}
    passed = {name: history.simulated_so_far() for name, history in histories.items()}
    simulated = any(time is not None for times in passed.values() for time in times)
    figure = Figure(figsize=(15 if simulated else 10, 4), layout="constrained")
    axes = figure.subplots(1, 3 if simulated else 2, sharey=True)

    _draw(axes[0], histories, metric, rounds, 1.0)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="round", ylabel=f"test {metric}")
    axes[0].legend()
    factor, unit = _unit(sent, _BYTES)
    _draw(axes[1], histories, metric, sent, factor)
    axes[1].set(xlabel=f"{unit} sent for training (logical)")
    if simulated:
        factor, unit = _unit(passed, _SECONDS)
        _draw(axes[2], histories, metric, passed, factor)
        axes[2].set(xlabel=f"simulated {unit}")
    figure.savefig(path, dpi=120)
    return Path(path)


_Column = Mapping[str, Sequence[float | None]]
"""By history, a value for each round."""


def _unit(column: _Column, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    most = max((value or 0.0 for values in column.values() for value in values), default=0.0)
    return next((pair for pair in units if most >= pair[0]), units[-1])


def _draw(
    axes: "Axes", histories: Mapping[str, History], metric: str, column: _Column, factor: float
) -> None:
    for name, history in histories.items():
        at = dict(zip((entry.round for entry in history), column[name], strict=True))
        points = [(at[r], v) for r, v in zip(*history.series(metric), strict=True)]
        known = [(x / factor, v) for x, v in points if x is not None]
        axes.plot([x for x, _ in known], [v for _, v in known], marker=".", label=name)
    axes.grid(alpha=0.3)
