"""Pictures of histories: a metric against rounds, and against bytes."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flsplit.account.history import History

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def draw_histories(
    histories: Mapping[str, History], path: str | Path, *, metric: str = "accuracy"
) -> Path:
    """Draw ``metric`` of federated evaluation against rounds and against logical bytes.

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
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    most = max((h.bytes_so_far()[-1] for h in histories.values() if h), default=0)
    factor, unit = next(pair for pair in _UNITS if most >= pair[0] or pair[0] == 1.0)
    for name, history in histories.items():
        sent = dict(zip((e.round for e in history), history.bytes_so_far(), strict=True))
        rounds, values = history.series(metric)
        by_round.plot(rounds, values, marker=".", label=name)
        by_bytes.plot([sent[r] / factor for r in rounds], values, marker=".", label=name)
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_round.set(xlabel="round", ylabel=f"test {metric}")
    by_bytes.set(xlabel=f"{unit} sent for training (logical)")
    for axes in (by_round, by_bytes):
        axes.grid(alpha=0.3)
    by_round.legend()
    figure.savefig(path, dpi=120)
    return Path(path)
