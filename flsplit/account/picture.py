"""Pictures of histories: a metric against rounds, bytes and simulated time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flsplit.account.history import History
from flsplit.errors import ConfigError
from flsplit.log import logger

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_SECONDS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))

_INCHES, _BESIDE = 0.1, 6
"""How wide a letter of the legend is, and how many letters' room a curve's sign takes."""

_COLOURS = 10
_STYLES, _MARKERS = ("-", "--", ":", "-."), (".", "s", "^", "x", "D")
"""Of the first ten curves, of the next ten and so on: of 200 curves no two look the same."""


def draw_histories(
    histories: Mapping[str, History], path: str | Path, *, metric: str = "accuracy"
) -> Path:
    """Draw ``metric`` against rounds and against logical bytes.

    Where runs were given a fleet, a third picture has simulated time.

    Parameters
    ----------
    histories : mapping of str to History
        Histories by the name that the legend shows.
    path : str or Path
        Where to write the picture; the suffix (``.png``, ``.svg``, ``.pdf``) chooses the format.
    metric : str
        A metric of federated evaluation, ``train-loss``, ``train-accuracy``, or what the method
        recorded. Some of the histories may lack it.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ConfigError
        If there are no histories, or rounds were evaluated and none has this metric.
    """
    _check(histories, metric)
    from matplotlib.figure import Figure  # takes half a second, and most processes draw nothing
    from matplotlib.ticker import MaxNLocator

    rounds = {name: [entry.round for entry in history] for name, history in histories.items()}
    sent = {name: history.bytes_so_far() for name, history in histories.items()}
    passed = {name: history.simulated_so_far() for name, history in histories.items()}
    simulated = any(time is not None for times in passed.values() for time in times)
    width = 15 if simulated else 10
    columns = max(1, int(width / _INCHES / (max(map(len, histories)) + _BESIDE)))
    lines = -(-len(histories) // columns)  # of the legend, which lies beneath
    figure = Figure(figsize=(width, 4 + 0.25 * (lines - 1)), layout="constrained")
    axes = figure.subplots(1, 3 if simulated else 2, sharey=True)

    _draw(axes[0], histories, metric, rounds, 1.0)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="round", ylabel=_label(histories, metric))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    factor, unit = _unit(sent, _BYTES)
    _draw(axes[1], histories, metric, sent, factor)
    axes[1].set(xlabel=f"{unit} sent for training (logical)")
    if simulated:
        factor, unit = _unit(passed, _SECONDS)
        _draw(axes[2], histories, metric, passed, factor)
        axes[2].set(xlabel=f"simulated {unit}")
    figure.savefig(path, dpi=120)
    return Path(path)


def _check(histories: Mapping[str, History], metric: str) -> None:
    if not histories:
        raise ConfigError("histories is empty, expected at least one by its name")
    known = sorted({name for history in histories.values() for name in history.metrics()})
    if any(entry.evaluation for history in histories.values() for entry in history):
        History.check_metric(metric, known)
    elif metric not in known:
        logger.warning(
            "draw_histories: no round was evaluated, so none has %r: the picture is empty "
            "(there are %s)", metric, ", ".join(known) or "no other metrics either",
        )  # fmt: skip


def _label(histories: Mapping[str, History], metric: str) -> str:
    trained = any(metric in history.metrics() for history in histories.values()) and not any(
        metric in entry.evaluation for history in histories.values() for entry in history
    )
    return metric.replace("-", " ") if trained else f"test {metric}"


_Column = Mapping[str, Sequence[float | None]]
"""By history, a value for each round."""


def _unit(column: _Column, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    most = max((value or 0.0 for values in column.values() for value in values), default=0.0)
    return next((pair for pair in units if most >= pair[0]), units[-1])


def _draw(
    axes: "Axes", histories: Mapping[str, History], metric: str, column: _Column, factor: float
) -> None:
    for number, (name, history) in enumerate(histories.items()):
        found = [entry.named().get(metric) for entry in history]
        points = zip(column[name], found, strict=True)
        known = [(x / factor, v) for x, v in points if x is not None and v is not None]
        again, colour = divmod(number, _COLOURS)
        axes.plot(
            [x for x, _ in known],
            [v for _, v in known],
            color=f"C{colour}",
            linestyle=_STYLES[again % len(_STYLES)],
            marker=_MARKERS[again % len(_MARKERS)],
            markersize=4 if again else None,
            label=name,
        )
    axes.grid(alpha=0.3)
